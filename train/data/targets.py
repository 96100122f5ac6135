"""What the model is taught to answer to `detect all classes` (PaliGemma 2 paper, appendix C; Pix2seq).

The image's objects in random order, then noise boxes up to the number of groups, then eos. A noise box is
supervised at its class token only: the coordinates of real boxes are to be learnt, those of made-up ones are
not.
"""

from dataclasses import dataclass, fields

import numpy as np

from model.decoding.boxes import boxes_to_locs, iou
from model.decoding.closed_set import GROUP, ClosedSet
from model.io.tokenizer import Tokenizer

MAX_NOISE_IOU = 0.15  # with every real box, where the image leaves room for it


@dataclass(frozen=True)
class Noise:
    """How the answer's noise is made and taught. The defaults are nano's; the published run has 1, 0, 0, True
    and True (train/recipes/coco_closed_set_lora_10b.sh)."""

    weight: float = 0.5  # of a noise group's class token in the loss
    # Share of the noise groups whose class token, as an input, is a random real class. At inference the best
    # real class is fed back where noise is likeliest, so that is what the model should see in training.
    disguise: float = 0.7
    near: float = 0.5  # share of the noise boxes near a real one and like it; the others are anywhere
    apart: bool = False  # noise boxes keep MAX_NOISE_IOU from each other as well
    skip_empty: bool = False  # pictures without objects, whose whole answer is noise, are left out

    def __post_init__(self):
        if not 0 <= self.weight < float("inf"):
            raise ValueError(f"--noise-weight {self.weight}: must be at least 0")
        for name in ("disguise", "near"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"--noise-{name} {getattr(self, name)}: must lie between 0 and 1")

    def changed(self) -> list[str]:
        """The options of train.py that set what differs from the defaults."""
        names = [field.name for field in fields(self) if getattr(self, field.name) != field.default]
        return ["--skip-empty" if name == "skip_empty" else f"--noise-{name}" for name in names]


NANO_NOISE = Noise()


@dataclass
class Target:
    """One image's answer of T = 5 G + 1 tokens: the labels, what is fed, and the weights of the loss."""

    tokens: np.ndarray  # int64 [T]
    inputs: np.ndarray  # int64 [T]
    weights: np.ndarray  # float32 [T]


def text_target(tokenizer: Tokenizer, suffix: str) -> Target:
    """The answer `suffix` and eos, all of it supervised."""
    tokens = np.array([*tokenizer.encode(suffix), tokenizer.eos], np.int64)
    return Target(tokens, tokens, np.ones(len(tokens), np.float32))


def noise_boxes(
    rng: np.random.Generator,
    real: np.ndarray,
    count: int,
    width: float,
    height: float,
    grid: float = 0,
    noise: Noise = NANO_NOISE,
) -> np.ndarray:
    """Boxes [count, 4] that hold no object: some of them near a real one and like it, the others anywhere.

    grid: round to multiples of so many pixels. Real boxes on whole pixels would otherwise differ from noise
    by arithmetic.
    """
    n, size = (30 if noise.apart else 6) * count, np.array([width, height])  # candidates
    sides = size * np.exp(rng.uniform(np.log(0.08), np.log(0.7), (n, 2)))
    centres = rng.uniform(0, 1, (n, 2)) * size
    if len(real):
        near = rng.random(n) < noise.near
        like = real[rng.integers(0, len(real), n)]
        like_sides = (like[:, 2:] - like[:, :2]) * rng.uniform(0.6, 1.5, (n, 2))
        sides = np.where(near[:, None], like_sides, sides)
        shifted = (like[:, 2:] + like[:, :2]) / 2 + rng.uniform(-1.2, 1.2, (n, 2)) * like_sides
        centres = np.where(near[:, None], shifted, centres)
    boxes = np.concatenate((centres - sides / 2, centres + sides / 2), axis=1)
    if grid:
        boxes = np.round(boxes / grid) * grid
    boxes = boxes.clip(0, np.tile(size, 2))
    flat = (boxes[:, 2:] - boxes[:, :2]).min(1) < max(grid, 1) * 3
    overlap = iou(boxes, real).max(1) if len(real) else np.zeros(n)
    badness = np.where(overlap <= MAX_NOISE_IOU, 0.0, overlap) + 2.0 * flat
    return boxes[_apart(boxes, badness, count) if noise.apart else np.argsort(badness, kind="stable")[:count]]


def _apart(boxes: np.ndarray, badness: np.ndarray, count: int) -> list[int]:
    """Which `count` boxes to take, the best one first: each box taken is an obstacle to those after it."""
    taken = []
    for _ in range(count):
        taken.append(int(badness.argmin()))
        overlap = iou(boxes, boxes[taken[-1:]])[:, 0]
        badness = np.maximum(badness, np.where(overlap <= MAX_NOISE_IOU, 0.0, overlap))
        badness[taken[-1]] = np.inf
    return taken


def closed_set_target(
    rng: np.random.Generator,
    boxes: np.ndarray,
    labels: np.ndarray,
    width: float,
    height: float,
    language: ClosedSet,
    grid: float = 0,
    noise: Noise = NANO_NOISE,
) -> Target:
    """Pixel boxes [n, 4] and labels [n] -> target; of more than G objects, G are drawn."""
    order = rng.permutation(len(boxes))[: language.groups]
    boxes = np.asarray(boxes, np.float64).reshape(-1, 4)
    real, labels = boxes[order], np.asarray(labels)[order]
    n, missing = len(real), language.groups - len(real)
    made_up = noise_boxes(rng, boxes, missing, width, height, grid, noise)
    groups = np.empty((language.groups, GROUP), np.int64)
    groups[:, :4] = language.loc0 + boxes_to_locs(np.concatenate((real, made_up)), width, height)
    groups[:n, 4] = language.class0 + labels
    groups[n:, 4] = language.noise
    weights = np.ones(groups.shape, np.float32)
    weights[n:, :4] = 0
    weights[n:, 4] = noise.weight
    inputs = groups.copy()
    disguised = rng.random(missing) < noise.disguise
    random_classes = language.class0 + rng.integers(0, len(language.classes), missing)
    inputs[n:, 4] = np.where(disguised, random_classes, language.noise)
    tail = np.array([language.eos])
    return Target(
        np.concatenate((groups.ravel(), tail)),
        np.concatenate((inputs.ravel(), tail)),
        np.concatenate((weights.ravel(), np.ones(1, np.float32))),
    )
