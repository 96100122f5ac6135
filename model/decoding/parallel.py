"""All boxes in five steps: the closed-set language read in branches instead of one group after the other.

The objects of an image are taught in random order, so the first location token is drawn from a mixture over
all objects, the second from a mixture over the objects that share that y0, and so on: the first group alone
is a density over boxes, p(y0) p(x0 | y0) p(y1 | ...) p(x1 | ...) p(class | box). Its peaks are the objects. K
branches after one prompt follow K of them at once:

    prompt -> y0 a -> x0 c -> y1 -> x1 -> class         K peaks of y0, then the K best pairs of y0 and x0:
                  `-> x0 d -> y1 -> x1 -> class         a y0 may have several x0, or none
           `> y0 b -> x0 e -> y1 -> x1 -> class

Each step feeds K tokens at the same position. They lie next to each other in the cache, where each reads the
prompt and its own ancestors (attention.branch_mask): nothing in the cache is copied. Where decoding is bound
by reading the weights, K branches cost hardly more than one, so five steps do the work of 255.

Axes: B batch, K branches, M rows of probabilities, R = 1,024 coordinates, S slots of the cache, D width.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from model.decoding.closed_set import GROUP, Answer, ClosedSet, Head, capture_graph
from model.decoding.generate import GREEDY
from model.io.tokenizer import LOCS
from model.paligemma import PaliGemma

COORDINATES = GROUP - 1  # tokens of a branch that are fed back: y0, x0, y1, x1


@dataclass(frozen=True)
class Reading:
    """How peaks are found and ranked. Decided on the practice set's development scenes (infer/README.md)."""

    radius: int = 16  # bins on each side of a peak that belong to it: 16 are two of nano's pixels
    x0_peaks: int = 6  # for each y0, at most
    mass_power: float = 0.1  # a box's score is its class's probability * (mass of y0 and x0) ** mass_power


def peaks(p: Tensor, count: int, radius: int) -> tuple[Tensor, Tensor]:
    """Probabilities [M, R] -> the bins int64 [M, count] of the largest peaks, and their masses [M, count].

    A peak is the window of `radius` bins on each side that holds most; its bin is the window's mean, which is
    nearer to the edge than the likeliest bin. It is taken out before the next one is looked for.
    """
    bins, found = torch.arange(p.shape[-1], device=p.device), []
    for _ in range(count):
        summed = F.pad(p, (radius + 1, radius)).cumsum(-1)
        held = summed[:, 2 * radius + 1 :] - summed[:, : -2 * radius - 1]  # [M, R]: by the window at each bin
        inside = (bins - held.argmax(-1, keepdim=True)).abs() <= radius  # [M, R]
        peak = p * inside
        mass = peak.sum(-1)
        mean = ((peak * bins).sum(-1) / mass).nan_to_num()  # nothing is left: any bin will do
        found.append((mean.round().long(), mass))
        p = p.masked_fill(inside, 0)
    at, mass = zip(*found)
    return torch.stack(at, dim=1), torch.stack(mass, dim=1)


def calibrated(scores: Tensor, calibration: tuple[float, float, float] | None) -> Tensor:
    """Scores -> the shares of boxes with such scores that are right: PaliGemmaConfig.calibration.

    The class's probability is taught to be the share of COCO's ten IoU thresholds that a box passes, and is
    lowered by the mass: it ranks boxes well, but more of them are right at the usual IoU of 0.5. The form is
    beta calibration (Kull and others, AISTATS 2017); infer/calibrate.py fits it.
    """
    if calibration is None:
        return scores
    a, b, c = calibration
    scores = scores.clamp(1e-6, 1 - 1e-6)
    return torch.sigmoid(a * scores.log() - b * torch.log1p(-scores) + c)


class ParallelDecoder:
    """Decodes the answers to batches of images in branches. It is used like closed_set.GroupDecoder; the
    groups of its answers are the K branches, best first."""

    def __init__(
        self,
        model: PaliGemma,
        language: ClosedSet,
        branches: int | None = None,
        reading: Reading | None = None,
        head: type = Head,
    ):
        """branches: K; None: as the config says. head: chooses the classes; see GroupDecoder."""
        self.model, self.language, self.groups = model, language, branches or model.config.branches
        self.reading = reading or Reading()
        self.calibration = model.config.calibration
        allowed = [language.allowed(slot) for slot in range(GROUP)]
        self.head = head(model.decoder, allowed, noise_feedback=False, sampling=GREEDY)
        self.prefix = model.config.vision.tokens + len(language.prompt)  # slots before the branches
        self.batch_size = None

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Answer:
        """Images [B, 3, S, S] -> Answer with K groups an image."""
        with torch.cuda.device_of(images):  # streams, the graph and kernels go to the images' GPU
            if self.batch_size != len(images):
                self._prepare(len(images), images.device)
            prompt = torch.tensor(self.language.prompt, device=images.device).expand(len(images), -1)
            self.hidden.copy_(self.model.prefill(self.model.encode(images), prompt, self.cache))
            return Answer(*(x.clone() for x in self.decode_branches()))  # the next replay overwrites them

    def _prepare(self, batch_size: int, device: torch.device) -> None:
        """Allocate all that the five steps read and write; on a GPU, capture them in a graph."""
        self.release()  # see GroupDecoder._prepare
        self.cache = self.model.new_cache(batch_size, len(self.language.prompt) + COORDINATES * self.groups)
        self.hidden = self.model.projector.weight.new_zeros(batch_size, self.model.config.text.width)
        self.uniform = torch.zeros(batch_size * self.groups, device=device)  # the head draws nothing with it
        self.decode_branches = self._decode_branches
        if device.type == "cuda":
            there = torch.ones(batch_size, self.prefix, dtype=torch.bool, device=device)
            self.decode_branches = capture_graph(
                self._decode_branches, prepare=lambda: self.cache.start(there, there.cumsum(-1))
            )
        self.batch_size = batch_size

    def release(self) -> None:
        """Give back the cache and the graph's memory; the next call takes them anew."""
        self.batch_size = self.cache = self.decode_branches = None

    def _decode_branches(self) -> tuple[Tensor, ...]:
        """The fields of Answer, after the prefill."""
        K, radius, x0_peaks = self.groups, self.reading.radius, self.reading.x0_peaks
        B, language = len(self.hidden), self.language
        y0, y0_mass = peaks(self._coordinates(self.hidden), K, radius)  # [B, K]
        roots = torch.arange(K, device=y0.device).expand(B, K)  # are their own parents
        hidden = self._step(y0, roots)  # [B, K, D]

        x0, x0_mass = peaks(self._coordinates(hidden).flatten(0, 1), x0_peaks, radius)  # [B * K, x0_peaks]
        joint = (y0_mass[..., None] * x0_mass.view(B, K, -1)).flatten(1)  # [B, K * x0_peaks]
        mass, pairs = joint.topk(K)  # [B, K]: from here on the branches are the best pairs, best first
        y0_of = pairs // x0_peaks
        locs, parents = [y0.gather(1, y0_of), x0.view(B, -1).gather(1, pairs)], torch.cat((roots, y0_of), 1)
        hidden = self._step(locs[-1], parents)
        for depth in (2, 3):  # y1 and x1: each continues its own branch
            edge, edge_mass = peaks(self._coordinates(hidden).flatten(0, 1), 1, radius)
            mass = mass + 0 * edge_mass.view(B, K)  # NaN shows in the score, as in GroupDecoder
            locs.append(edge.view(B, K))
            parents = torch.cat((parents, roots + (depth - 1) * K), dim=1)
            hidden = self._step(locs[-1], parents)

        choice = self.head(hidden.flatten(0, 1), GROUP - 1, self.uniform)  # [B * K]
        labels = choice.best.view(B, K) - language.class0
        scores = choice.score.view(B, K) * mass**self.reading.mass_power
        scores = calibrated(scores, self.calibration)
        locs = torch.stack(locs, dim=-1)  # [B, K, 4]
        tokens = torch.cat((locs + language.loc0, choice.best.view(B, K, 1)), dim=-1)
        noise, live = choice.noise.view(B, K), torch.ones_like(labels, dtype=torch.bool)
        return tokens, locs, labels, scores, noise, live

    def _coordinates(self, hidden: Tensor) -> Tensor:
        """Hidden [..., D] -> the probabilities [..., R] of the next coordinate."""
        loc0 = self.language.loc0
        return self.model.decoder.logits(hidden, loc0, loc0 + LOCS).softmax(-1)

    def _step(self, bins: Tensor, parents: Tensor) -> Tensor:
        """Feed a coordinate [B, K] to every branch -> hidden states [B, K, D]."""
        return self.model.step_branches(bins + self.language.loc0, parents, self.cache)
