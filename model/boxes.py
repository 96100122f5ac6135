"""Boxes: pixels <-> location tokens, areas, overlaps, suppression.

A box is x0, y0, x1, y1 in pixels from the top left; a location quadruple is y0, x0, y1, x1 in 1/1024 of the
image's sides.
"""

import numpy as np

BINS = 1024


def boxes_to_locs(boxes: np.ndarray, width: float, height: float) -> np.ndarray:
    """Pixel boxes [n, 4] -> int64 [n, 4], y0, x0, y1, x1 in 0..1023: the edge itself gets bin 1023."""
    scale = np.array([width, height, width, height], dtype=np.float64)
    bins = np.round(np.asarray(boxes, dtype=np.float64).reshape(-1, 4) * BINS / scale)
    return bins.clip(0, BINS - 1).astype(np.int64)[:, [1, 0, 3, 2]]


def locs_to_boxes(locs: np.ndarray, width: float, height: float) -> np.ndarray:
    """Location quadruples [..., 4] -> float64 pixel boxes [..., 4]; the last bin stands for the edge."""
    locs = np.asarray(locs, dtype=np.float64)[..., [1, 0, 3, 2]]
    fractions = np.where(locs == BINS - 1, 1.0, locs / BINS)
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
