"""Augmentation: boxes move with the pixels, alone and in a data set."""

import json

import numpy as np
import pytest
from PIL import Image, ImageDraw
from training import HEIGHT, WIDTH, instances

from model.decoding.boxes import (
    areas,
    locs_to_boxes,
)
from model.decoding.closed_set import GROUP, ClosedSet
from train.data.augment import FILL, MIN_KEPT, augment, flip, jitter, rescale
from train.data.coco import CocoDetections, CocoIndex

LANGUAGE = ClosedSet((2, 500, 600, 108), 1000, 7, 1, ("cat", "dog", "traffic light", "bird"), groups=6)


SIZE = 32


RED, BLUE = (255, 0, 0), (0, 0, 255)


def painted(boxes, colours, size=(WIDTH, HEIGHT)):
    """A white image with a rectangle of whole pixels for each box."""
    image = Image.new("RGB", size, "white")
    for (x0, y0, x1, y1), colour in zip(np.asarray(boxes, int).tolist(), colours, strict=True):
        ImageDraw.Draw(image).rectangle((x0, y0, x1 - 1, y1 - 1), fill=colour)
    return image


def find(image, colour):
    """The box of all pixels of a colour, or None."""
    y, x = (np.asarray(image) == colour).all(-1).nonzero()
    return [x.min(), y.min(), x.max() + 1, y.max() + 1] if len(x) else None


@pytest.mark.parametrize("step", ["flip", "flip_vertical", "rescale"])
def test_boxes_move_with_pixels(step):
    """The painted rectangles are found where the boxes are; those dropped show less than the stated share."""
    dropped = cut = outside = 0
    for seed in range(150):
        rng = np.random.default_rng(seed)
        low = rng.integers(0, (35, 50), (2, 2)) + [[0, 0], [WIDTH // 2, 0]]  # side by side: neither hides one
        boxes = np.concatenate((low, low + rng.integers(2, 10, (2, 2))), axis=1).astype(np.float64)
        image, before = painted(boxes, (RED, BLUE)), boxes.copy()
        moved, new, kept = (
            rescale(rng, image, boxes)
            if step == "rescale"
            else (*flip(image, boxes, vertical=step == "flip_vertical"), np.arange(2))
        )
        assert (boxes == before).all(), "the input is left as it was"
        assert new.shape == (len(kept), 4) and (step == "rescale" or moved.size == image.size)
        for row, colour in enumerate((RED, BLUE)):
            seen = find(moved, colour)
            share = 0 if seen is None else areas(np.array(seen)) / areas(boxes[row])
            if row in kept:
                assert seen == new[kept.tolist().index(row)].tolist() and share >= MIN_KEPT
            else:
                assert share < MIN_KEPT
            dropped, cut = dropped + (share < MIN_KEPT), cut + (MIN_KEPT <= share < 1)
        outside += find(moved, FILL) is not None
    assert (min(dropped, cut, outside) > 5) == (step == "rescale")


def test_augment():
    """Same generator, same result; colours stay near; sizes of 1 and no boxes are no error."""
    boxes = np.array([[10.0, 10, 30, 40], [50, 5, 88, 59]])
    image = painted(boxes, (RED, (30, 90, 60)))
    results = [augment(np.random.default_rng(seed // 2), image, boxes) for seed in range(40)]
    for (a, a_boxes, a_kept), (b, b_boxes, b_kept) in zip(results[::2], results[1::2], strict=True):
        assert a.tobytes() == b.tobytes() and (a_boxes == b_boxes).all() and (a_kept == b_kept).all()
    assert len({a.tobytes() for a, *_ in results}) > 10
    for seed in range(20):
        rng = np.random.default_rng(seed)
        grey = np.asarray(jitter(rng, Image.new("RGB", (4, 4), FILL)))
        assert np.ptp(grey, axis=2).max() == 0 and 90 < grey.min() <= grey.max() < 160
        red = np.asarray(jitter(rng, Image.new("RGB", (4, 4), RED)))[0, 0].astype(int)
        assert red[0] > 150 and red[1:].max() < 60
        shown, none, kept = augment(rng, Image.new("RGB", (1, 1)), np.zeros((0, 4)))
        assert min(shown.size) >= 1 and none.shape == (0, 4) and kept.shape == (0,)


def test_flip_vertical(monkeypatch):
    """All four ways to mirror a picture are equally likely; without the option two are, and nothing is drawn
    for the others."""
    monkeypatch.setattr("train.data.augment.RESCALE", 0)
    monkeypatch.setattr("train.data.augment.JITTER", 0)
    boxes = np.array([[10.0, 5, 30, 20]])
    image = painted(boxes, (RED,))
    for flip_vertical, ways in ((True, 4), (False, 2)):
        seen = []
        for seed in range(200):
            rng, same = np.random.default_rng(seed), np.random.default_rng(seed)
            moved, new, _ = augment(rng, image, boxes, flip_vertical)
            same.random(4 if flip_vertical else 3)
            assert rng.bit_generator.state == same.bit_generator.state
            assert find(moved, RED) == new[0].tolist()
            seen.append(tuple(new[0]))
        counts = [seen.count(place) for place in set(seen)]
        assert len(counts) == ways and min(counts) > 0.7 * 200 / ways


def test_augmented_boxes(tmp_path):
    """Tokens of an augmented sample point at their object's pixels; of more objects than G, G are drawn."""
    boxes = {2: [55, 20, 80, 50], 13: [10, 15, 35, 45]}  # by category: a red and a blue object, many times
    painted(list(boxes.values()), (RED, BLUE)).save(tmp_path / "a.png")
    annotations = [
        dict(id=i, image_id=70, category_id=c, bbox=[*boxes[c][:2], 25, 30])
        for i, c in enumerate([2, 13, 13, 2, 2, 13, 13, 2, 13])
    ]
    file = tmp_path / "instances.json"
    file.write_text(json.dumps(instances(images=instances()["images"][:1], annotations=annotations)))
    index = CocoIndex.read(file)
    data = CocoDetections(index, tmp_path, LANGUAGE, [2, 0, 3], 180, augment=True, flip_vertical=True)
    counts = []
    for draw in range(40):
        sample = data[draw, 0]
        groups = sample["labels"][len(LANGUAGE.prompt) - 1 : -1].reshape(-1, GROUP).numpy()
        real = groups[groups[:, 4] != LANGUAGE.noise]
        counts.append(len(real))
        pixels = sample["image"].numpy().astype(int)
        for *locs, label in real:
            channel = {2: 0, 0: 2}[int(label) - LANGUAGE.class0]
            y, x = ((2 * pixels[..., channel] - pixels[..., 1] - pixels[..., 2 - channel]) > 150).nonzero()
            box = locs_to_boxes(np.array(locs) - LANGUAGE.loc0, 180, 180)
            assert np.abs(box - [x.min(), y.min(), x.max() + 1, y.max() + 1]).max() <= 2
    assert set(counts) <= {0, 4, 5, 6} and counts.count(6) > 15 and min(counts) < 6
