"""Losses over the supervised positions only: no logits of positions or ids that cannot be right."""

import torch.nn.functional as F
from torch import Tensor

from model.gemma import Gemma
from model.groups import GROUP, ClosedSet


def closed_set_loss(
    decoder: Gemma, hidden: Tensor, tokens: Tensor, weights: Tensor, language: ClosedSet
) -> Tensor:
    """Cross-entropy over the ids allowed at each position, weighted sum. Axes: B batch, T = 5 G + 1.

    hidden [B, T, D]: the states that predict tokens int64 [B, T]; weights [B, T]. eos is the only id allowed
    at its position, so there is nothing to learn there.
    """
    total = 0.0
    for columns in (slice(0, 4), slice(4, 5)):  # coordinates, classes
        first, last = language.allowed(columns.start)
        states, labels, weight = (
            x[:, :-1].unflatten(1, (-1, GROUP))[:, :, columns] for x in (hidden, tokens, weights)
        )
        logits = decoder.logits(states, first, last).flatten(0, -2)
        # 0-weight labels may be of any kind: a noise box's coordinates are ids of the same range
        losses = F.cross_entropy(logits, (labels - first).flatten(), reduction="none")
        total = total + (losses * weight.flatten()).sum()
    return total
