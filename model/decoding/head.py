"""The restricted head: a choice among a few neighbouring ids, without the logits of all the others.

The ids allowed at a position are neighbouring rows of the tied embedding, so `hidden @ embed[first:last].T`
gives exactly the logits that matter: 1,024 rows for a coordinate, 81 for a class, instead of 257,216. This is
the readable form, and the one for a CPU; model/decoding/head_kernel.py does all of it in one launch on a GPU.

Axes: B batch, D width, R allowed rows, I slots of a group (four coordinates and a class).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from model.gemma import Gemma


@dataclass(frozen=True)
class Choice:
    """What was chosen at one position, [B] each.

    best int64, the chosen id, never noise; fed int64, what the model should read next; score float32, the
    probability of best among all allowed ids, noise too; noise float32, that of noise (0 for a coordinate).
    """

    best: Tensor
    fed: Tensor
    score: Tensor
    noise: Tensor


@dataclass(frozen=True)
class Sampling:
    """temperature 0 is greedy. top_p: draw among the likeliest of the ids that together reach it."""

    temperature: float = 0.0
    top_p: float = 1.0

    def __post_init__(self):
        if not (self.temperature >= 0 and 0 < self.top_p <= 1):
            raise ValueError(f"temperature {self.temperature}, top-p {self.top_p}: want >= 0 and in (0, 1]")


GREEDY = Sampling()


def nucleus(p: Tensor, top_p: float) -> Tensor:
    """Probabilities [B, R], zero but for the likeliest that reach top_p; equal ones stay together."""
    ordered, _ = p.sort(descending=True)
    reached = (ordered.cumsum(-1) < top_p).sum(-1, keepdim=True).clamp(max=p.shape[-1] - 1)
    return torch.where(p >= ordered.gather(-1, reached), p, 0)


def draw(p: Tensor, uniform: Tensor) -> Tensor:
    """Weights [B, R], uniform [B] in [0, 1) -> int64 [B]: where the running sum exceeds uniform * sum."""
    running = p.cumsum(-1)
    above = (running > uniform[:, None] * running[:, -1:]) & (p > 0)
    return above.int().argmax(-1)


def choose(
    logits: Tensor, first: int, has_noise: bool, noise_feedback: bool, sampling: Sampling, uniform: Tensor
) -> Choice:
    """Logits [B, R] of the ids first, first + 1, ... -> Choice.

    has_noise: the last id is the noise class. It counts in the softmax, but is never chosen; where it is
    likelier than every other, noise_feedback feeds it back. uniform [B]: random numbers for sampling.
    """
    p = torch.softmax(logits, dim=-1)
    real = logits[:, :-1] if has_noise else logits
    if sampling.temperature > 0:
        best = draw(nucleus(torch.softmax(real / sampling.temperature, dim=-1), sampling.top_p), uniform)
    else:
        best = real.argmax(-1)
    noise = p[:, -1] if has_noise else torch.zeros_like(p[:, 0])
    is_noise = noise > p[:, : real.shape[-1]].amax(-1)
    fed = torch.where(is_noise, first + real.shape[-1], first + best) if noise_feedback else first + best
    return Choice(first + best, fed, p.gather(-1, best[:, None])[:, 0], noise)


class Head:
    """`choose` at each slot of a group. allowed: first and last + 1 of the ids of each slot, the last with
    noise."""

    def __init__(
        self, decoder: Gemma, allowed: list[tuple[int, int]], noise_feedback: bool, sampling: Sampling
    ):
        self.decoder, self.allowed = decoder, allowed
        self.noise_feedback, self.sampling = noise_feedback, sampling

    def __call__(self, hidden: Tensor, slot: int, uniform: Tensor) -> Choice:
        """Hidden [B, D], slot 0 to I-1, uniform [B] -> Choice."""
        first, last = self.allowed[slot]
        logits = self.decoder.logits(hidden, first, last)
        has_noise = slot == len(self.allowed) - 1
        return choose(logits, first, has_noise, self.noise_feedback, self.sampling, uniform)
