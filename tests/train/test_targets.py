"""The training target of closed-set detection: objects in random order, then noise."""

import itertools

import numpy as np
import pytest
from helpers import random_objects, slow_iou
from reference import BOS, EOS, LOC0, NEWLINE, UNUSED0

from model.config import COCO_CLASSES
from model.decoding.boxes import boxes_to_locs, locs_to_boxes
from model.decoding.closed_set import ClosedSet
from train.data.targets import MAX_NOISE_IOU, Noise, closed_set_target
from train.practice.scenes import make_scene

G, CLASSES = 12, ("cat", "dog", "traffic light", "bird", "cow", "bear")


LANGUAGE = ClosedSet((BOS, 500, 600, NEWLINE), LOC0, UNUSED0, EOS, CLASSES, G)


NOISE = UNUSED0 + len(CLASSES)


SIZE = 128


def random_image(rng, n, width=SIZE, height=SIZE):
    return random_objects(rng, n, width, height, len(CLASSES))


def target_of(seed, boxes, labels, width=SIZE, height=SIZE, grid=1):
    return closed_set_target(np.random.default_rng(seed), boxes, labels, width, height, LANGUAGE, grid)


def groups_of(target, width=SIZE, height=SIZE):
    """The target's labels as pixel boxes [G, 4] and classes [G]; its other arrays as [G, 5]."""
    tokens, inputs, weights = (a[:-1].reshape(G, 5) for a in (target.tokens, target.inputs, target.weights))
    return locs_to_boxes(tokens[:, :4] - LOC0, width, height), tokens[:, 4] - UNUSED0, tokens, inputs, weights


def rows(boxes, labels):
    """A multiset of objects, whatever their order."""
    return sorted((*map(float, box), int(label)) for box, label in zip(boxes, labels, strict=True))


@pytest.mark.parametrize("n", [0, 1, 3, G - 1, G])
def test_target(n):
    """Over many images of n objects: what is asked, fed and weighted."""
    disguised = 0
    for seed in range(60):
        rng = np.random.default_rng([seed, n])
        image = random_image(rng, n)
        target = target_of(seed, *image)
        assert target.tokens.shape == target.inputs.shape == target.weights.shape == (5 * G + 1,)
        assert target.tokens.dtype == target.inputs.dtype == np.int64 and target.weights.dtype == np.float32
        for position, (token, fed) in enumerate(zip(target.tokens, target.inputs, strict=True)):
            first, last = LANGUAGE.allowed(position)
            assert first <= token < last and first <= fed < last

        boxes, labels, tokens, inputs, weights = groups_of(target)
        assert rows(boxes[:n], labels[:n]) == rows(*image), "the objects come first, whole pixels unharmed"
        assert (labels[n:] == len(CLASSES)).all() and (labels[:n] < len(CLASSES)).all()
        assert (weights[:n] == 1).all() and (weights[n:, :4] == 0).all()
        assert (weights[n:, 4] == np.float32(Noise.weight)).all() and 0 < Noise.weight <= 1
        assert target.tokens[-1] == target.inputs[-1] == EOS and target.weights[-1] == 1
        assert (inputs[:, :4] == tokens[:, :4]).all() and (inputs[:n] == tokens[:n]).all()
        disguised += (inputs[n:, 4] != tokens[n:, 4]).sum()

        assert (boxes >= 0).all() and (boxes <= SIZE).all()
        assert (boxes == boxes.round()).all(), "noise on the grid of the objects"
        assert (boxes[:, 2:] > boxes[:, :2]).all()
        for noise, real in itertools.product(boxes[n:], image[0]):
            assert slow_iou(noise, real) <= MAX_NOISE_IOU == 0.15
        assert len({tuple(box) for box in boxes[n:]}) == G - n
    share = disguised / max(1, 60 * (G - n))
    assert n == G or abs(share - Noise.disguise) < 0.15


def test_order_is_random():
    """Every order of three objects is equally likely, and the seed decides."""
    image = random_image(np.random.default_rng(0), 3)[0], np.array([0, 1, 2])
    orders = [tuple(groups_of(target_of(seed, *image))[1][:3]) for seed in range(300)]
    assert {orders.count(order) > 20 for order in itertools.permutations(range(3))} == {True}
    a, b = target_of(5, *image), target_of(5, *image)
    assert (a.tokens == b.tokens).all() and (a.inputs == b.inputs).all()


def test_disguises_are_random_classes():
    seen = set()
    for seed in range(100):
        *_, inputs, _ = groups_of(target_of(seed, *random_image(np.random.default_rng(seed), 2)))
        seen |= set(inputs[2:, 4].tolist())
    assert seen == set(range(UNUSED0, NOISE + 1))


def test_more_objects_than_groups():
    """A random choice of them, each once; nothing is noise."""
    boxes, labels = random_image(np.random.default_rng(0), 3 * G)
    assert len(set(rows(boxes, labels))) == 3 * G
    chosen = set()
    for seed in range(40):
        target = target_of(seed, boxes, labels)
        of_target, its_labels, *_ = groups_of(target)
        drawn = rows(of_target, its_labels)
        assert len(set(drawn)) == G and set(drawn) <= set(rows(boxes, labels))
        assert (target.weights == 1).all() and (target.inputs == target.tokens).all()
        chosen |= set(drawn)
    assert len(chosen) == 3 * G


@pytest.mark.parametrize("form", ["lists", "arrays"])
def test_no_objects(form):
    """An image without objects is an answer of noise alone."""
    empty = ([], []) if form == "lists" else (np.zeros((0, 4), np.float32), np.zeros(0, np.int64))
    boxes, labels, _, _, weights = groups_of(target_of(0, *empty))
    assert (labels == len(CLASSES)).all() and (weights[:, :4] == 0).all() and (weights[:, 4] > 0).all()
    assert len(np.unique(boxes, axis=0)) > 1


def test_no_room_for_noise():
    """Where no box is far enough from the objects, the answer still has all its groups."""
    tiles = np.array([[x, y, x + 8, y + 8] for x in range(0, SIZE, 8) for y in range(0, SIZE, 8)][: G - 2])
    crowd = np.concatenate((tiles, [[0, 0, SIZE, SIZE]]))
    for seed in range(20):
        boxes, labels, *_ = groups_of(target_of(seed, crowd, np.zeros(len(crowd), int)))
        assert (labels == len(CLASSES)).sum() == G - len(crowd) and (boxes[:, 2:] > boxes[:, :2]).all()


def test_width_is_not_height():
    """Boxes of a wide picture scale with its width and its height, those of noise too."""
    for seed in range(20):
        boxes, labels = random_image(np.random.default_rng(seed), 3, 640, 200)
        target = target_of(seed, boxes, labels, 640, 200, grid=0)
        locs = target.tokens[:-1].reshape(G, 5)[:3, :4] - LOC0
        assert sorted(locs.tolist()) == sorted(boxes_to_locs(boxes, 640, 200).tolist())
        noise = groups_of(target, 640, 200)[0][3:]
        assert all(slow_iou(a, b) <= MAX_NOISE_IOU + 0.02 for a, b in itertools.product(noise, boxes))


def test_targets_of_scenes():
    """The practice set: boxes and classes of a scene survive the way into tokens and back."""
    language = ClosedSet((2, 3, 108), 300, 7, 1, COCO_CLASSES, G)
    for seed in range(5):
        scene = make_scene(seed, split="development")  # whose boxes lie on the bins' grid
        target = closed_set_target(
            np.random.default_rng(seed), scene.boxes, scene.labels, SIZE, SIZE, language, grid=1
        )
        n, groups = len(scene.labels), target.tokens[:-1].reshape(G, 5)
        boxes = locs_to_boxes(groups[:n, :4] - 300, SIZE, SIZE)
        assert rows(boxes, groups[:n, 4] - 7) == rows(scene.boxes, scene.labels)
        assert (groups[n:, 4] == 87).all()
