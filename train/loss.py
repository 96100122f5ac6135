"""Losses over the supervised positions only: no logits of positions, or of ids, that cannot be right.

Axes: B batch, T text positions, n supervised positions. hidden [B, T, D]; labels int64 [B, T]: the token that
follows each position; weights float32 [B, T], 0 where nothing is taught. Both losses are weighted sums: the
caller divides by the weights of the whole batch, of which it may hold a part.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from model.decoding.closed_set import ClosedSet
from model.gemma import Gemma

CHUNK = 128  # positions whose full-vocabulary logits are in memory together, 132 MB for the official sizes


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
    """Cross-entropy over the whole vocabulary, by chunks of positions."""
    chosen = weights > 0
    parts = hidden[chosen], labels[chosen], weights[chosen]
    return ChunkedCrossEntropy.apply(decoder.embed.weight, decoder.config.final_cap, *parts)


class ChunkedCrossEntropy(torch.autograd.Function):
    """Weighted sum of cross-entropies of `softcap(hidden @ embed.T)`, for n positions of a huge vocabulary.

    The gradient follows from the loss's own softmax, so it is computed with it: a chunk's logits are made
    once, used for both, and overwritten in place. What is kept is the gradient of hidden [n, D].
    """

    @staticmethod
    def forward(ctx, embed: Tensor, cap: float | None, hidden: Tensor, labels: Tensor, weights: Tensor):
        grad_hidden = torch.zeros_like(hidden)
        grad_embed = torch.zeros_like(embed) if ctx.needs_input_grad[0] else None
        loss = weights.new_zeros(())
        for h, label, weight, grad in zip(*(x.split(CHUNK) for x in (hidden, labels, weights, grad_hidden))):
            logits = F.linear(h, embed)
            x = logits.float()
            tanh = x.div_(cap).tanh_().clone() if cap else None
            x = x.mul_(cap) if cap else x
            x -= x.amax(-1, keepdim=True)
            chosen = x.gather(-1, label[:, None])[:, 0]
            total = x.exp_().sum(-1)
            loss += ((total.log() - chosen) * weight).sum()
            x *= (weight / total)[:, None]
            x[torch.arange(len(label), device=x.device), label] -= weight
            if cap:
                x.addcmul_(x, tanh.square_(), value=-1)  # the cap's slope is 1 - tanh^2
            x = x.to(logits.dtype)
            grad.copy_(x @ embed)
            if grad_embed is not None:
                grad_embed += x.T @ h
        ctx.save_for_backward(grad_hidden, grad_embed)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        of_hidden, of_embed = ctx.saved_tensors
        return None if of_embed is None else grad * of_embed, None, grad * of_hidden, None, None
