"""The restricted head: a choice among a few neighbouring ids, without the logits of all the others.

The ids allowed at a position are neighbouring rows of the tied embedding, so `hidden @ embed[first:last].T`
gives exactly the logits that matter: 1,024 rows for a coordinate, 81 for a class, instead of 257,216.
"""

import torch
from torch import Tensor

from model.gemma import Gemma


def choose(decoder: Gemma, hidden: Tensor, first: int, last: int) -> tuple[Tensor, Tensor]:
    """Hidden [B, D] -> the likeliest of the ids first..last-1 [B], and all their probabilities."""
    probabilities = torch.softmax(decoder.logits(hidden, first, last), dim=-1)
    return first + probabilities.argmax(-1), probabilities
