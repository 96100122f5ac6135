"""What the model is taught to answer to `detect all classes` (PaliGemma 2 paper, appendix C; Pix2seq).

The image's objects in random order, then noise boxes up to the number of groups, then eos. A noise box is
supervised at its class token only: the coordinates of real boxes are to be learnt, those of made-up ones are
not.
"""

from dataclasses import dataclass

import numpy as np

from model.decoding.boxes import boxes_to_locs, iou
from model.decoding.closed_set import GROUP, ClosedSet
from model.io.tokenizer import Tokenizer

MAX_NOISE_IOU = 0.15  # with every real box, where the image leaves room for it
NOISE_WEIGHT = 0.5  # of a noise group's class token in the loss
DISGUISE = 0.7  # share of noise groups whose class token, as an input, is a random real class


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
    rng: np.random.Generator, real: np.ndarray, count: int, width: float, height: float, grid: float = 0
) -> np.ndarray:
    """Boxes [count, 4] that hold no object: half of them near a real one and like it, half anywhere.

    grid: round to multiples of so many pixels. Real boxes on whole pixels would otherwise differ from noise
    by arithmetic.
    """
    n, size = 6 * count, np.array([width, height])
    sides = size * np.exp(rng.uniform(np.log(0.08), np.log(0.7), (n, 2)))
    centres = rng.uniform(0, 1, (n, 2)) * size
    if len(real):
        near = rng.random(n) < 0.5
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
    return boxes[np.argsort(badness, kind="stable")[:count]]


def closed_set_target(
    rng: np.random.Generator,
    boxes: np.ndarray,
    labels: np.ndarray,
    width: float,
    height: float,
    language: ClosedSet,
    grid: float = 0,
) -> Target:
    """Pixel boxes [n, 4] and labels [n] -> target; of more than G objects, G are drawn."""
    order = rng.permutation(len(boxes))[: language.groups]
    real, labels = np.asarray(boxes, np.float64).reshape(-1, 4)[order], np.asarray(labels)[order]
    n, missing = len(real), language.groups - len(real)
    made_up = noise_boxes(rng, np.asarray(boxes, np.float64).reshape(-1, 4), missing, width, height, grid)
    groups = np.empty((language.groups, GROUP), np.int64)
    groups[:, :4] = language.loc0 + boxes_to_locs(np.concatenate((real, made_up)), width, height)
    groups[:n, 4] = language.class0 + labels
    groups[n:, 4] = language.noise
    weights = np.ones(groups.shape, np.float32)
    weights[n:, :4] = 0
    weights[n:, 4] = NOISE_WEIGHT
    inputs = groups.copy()
    disguised = rng.random(missing) < DISGUISE
    random_classes = language.class0 + rng.integers(0, len(language.classes), missing)
    inputs[n:, 4] = np.where(disguised, random_classes, language.noise)
    tail = np.array([language.eos])
    return Target(
        np.concatenate((groups.ravel(), tail)),
        np.concatenate((inputs.ravel(), tail)),
        np.concatenate((weights.ravel(), np.ones(1, np.float32))),
    )
