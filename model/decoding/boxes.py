"""Boxes: pixels <-> location tokens, areas, overlaps, suppression, and boxes in text answers.

A box is x0, y0, x1, y1 in pixels from the image's top left corner. Its location tokens are y0, x0, y1, x1 in
1/1024 of the image's height and width.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from model.io.tokenizer import LOC_PATTERN, LOCS, SEGS

MASK_CODES = 16  # segmentation tokens of a mask
VOTE_IOU = 0.65  # boxes of a class that overlap so much have found the same object
_OBJECT = re.compile(rf"((?:{LOC_PATTERN}\s*){{4}})((?:<seg[0-9]{{3}}>\s*)*)([^;<>]*)")


def boxes_to_locs(boxes: np.ndarray, width: float, height: float) -> np.ndarray:
    """Pixel boxes [n, 4] -> locations int64 [n, 4], y0, x0, y1, x1 in 0..1023."""
    scale = np.array([width, height, width, height], dtype=np.float64)
    bins = np.round(np.asarray(boxes, dtype=np.float64).reshape(-1, 4) * LOCS / scale)
    # The far edge would be bin 1024, which no token stands for: it shares the last one.
    return bins.clip(0, LOCS - 1).astype(np.int64)[:, [1, 0, 3, 2]]


def locs_to_boxes(locs: np.ndarray, width: float, height: float, bins: int = LOCS) -> np.ndarray:
    """Locations [..., 4] -> float64 pixel boxes [..., 4]; the last bin stands for the edge.

    bins: 1023 for checkpoints of big_vision's RefCOCO recipe, which multiplies fractions by 1023.
    """
    locs = np.asarray(locs, dtype=np.float64)[..., [1, 0, 3, 2]]
    fractions = np.where(locs == LOCS - 1, 1.0, locs / bins)
    return fractions * np.array([width, height, width, height])


def areas(boxes: np.ndarray) -> np.ndarray:
    """Boxes [..., 4] -> areas [...]; 0 if a box ends before it begins."""
    return np.maximum(boxes[..., 2:] - boxes[..., :2], 0).prod(-1)


def iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Intersection over union of every pair: [n, 4], [m, 4] -> [n, m]."""
    corners = np.maximum(a[:, None, :2], b[None, :, :2]), np.minimum(a[:, None, 2:], b[None, :, 2:])
    shared = areas(np.concatenate(corners, axis=-1))
    return shared / np.maximum(areas(a)[:, None] + areas(b)[None] - shared, 1e-9)


def nms(boxes: np.ndarray, scores: np.ndarray, labels: np.ndarray, threshold: float) -> np.ndarray:
    """Non-maximum suppression within each class: boxes [n, 4], scores and labels [n] -> the indices that are
    kept, int64 [k], best first. A threshold (IoU) of 1 or more keeps all."""
    order = np.argsort(-scores, kind="stable")
    kept: list[int] = []
    overlaps = iou(boxes, boxes)
    for i in order:
        if all(labels[i] != labels[j] or overlaps[i, j] <= threshold for j in kept):
            kept.append(int(i))
    return np.array(kept, dtype=np.int64)


def vote(boxes: np.ndarray, scores: np.ndarray, labels: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Move each kept box to the mean of all boxes that found the same object (box voting, arXiv 1505.01749).

    boxes [n, 4], scores and labels [n], kept int64 [k] (of `nms`) -> [k, 4]. A box is weighted by its odds of
    being right, p / (1 - p).
    """
    same = (labels[kept, None] == labels) & (iou(boxes[kept], boxes) >= VOTE_IOU)
    weights = same * (scores / np.maximum(1 - scores, 1e-6))
    weights[np.arange(len(kept)), kept] += 1e-9  # the box itself, should its score be 0
    return weights @ boxes / weights.sum(1, keepdims=True)


@dataclass(frozen=True)
class ParsedBox:
    """An object of a text answer."""

    locs: tuple[int, ...]  # y0, x0, y1, x1 in 0..1023
    seg: tuple[int, ...]  # the 16 codes of its mask in 0..127, or ()
    label: str  # "" where the answer has none
    # First and last + 1 character, in the answer, of the label, or of the whole object if it has no label.
    span: tuple[int, int] = field(default=(0, 0), compare=False)


def parse_answer(text: str) -> list[ParsedBox]:
    """The objects of "<loc0000><loc0000><loc0512><loc1023> traffic light ; <loc...", in order.

    Answers are imperfect. Text around four locations is ignored, and so are fewer than four. A mask with
    fewer than 16 codes, or with one that does not exist, is dropped, as are codes after the sixteenth. A box
    may end before it begins: callers must check its area.
    """
    found = []
    for match in _OBJECT.finditer(text):
        locs, seg, label = match.groups()
        quadruple = tuple(int(loc) for loc in re.findall("[0-9]{4}", locs))
        codes = tuple(int(code) for code in re.findall("[0-9]{3}", seg))
        complete = len(codes) >= MASK_CODES and max(codes) < SEGS
        start = match.start(3) + len(label) - len(label.lstrip())
        span = (start, start + len(label.strip())) if label.strip() else match.span()
        found.append(ParsedBox(quadruple, codes[:MASK_CODES] if complete else (), label.strip(), span))
    return found


def box_prompt(names: Sequence[str], masks: bool = False) -> str:
    """The prompt that asks for the boxes of some classes, "detect cat ; traffic light", or for their masks,
    "segment cat"."""
    return ("segment " if masks else "detect ") + " ; ".join(names)


def check_label(label: str) -> None:
    """Refuse a label that parse_answer could not read back."""
    if re.search("[;<>]", label):
        raise ValueError(f"the label {label!r} has one of ; < > in it, with which answers are written")


def format_answer(
    boxes: np.ndarray, labels: Sequence[str], width: float, height: float, codes: np.ndarray | None = None
) -> str:
    """Pixel boxes [n, 4], n labels and, for segmentation, codes [n, 16] -> text that parse_answer reads."""
    parts = []
    codes = np.empty((len(labels), 0), int) if codes is None else codes
    rows = zip(boxes_to_locs(boxes, width, height).tolist(), codes.tolist(), labels, strict=True)
    for locs, seg, label in rows:
        check_label(label)
        special = [f"<loc{loc:04d}>" for loc in locs] + [f"<seg{code:03d}>" for code in seg]
        parts.append(("".join(special) + f" {label}").rstrip())
    return " ; ".join(parts)
