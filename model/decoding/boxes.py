"""Boxes: pixels <-> location tokens, areas, overlaps, suppression, boxes in text.

A box is x0, y0, x1, y1 in pixels from the top left; a location quadruple is y0, x0, y1, x1 in 1/1024 of the
image's sides.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

BINS = 1024
_LOC = r"<loc(?:0[0-9]{3}|10[01][0-9]|102[0-3])>"
_OBJECT = re.compile(rf"((?:{_LOC}\s*){{4}})((?:<seg[0-9]{{3}}>\s*)*)([^;<>]*)")


def boxes_to_locs(boxes: np.ndarray, width: float, height: float) -> np.ndarray:
    """Pixel boxes [n, 4] -> int64 [n, 4], y0, x0, y1, x1 in 0..1023: the edge itself gets bin 1023."""
    scale = np.array([width, height, width, height], dtype=np.float64)
    bins = np.round(np.asarray(boxes, dtype=np.float64).reshape(-1, 4) * BINS / scale)
    return bins.clip(0, BINS - 1).astype(np.int64)[:, [1, 0, 3, 2]]


def locs_to_boxes(locs: np.ndarray, width: float, height: float, bins: int = BINS) -> np.ndarray:
    """Location quadruples [..., 4] -> float64 pixel boxes [..., 4]; the last bin stands for the edge.

    bins: 1023 for checkpoints of big_vision's RefCOCO recipe, which makes locations from fractions by 1023.
    """
    locs = np.asarray(locs, dtype=np.float64)[..., [1, 0, 3, 2]]
    fractions = np.where(locs == BINS - 1, 1.0, locs / bins)
    return fractions * np.array([width, height, width, height])


def areas(boxes: np.ndarray) -> np.ndarray:
    """[..., 4] -> [...]; a box that is turned inside out has area 0."""
    return np.maximum(boxes[..., 2:] - boxes[..., :2], 0).prod(-1)


def iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Intersection over union of every pair: [n, 4], [m, 4] -> [n, m]."""
    corners = np.maximum(a[:, None, :2], b[None, :, :2]), np.minimum(a[:, None, 2:], b[None, :, 2:])
    shared = areas(np.concatenate(corners, axis=-1))
    return shared / np.maximum(areas(a)[:, None] + areas(b)[None] - shared, 1e-9)


def nms(boxes: np.ndarray, scores: np.ndarray, labels: np.ndarray, threshold: float) -> np.ndarray:
    """Per-class non-maximum suppression: indices kept, best first. A threshold of 1 or more keeps all."""
    order = np.argsort(-scores, kind="stable")
    kept: list[int] = []
    overlaps = iou(boxes, boxes)
    for i in order:
        if all(labels[i] != labels[j] or overlaps[i, j] <= threshold for j in kept):
            kept.append(int(i))
    return np.array(kept, dtype=np.int64)


@dataclass(frozen=True)
class ParsedBox:
    """An object of a text answer."""

    locs: tuple[int, ...]  # y0, x0, y1, x1 in 0..1023
    seg: tuple[int, ...]  # the 16 codes of its mask in 0..127, or nothing
    label: str  # "" where the answer has none
    span: tuple[int, int] = field(default=(0, 0), compare=False)  # of the label in the text, or of the object


def parse_answer(text: str) -> list[ParsedBox]:
    """The objects of "<loc0000><loc0000><loc0512><loc1023> traffic light ; <loc...", in order.

    Answers are imperfect: anything around four locations is passed over, fewer than four are dropped, and so
    are the codes of an unfinished mask, and those behind the sixteenth. Boxes may be turned inside out.
    """
    found = []
    for match in _OBJECT.finditer(text):
        locs, seg, label = match.groups()
        codes = tuple(int(code) for code in re.findall("[0-9]{3}", seg))
        whole = len(codes) >= 16 and max(codes) < 128
        quadruple = tuple(int(loc) for loc in re.findall("[0-9]{4}", locs))
        start = match.start(3) + len(label) - len(label.lstrip())
        span = (start, start + len(label.strip())) if label.strip() else match.span()
        found.append(ParsedBox(quadruple, codes[:16] if whole else (), label.strip(), span))
    return found


def box_prompt(names: Sequence[str], masks: bool = False) -> str:
    """What asks for the boxes of some classes, "detect cat ; traffic light"; with masks, "segment cat"."""
    return ("segment " if masks else "detect ") + " ; ".join(names)


def check_label(label: str) -> None:
    """Raises ValueError for a label that would not come back from an answer."""
    if re.search("[;<>]", label):
        raise ValueError(f"label {label!r} cannot be written into an answer: it has one of ; < > in it")


def format_answer(
    boxes: np.ndarray,
    labels: Sequence[str],
    width: float,
    height: float,
    codes: np.ndarray | None = None,
) -> str:
    """Pixel boxes [n, 4], n labels and, of segmentation, codes [n, 16] -> the text that parse_answer reads.

    Never writes <loc1024>. Raises ValueError as check_label does.
    """
    parts = []
    codes = np.empty((len(labels), 0), int) if codes is None else codes
    rows = zip(boxes_to_locs(boxes, width, height).tolist(), codes.tolist(), labels, strict=True)
    for locs, seg, label in rows:
        check_label(label)
        special = [f"<loc{loc:04d}>" for loc in locs] + [f"<seg{code:03d}>" for code in seg]
        parts.append(("".join(special) + f" {label}").rstrip())
    return " ; ".join(parts)
