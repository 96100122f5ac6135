"""All boxes in five steps: the closed-set language read in branches instead of one group after the other.

The objects of an image are taught in random order, so the first location token is drawn from a mixture over
all objects, the second from a mixture over the objects that share that y0, and so on: the first group alone
is a density over boxes, p(y0) p(x0 | y0) p(y1 | ...) p(x1 | ...) p(class | box). Its peaks are the objects. K
branches behind one prompt follow K of them at once:

    prompt -> y0 a -> x0 c -> y1 -> x1 -> class         K peaks of y0, then the K best pairs of y0 and x0:
                  \\-> x0 d -> y1 -> x1 -> class         a y0 may have several x0, or none
           -> y0 b -> x0 e -> y1 -> x1 -> class

Each step feeds K tokens at the same position. They lie behind each other in the cache, where each sees the
prompt and its own ancestors (attention.branch_mask): nothing of the cache is copied. Where decoding is bound
by reading the weights, K branches cost hardly more than one, so 255 steps become five.

Axes: B batch, K branches, M rows of probabilities, R = 1,024 coordinates, S slots of the cache, D width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from model.attention import branch_mask, window_mask
from model.decoding.closed_set import GROUP, Answer, ClosedSet
from model.io.tokenizer import LOCS
from model.paligemma import PaliGemma

COORDINATES = GROUP - 1  # tokens of a branch that are fed back: y0, x0, y1, x1


@dataclass(frozen=True)
class Reading:
    """How peaks are found and ranked. Decided on scenes of the practice set's development split."""

    radius: int = 12  # bins on each side of a peak that belong to it: 12 are 1.5 of nano's pixels
    x0_peaks: int = 3  # at most, for each y0
    mass_power: float = 0.1  # score = class probability * (mass of the peaks of y0 and x0) ** mass_power


def peaks(p: Tensor, count: int, radius: int) -> tuple[Tensor, Tensor]:
    """Probabilities [M, R] -> the bins int64 [M, count] of the largest peaks, and their masses [M, count].

    A peak is the likeliest bin with `radius` bins on each side. It is taken out before the next is looked for.
    """
    p, bins = p.clone(), torch.arange(p.shape[-1], device=p.device)
    found = []
    for _ in range(count):
        best = p.argmax(-1, keepdim=True)  # [M, 1]
        near = (bins - best).abs() <= radius  # [M, R]
        found.append((best[:, 0], (p * near).sum(-1)))
        p.masked_fill_(near, 0)
    at, mass = zip(*found)
    return torch.stack(at, dim=1), torch.stack(mass, dim=1)


class ParallelDecoder:
    """Decodes the boxes of batches of images in parallel. Has the form of closed_set.GroupDecoder."""

    def __init__(
        self, model: PaliGemma, language: ClosedSet, branches: int = 24, reading: Reading = Reading()
    ):
        self.model, self.language, self.groups, self.reading = model, language, branches, reading

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Answer:
        """Images [B, 3, S, S] -> Answer with K groups an image, in no particular order."""
        model, language, K, reading = self.model, self.language, self.groups, self.reading
        B = len(images)
        cache = model.new_cache(B, len(language.prompt) + COORDINATES * K)
        prompt = torch.tensor(language.prompt, device=images.device).expand(B, -1)
        hidden = model.prefill(model.encode(images), prompt, cache)  # [B, D]
        prefix = cache.used

        y0, y0_mass = peaks(self._coordinate(hidden), K, reading.radius)  # [B, K]
        parents = torch.arange(K, device=images.device).expand(B, K)  # roots are their own parents
        hidden = self._step(y0, parents, prefix, cache)  # [B, K, D]

        x0, x0_mass = peaks(self._coordinate(hidden).flatten(0, 1), reading.x0_peaks, reading.radius)
        joint = (y0_mass[..., None] * x0_mass.view(B, K, -1)).flatten(1)  # [B, K * x0_peaks]
        mass, pairs = joint.topk(K)  # [B, K]: the branches from here on
        chosen = pairs // reading.x0_peaks  # the y0 of each
        y0, x0 = y0.gather(1, chosen), x0.view(B, -1).gather(1, pairs)
        parents = torch.cat((parents, chosen), dim=1)
        hidden = self._step(x0, parents, prefix, cache)

        locs = [y0, x0]
        for depth in (2, 3):
            locs.append(peaks(self._coordinate(hidden).flatten(0, 1), 1, reading.radius)[0].view(B, K))
            own = torch.arange((depth - 1) * K, depth * K, device=images.device).expand(B, K)
            parents = torch.cat((parents, own), dim=1)
            hidden = self._step(locs[-1], parents, prefix, cache)

        logits = model.decoder.logits(hidden, *language.allowed(GROUP - 1))  # [B, K, classes + 1]
        p = logits.softmax(-1)
        score, labels = p[..., :-1].max(-1)  # noise counts, but is never chosen
        locs = torch.stack(locs, dim=-1)  # [B, K, 4]
        tokens = torch.cat((locs + language.loc0, labels[..., None] + language.class0), dim=-1)
        return Answer(
            tokens=tokens,
            locs=locs,
            labels=labels,
            scores=score * mass**reading.mass_power,
            noise=p[..., -1],
            live=torch.ones_like(labels, dtype=torch.bool),
        )

    def _coordinate(self, hidden: Tensor) -> Tensor:
        """Hidden [..., D] -> the probabilities [..., R] of the next coordinate."""
        loc0 = self.language.loc0
        return self.model.decoder.logits(hidden, loc0, loc0 + LOCS).softmax(-1)

    def _step(self, bins: Tensor, parents: Tensor, prefix: int, cache) -> Tensor:
        """Feed a coordinate [B, K] to each branch -> hidden states [B, K, D].

        parents [B, N]: of all branch tokens so far, these ones last. prefix: the slots before them.
        """
        model, (B, K) = self.model, bins.shape
        positions = cache.extend(K)  # [B, K], all the same
        own = branch_mask(parents)[:, -K:]  # [B, K, N]
        S = cache.valid.shape[1]
        mask = torch.cat((cache.valid[:, None, :prefix].expand(-1, K, -1), own), dim=-1)
        mask = torch.nn.functional.pad(mask, (0, S - mask.shape[-1]))  # [B, K, S]: later slots are not read
        suffix = torch.ones_like(positions, dtype=torch.bool)
        local = window_mask(mask, positions, cache.positions, suffix, model.config.text.sliding_window)
        x = model.decoder.embed_tokens(bins + self.language.loc0)
        return model.decoder(x, positions, (local, mask), cache)
