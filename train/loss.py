"""Losses over the supervised positions only: no logits of positions, or of ids, that cannot be right.

Axes: B batch, T text positions, n supervised positions. hidden [B, T, D]; labels int64 [B, T]: the token that
follows each position; weights float32 [B, T], 0 where nothing is taught. Both losses are weighted sums: the
caller divides by the weights of the whole batch, of which it may hold a part.
"""

import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from model.gemma import Gemma
from model.groups import ClosedSet

CHUNK = 256  # positions whose full-vocabulary logits are in memory together: 263 MB for the official sizes


def allowed_loss(
    decoder: Gemma, hidden: Tensor, labels: Tensor, weights: Tensor, language: ClosedSet
) -> Tensor:
    """Closed-set: cross-entropy over the ids allowed at each position. The eos after the last group is the
    only id allowed there, so it has nothing to teach."""
    total = weights.new_zeros(())
    for position in (0, 4):  # of a group: coordinates, then the class
        first, last = language.allowed(position)
        chosen = (weights > 0) & (labels >= first) & (labels < last)
        logits = decoder.logits(hidden[chosen], first, last)
        losses = F.cross_entropy(logits, labels[chosen] - first, reduction="none")
        total = total + (losses * weights[chosen]).sum()  # autocast would round a matmul
    return total


def vocabulary_loss(decoder: Gemma, hidden: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Cross-entropy over the whole vocabulary, by chunks of positions, recomputed for the gradient."""
    chosen = weights > 0
    parts = zip(hidden[chosen].split(CHUNK), labels[chosen].split(CHUNK), weights[chosen].split(CHUNK))
    losses = (checkpoint(_chunk, decoder, *part, use_reentrant=False) for part in parts)
    return sum(losses, weights.new_zeros(()))


def _chunk(decoder: Gemma, hidden: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    return (F.cross_entropy(decoder.logits(hidden), labels, reduction="none") * weights).sum()
