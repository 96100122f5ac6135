"""Boxes: pixels <-> location tokens and back, areas, overlaps, suppression, each against a slow loop."""

import numpy as np
import pytest
from helpers import slow_iou

from model.decoding.boxes import (
    ParsedBox,
    areas,
    boxes_to_locs,
    format_answer,
    iou,
    locs_to_boxes,
    nms,
    parse_answer,
    vote,
)
from model.io.tokenizer import LOCS

SIZES = [(1024, 1024), (128, 128), (640, 480), (333, 517), (1, 1), (5000, 3), (0.5, 2000.5)]


def random_boxes(rng, n, width=100.0, height=100.0, whole=False):
    """[n, 4] of x0, y0, x1, y1 in order; whole: on whole pixels, so that overlaps of exactly 1/2 occur."""
    points = rng.random((n, 2, 2)) * (width, height)
    boxes = np.concatenate((points.min(1), points.max(1)), axis=1)
    return boxes.round() if whole else boxes


# Location tokens --------------------------------------------------------------------------------------------


def test_order():
    """Pixels are x0, y0, x1, y1; tokens are y0, x0, y1, x1, in 1/1024 of height and width."""
    assert boxes_to_locs(np.array([[50, 20, 150, 30]]), 200, 40).tolist() == [[512, 256, 768, 768]]
    assert locs_to_boxes(np.array([[512, 256, 768, 768]]), 200, 40).tolist() == [[50, 20, 150, 30]]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_pixels_and_back(size):
    """Within half a bin; in the last bin, which stands for the edge, within one and a half."""
    rng = np.random.default_rng(0)
    boxes = random_boxes(rng, 4000, *size)
    boxes[:8] *= 0
    boxes[8:16] = [*size, *size]
    locs = boxes_to_locs(boxes, *size)
    assert locs.dtype == np.int64 and locs.shape == boxes.shape
    bin_size = np.array([*size, *size]) / LOCS
    error = np.abs(locs_to_boxes(locs, *size) - boxes) / bin_size
    last = (locs == LOCS - 1)[:, [1, 0, 3, 2]]
    assert last.any() and (error[~last] <= 0.5 + 1e-9).all() and (error[last] <= 1.5 + 1e-9).all()
    edge = boxes == [*size, *size]
    assert edge.any() and (error[edge] == 0).all()


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_tokens_and_back(size):
    """Every location comes back as itself."""
    bins = np.arange(LOCS)
    locs = np.stack((bins, bins[::-1], np.roll(bins, 1), np.roll(bins, -7)), axis=1)
    assert (boxes_to_locs(locs_to_boxes(locs, *size), *size) == locs).all()


def test_never_1024():
    """A box at or beyond the edge gets the last bin, or the first; there is no <loc1024>."""
    boxes = np.array(
        [[0, 0, 100, 50], [-20, -1, 100.01, 50.01], [99.99, 49.99, 1e9, 1e9], [-1e9, -9, -5, -1]]
    )
    locs = boxes_to_locs(boxes, 100, 50)
    assert locs.tolist() == [[0, 0, 1023, 1023], [0, 0, 1023, 1023], [1023] * 4, [0] * 4]
    assert locs_to_boxes(locs, 100, 50)[0].tolist() == [0, 0, 100, 50]


def test_shapes():
    """No boxes are no error; batches of quadruples keep their shape; float32 loses nothing."""
    assert boxes_to_locs(np.zeros((0, 4)), 10, 10).shape == (0, 4)
    assert boxes_to_locs([], 10, 10).shape == (0, 4)
    assert locs_to_boxes(np.zeros((2, 3, 4), int), 10, 10).shape == (2, 3, 4)
    boxes = random_boxes(np.random.default_rng(1), 50, whole=True)
    assert (boxes_to_locs(boxes.astype(np.float32), 128, 128) == boxes_to_locs(boxes, 128, 128)).all()


# Arithmetic -------------------------------------------------------------------------------------------------


def test_areas():
    boxes = np.array([[1, 2, 4, 6], [4, 2, 1, 6], [1, 6, 4, 2], [4, 6, 1, 2], [3, 3, 3, 9]])
    assert areas(boxes).tolist() == [12, 0, 0, 0, 0]
    assert areas(np.zeros((2, 3, 4))).shape == (2, 3)


@pytest.mark.parametrize("whole", [False, True], ids=["any", "whole pixels"])
def test_iou(whole):
    rng = np.random.default_rng(2)
    a, b = random_boxes(rng, 30, whole=whole), random_boxes(rng, 20, whole=whole)
    b[:5] = a[:5]
    slow = np.array([[slow_iou(x, y) for y in b] for x in a])
    assert np.allclose(iou(a, b), slow, atol=1e-12) and (slow > 0).any() and (slow == 0).any()
    assert np.allclose(np.diag(iou(a, b))[:5], 1)


def test_iou_of_nothing():
    """Empty boxes overlap with nothing, themselves included, and there may be none."""
    boxes = np.array([[1.0, 1, 1, 5], [0, 0, 4, 4], [5, 5, 3, 3], [9, 9, 9, 9]])
    assert iou(boxes, boxes).tolist() == np.diag([0.0, 1, 0, 0]).tolist()
    assert iou(boxes, np.zeros((0, 4))).shape == (4, 0) and iou(np.zeros((0, 4)), boxes).shape == (0, 4)


# Suppression ------------------------------------------------------------------------------------------------


def slow_nms(boxes, scores, labels, threshold):
    """Take the best that is left, the first among equals; strike out what it suppresses; again."""
    left, kept = list(range(len(boxes))), []
    while left:
        best = max(left, key=lambda i: (scores[i], -i))
        kept.append(best)
        left = [
            i
            for i in left
            if i != best and (labels[i] != labels[best] or slow_iou(boxes[i], boxes[best]) <= threshold)
        ]
    return kept


@pytest.mark.parametrize("threshold", [0.0, 0.1, 0.5, 0.7, 1.0])
def test_nms(threshold):
    """Random scenes of few classes, many overlaps and tied scores."""
    suppressed = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        n = int(rng.integers(0, 25))
        boxes = random_boxes(rng, n, 12, 12, whole=seed % 2 == 0)
        boxes[n // 2 :] = boxes[: n - n // 2]  # twins
        scores, labels = rng.integers(0, 6, n) / 5, rng.integers(0, 3, n)
        kept = nms(boxes, scores, labels, threshold)
        assert kept.dtype == np.int64 and kept.tolist() == slow_nms(boxes, scores, labels, threshold)
        assert (np.diff(scores[kept]) <= 0).all()
        suppressed += n - len(kept)
    assert (suppressed == 0) == (threshold == 1)


def test_vote():
    """The mean of the boxes that found the same object, weighted by their odds; others have no say."""
    boxes = np.array([[0, 0, 100, 100], [0, 0, 90, 100], [0, 0, 100, 95], [0, 0, 50, 100], [0, 0, 99, 99.0]])
    scores, labels = np.array([0.8, 0.5, 0.5, 0.9, 0.9]), np.array([1, 1, 1, 1, 2])
    first = vote(boxes, scores, labels, np.array([0]))[0]
    assert first == pytest.approx([0, 0, (4 * 100 + 90 + 100) / 6, (4 * 100 + 100 + 95) / 6])
    assert vote(boxes, scores, labels, np.array([3, 4])) == pytest.approx(boxes[[3, 4]])
    for certain in (0.0, 1.0):  # odds of 0 and of infinity
        assert vote(boxes[:1], np.array([certain]), labels[:1], np.array([0])) == pytest.approx(boxes[:1])
    assert vote(boxes, scores, labels, np.array([], int)).shape == (0, 4)


def test_nms_keeps_at_the_threshold():
    """Overlaps of exactly the threshold stay; other classes never suppress."""
    boxes, scores = np.array([[0.0, 0, 2, 2], [0, 0, 2, 1]]), np.array([0.3, 0.9])
    assert nms(boxes, scores, np.array([4, 4]), 0.5).tolist() == [1, 0]
    assert nms(boxes, scores, np.array([4, 4]), 0.49).tolist() == [1]
    assert nms(boxes, scores, np.array([4, 5]), 0.0).tolist() == [1, 0]


# Boxes in text ----------------------------------------------------------------------------------------------

A, B = "<loc0010><loc0020><loc0030><loc0040>", "<loc0000><loc0000><loc1023><loc1023>"
SEG = "".join(f"<seg{i:03d}>" for i in range(112, 128))
IN_A, IN_B = (10, 20, 30, 40), (0, 0, 1023, 1023)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("", []),
        ("no boxes here", []),
        (f"{A} cat", [(IN_A, "cat")]),
        (f"{A} traffic light ; {B} hot dog", [(IN_A, "traffic light"), (IN_B, "hot dog")]),
        (f"{A}cat;{A}cat;", [(IN_A, "cat"), (IN_A, "cat")]),
        (f"{A} ; {B} dog", [(IN_A, ""), (IN_B, "dog")]),
        (f"{A}{B} dog", [(IN_A, ""), (IN_B, "dog")]),
        (f"{A[:27]} cat ; {B} dog", [(IN_B, "dog")]),
        (f"{A} cat ; {B[:18]}", [(IN_A, "cat")]),
        (f"so ; {A} cat <unused3> x ; y ; {B} dog<eos>", [(IN_A, "cat"), (IN_B, "dog")]),
        (f"<loc1024>{B[:27]} cat ; {A} dog", [(IN_A, "dog")]),
        (f"{A} cat\n", [(IN_A, "cat")]),
    ],
)
def test_parse_answer(text, expected):
    assert parse_answer(text) == [ParsedBox(locs, (), label) for locs, label in expected]


def test_parse_masks():
    """Sixteen codes are a mask; fewer are none, and the box and its label stay."""
    assert parse_answer(f"{A}{SEG} cat ; {B}{SEG}") == [
        ParsedBox(IN_A, tuple(range(112, 128)), "cat"),
        ParsedBox(IN_B, tuple(range(112, 128)), ""),
    ]
    assert parse_answer(f"{A}{SEG[8:]} cat") == [ParsedBox(IN_A, (), "cat")]
    assert parse_answer(f"{A}{SEG[8:]}<seg128> cat") == [ParsedBox(IN_A, (), "cat")]


def test_format_answer():
    """Read back as written; a box at the edge, or beyond it, has no <loc1024>."""
    for seed in range(50):
        rng = np.random.default_rng(seed)
        boxes = rng.uniform(-5, 105, (int(rng.integers(0, 6)), 4))
        boxes[: len(boxes) // 2, 2:] = 100, 50
        labels = rng.choice(["cat", "dog", "traffic light", "bird"], len(boxes)).tolist()
        text = format_answer(boxes, labels, 100, 50)
        assert "<loc1024>" not in text
        locs = boxes_to_locs(boxes, 100, 50).tolist()
        assert parse_answer(text) == [ParsedBox(tuple(q), (), c) for q, c in zip(locs, labels, strict=True)]
    assert format_answer(np.array([[4, 1, 8, 2]]), ["hot dog"], 8, 2) == (
        "<loc0512><loc0512><loc1023><loc1023> hot dog"
    )
    assert format_answer(np.array([[4, 1, 8, 2]]), [""], 8, 2).endswith(">")
    with pytest.raises(ValueError, match="'a;b'"):
        format_answer(np.zeros((1, 4)), ["a;b"], 1, 1)
