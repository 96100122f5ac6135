"""Training targets: what the model is taught to answer.

To `detect all classes` (PaliGemma 2 paper, appendix C; Pix2seq, arXiv 2109.10852) that is the image's objects
in random order, then noise boxes up to the number of groups, then eos. A noise box is supervised at its class
token only: it should be recognised as noise, but its random coordinates should not be learned.

Taught in parallel, every object and every noise box is a branch of its own after the prompt, as if it were
the first group of an answer (model/decoding/parallel.py).

Axes: G groups, n objects, T = 5 G + 1 tokens of an answer in sequence; M branches.
"""

from dataclasses import dataclass, fields

import numpy as np

from model.decoding.boxes import boxes_to_locs, iou
from model.decoding.closed_set import GROUP, ClosedSet
from model.io.tokenizer import Tokenizer

MAX_NOISE_IOU = 0.15  # with every real box, if the image leaves room for it


@dataclass(frozen=True)
class Noise:
    """How noise boxes are made and supervised. The defaults are nano's; the published run has 1, 0, 0, True
    and True (train/recipes/coco_closed_set_lora_10b.sh)."""

    weight: float = 0.5  # of a noise group's class token in the loss
    # Share of noise groups that are disguised: their class token, as an input, is a random real class. At
    # inference the best real class is fed back even if noise is likelier, so training should show that too.
    disguise: float = 0.7
    near: float = 0.5  # share of noise boxes near a real one and of similar size; the others are anywhere
    apart: bool = False  # MAX_NOISE_IOU holds between noise boxes as well
    skip_empty: bool = False  # leave out images without objects, whose whole answer is noise
    copies: float = 0.0  # share of noise boxes that are jittered copies of real ones, as in Pix2seq
    boxes: int = 16  # how many, in parallel only; in sequence they fill up an answer
    own: bool = False  # the model draws them from its current weights (train/branches.py)

    def __post_init__(self):
        if not 0 <= self.weight < float("inf"):
            raise ValueError(f"--noise-weight {self.weight}: must be at least 0")
        for name in ("disguise", "near", "copies"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"--noise-{name} {getattr(self, name)}: must lie between 0 and 1")

    def changed(self) -> list[str]:
        """The options of fit.py whose values differ from the defaults."""
        special = {"skip_empty": "--skip-empty", "own": "--noise"}
        names = [field.name for field in fields(self) if getattr(self, field.name) != field.default]
        return [special.get(name, f"--noise-{name}") for name in names]


NANO_NOISE = Noise()


@dataclass
class Target:
    """An answer of T tokens, eos included."""

    tokens: np.ndarray  # int64 [T], the labels
    inputs: np.ndarray  # int64 [T], what the network is fed: the labels, apart from disguised noise
    weights: np.ndarray  # float32 [T], of each label in the loss
    uniform: np.ndarray | None = None  # float32 [G, 5] in [0, 1), if the noise boxes become the model's own


def text_target(tokenizer: Tokenizer, suffix: str) -> Target:
    """The answer `suffix` and eos, every token with weight 1."""
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
    """Boxes [count, 4] without an object: some near a real one and of similar size, the others anywhere.

    grid: round coordinates to multiples of this many pixels. If real boxes are on whole pixels and noise is
    not, the fractions alone give noise away, and its scores mean nothing.
    """
    n, size = (30 if noise.apart else 6) * count, np.array([width, height])  # n candidates, to choose from
    sides = size * np.exp(rng.uniform(np.log(0.08), np.log(0.7), (n, 2)))
    centres = rng.uniform(0, 1, (n, 2)) * size
    if len(real):
        near = rng.random((n, 1)) < noise.near
        example = real[rng.integers(0, len(real), n)]
        example_sides = (example[:, 2:] - example[:, :2]) * rng.uniform(0.6, 1.5, (n, 2))
        sides = np.where(near, example_sides, sides)
        shifted = (example[:, 2:] + example[:, :2]) / 2 + rng.uniform(-1.2, 1.2, (n, 2)) * example_sides
        centres = np.where(near, shifted, centres)
    boxes = np.concatenate((centres - sides / 2, centres + sides / 2), axis=1)  # [n, 4]
    copied = rng.random(n) < noise.copies if len(real) and noise.copies else np.zeros(n, bool)
    if copied.any():
        # Every edge moves by up to a fifth of the box's side.
        example = real[rng.integers(0, len(real), copied.sum())]
        moves = rng.uniform(-0.2, 0.2, example.shape) * np.tile(example[:, 2:] - example[:, :2], 2)
        boxes[copied] = example + moves
    if grid:
        boxes = np.round(boxes / grid) * grid
    boxes = boxes.clip(0, np.tile(size, 2))
    too_thin = (boxes[:, 2:] - boxes[:, :2]).min(1) < max(grid, 1) * 3
    overlap = iou(boxes, real).max(1) if len(real) else np.zeros(n)
    # In a full image no candidate may keep MAX_NOISE_IOU: then those with the least overlap are taken.
    badness = np.where((overlap <= MAX_NOISE_IOU) | copied, 0.0, overlap) + 2.0 * too_thin
    if noise.apart:
        return boxes[_choose_apart(boxes, badness, count)]
    return boxes[np.argsort(badness, kind="stable")[:count]]


def _choose_apart(boxes: np.ndarray, badness: np.ndarray, count: int) -> list[int]:
    """The rows of `count` boxes, the least bad first. Overlap with those already chosen makes a box worse."""
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
    """Boxes [n, 4] in pixels and labels [n] -> target. Of more than G objects a random G are kept. grid: see
    noise_boxes."""
    order = rng.permutation(len(boxes))[: language.groups]
    boxes = np.asarray(boxes, np.float64).reshape(-1, 4)
    real, labels = boxes[order], np.asarray(labels)[order]
    n, missing = len(real), language.groups - len(real)
    filler = noise_boxes(rng, boxes, missing, width, height, grid, noise)
    groups = np.empty((language.groups, GROUP), np.int64)  # y0, x0, y1, x1, class
    groups[:, :4] = language.loc0 + boxes_to_locs(np.concatenate((real, filler)), width, height)
    groups[:n, 4] = language.class0 + labels
    groups[n:, 4] = language.noise
    weights = np.ones(groups.shape, np.float32)
    weights[n:, :4] = 0
    weights[n:, 4] = noise.weight
    inputs = groups.copy()
    disguised = rng.random(missing) < noise.disguise
    random_classes = language.class0 + rng.integers(0, len(language.classes), missing)
    inputs[n:, 4] = np.where(disguised, random_classes, language.noise)
    return Target(
        tokens=np.append(groups, language.eos),
        inputs=np.append(inputs, language.eos),
        weights=np.append(weights, np.float32(1)),
        uniform=rng.random(groups.shape, np.float32) if noise.own else None,
    )


@dataclass
class BranchTarget:
    """What is taught about an image in branches. A row is y0, x0, y1, x1 as bins and the class number, where
    the number of classes stands for noise."""

    objects: np.ndarray  # int64 [n, 5], all of the image: what the model's own boxes are compared with
    branches: np.ndarray  # int64 [M, 5], objects first, then made-up noise
    weights: np.ndarray  # float32 [M, 5], of each token of them in the loss
    own_weights: np.ndarray  # float32 [K], of the classes of K boxes that the model draws itself
    uniform: np.ndarray  # float32 [K, 4] in [0, 1), from which it draws them


def branch_target(
    rng: np.random.Generator,
    boxes: np.ndarray,
    labels: np.ndarray,
    width: float,
    height: float,
    language: ClosedSet,
    limit: int,
    grid: float = 0,
    noise: Noise = NANO_NOISE,
) -> BranchTarget:
    """Boxes [n, 4] in pixels and labels [n] -> target. Of more than `limit` objects a random `limit` are
    taught. grid: see noise_boxes."""
    order = rng.permutation(len(boxes))
    boxes = np.asarray(boxes, np.float64).reshape(-1, 4)[order]
    objects = np.column_stack((boxes_to_locs(boxes, width, height), np.asarray(labels, np.int64)[order]))
    own, made_up = (noise.boxes, 0) if noise.own else (0, noise.boxes)
    filler = noise_boxes(rng, boxes, made_up, width, height, grid, noise)
    no_class = np.full(made_up, len(language.classes), np.int64)
    filler = np.column_stack((boxes_to_locs(filler, width, height), no_class))
    taught = objects[:limit]
    weights = np.ones((len(taught) + made_up, GROUP), np.float32)
    weights[len(taught) :] = 0, 0, 0, 0, noise.weight
    return BranchTarget(
        objects=objects,
        branches=np.concatenate((taught, filler)),
        weights=weights,
        own_weights=np.full(own, noise.weight, np.float32),
        uniform=rng.random((own, GROUP - 1), np.float32),
    )
