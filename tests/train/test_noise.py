"""The options of noise in closed-set training: what nano was trained with, and what the published run did."""

import hashlib
import json
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from helpers import language_of, random_objects
from PIL import Image
from training import AS_OPTIONS, PUBLISHED, parsed, run, run_complaint

from model.decoding.boxes import iou, locs_to_boxes
from model.decoding.closed_set import GROUP, ClosedSet
from train import fit as train
from train.data.augment import augment
from train.data.coco import CocoDetections, CocoIndex
from train.data.targets import MAX_NOISE_IOU, Noise, closed_set_target, noise_boxes
from train.practice.dataset import PracticeScenes
from train.run.options import noise_of

LANGUAGE = ClosedSet((2, 500, 600, 108), 1000, 7, 1, tuple("abcdef"), groups=12)


# Noise boxes ------------------------------------------------------------------------------------------------


def test_defaults_are_what_nano_was_trained_with():
    """Byte for byte, and not one random number more or less is drawn."""
    digest = hashlib.sha256()
    for seed in range(40):
        for grid in (0, 1):
            rng = np.random.default_rng(seed)
            n = seed % 15
            low = rng.integers(0, 80, (n, 2))
            boxes = np.concatenate((low, low + rng.integers(5, 40, (n, 2))), axis=1).astype(float)
            target = closed_set_target(rng, boxes, rng.integers(0, 6, n), 128, 100, LANGUAGE, grid)
            for array in (target.tokens, target.inputs, target.weights, rng.random(3)):
                digest.update(np.ascontiguousarray(array).tobytes())
    assert digest.hexdigest().startswith("508a71e5f82626fe")
    assert noise_of(train.arguments(["--model", "x", "--out", "x"])) == Noise()


def test_options_become_noise():
    args = train.arguments(["--model", "x", "--out", "x", "--data", "x", *AS_OPTIONS.split()])
    assert noise_of(args) == PUBLISHED
    assert all(option in AS_OPTIONS for option in PUBLISHED.changed()) and not Noise().changed()
    others = "--answers parallel --noise own --noise-boxes 3", "--noise-copies 0.1"
    changed = [noise_of(parsed(options)) for options in others]
    assert changed == [Noise(own=True, boxes=3), Noise(copies=0.1)]
    options = [option for noise in (PUBLISHED, *changed) for option in noise.changed()]
    assert len(options) == len(fields(Noise)) and all(
        option in " ".join((AS_OPTIONS, *others)) for option in options
    )


def test_noise_weight_and_disguise():
    """One setting changes one thing: the rest of the target stays as it is."""
    for seed in range(20):
        image = *random_objects(np.random.default_rng(seed), 4, 128, 100, 6), 128, 100

        def target(image=image, seed=seed, **changes):
            return closed_set_target(np.random.default_rng(seed), *image, LANGUAGE, 1, Noise(**changes))

        usual, heavy, plain, masked = target(), target(weight=1), target(disguise=0), target(disguise=1)
        for other in (heavy, plain, masked):
            assert (other.tokens == usual.tokens).all()
        noise = usual.tokens == LANGUAGE.noise
        assert noise.sum() == 8 and (heavy.weights[noise] == 1).all() and (usual.weights[noise] == 0.5).all()
        assert (heavy.weights[~noise] == usual.weights[~noise]).all() and (heavy.inputs == usual.inputs).all()
        assert (plain.inputs == plain.tokens).all() and (plain.weights == usual.weights).all()
        assert not (masked.inputs == LANGUAGE.noise).any() and (usual.inputs != usual.tokens).any()


def test_noise_near():
    """0: boxes of any size, whatever the objects are; 1: all are like them."""
    real = np.array([[10.0, 10, 40, 20]])
    sides = {}
    for near in (0, 1):
        boxes = [
            noise_boxes(np.random.default_rng(seed), real, 8, 1000, 1000, 0, Noise(near=near))
            for seed in range(20)
        ]
        sides[near] = np.concatenate([box[:, 2:] - box[:, :2] for box in boxes])
    assert (sides[1] <= [45.001, 15.001]).all() and (sides[0] > [45, 15]).any(1).all()


@pytest.mark.parametrize("groups", [16, 51])
def test_noise_apart(groups):
    """The published rule: noise boxes overlap neither real ones nor each other by more than 0.15."""
    language, share = replace(LANGUAGE, groups=groups), {}
    for noise in (Noise(), Noise(apart=True), Noise(apart=True, near=0)):
        overlaps, worst = [], 0
        for seed in range(40):
            width, height = 640, 480
            real, labels = random_objects(np.random.default_rng(seed), seed % 7, width, height, 6)
            rng = np.random.default_rng(seed)
            rng.permutation(len(real))  # closed_set_target draws the order first
            boxes = noise_boxes(rng, real, groups - len(real), width, height, 0, noise)
            assert boxes.shape == (groups - len(real), 4) and (boxes[:, 2:] > boxes[:, :2]).all()
            assert len(np.unique(boxes, axis=0)) == len(boxes)
            overlaps.append(iou(boxes, boxes)[np.triu_indices(len(boxes), 1)])
            worst = max(worst, iou(boxes, real).max(initial=0))
            target = closed_set_target(
                np.random.default_rng(seed), real, labels, width, height, language, 0, noise
            )
            found = target.tokens[:-1].reshape(-1, GROUP)
            found = found[found[:, 4] == language.noise]
            assert np.abs(locs_to_boxes(found[:, :4] - language.loc0, width, height) - boxes).max() < 1
        assert worst <= MAX_NOISE_IOU
        share[noise] = (np.concatenate(overlaps) > MAX_NOISE_IOU).mean()
    assert share.pop(Noise()) > 0.03 and max(share.values()) <= 1e-3


def test_noise_apart_without_room():
    """A small picture full of objects: as many boxes as asked for, none twice."""
    real, _ = random_objects(np.random.default_rng(0), 40, 60, 60, 6)
    for crowd, side in ((real, 60), (np.zeros((0, 4)), 4)):  # in 4 pixels every box is too flat
        boxes = noise_boxes(np.random.default_rng(0), crowd, 11, side, side, 0, Noise(apart=True))
        assert len(np.unique(boxes, axis=0)) == 11


def test_data_sets_use_the_noise(tiny, scenes):
    """Practice scenes and COCO files alike: noise weighs 1 and is fed as it is."""
    language = language_of(tiny)
    index = CocoIndex.read(scenes)
    labels = [language.classes.index(name) for name in index.classes]
    practice = [PracticeScenes(language, 64, 16, noise=noise) for noise in (Noise(), PUBLISHED)]
    files = [
        CocoDetections(index, scenes.parent / "images", language, labels, 64, noise=noise)
        for noise in (Noise(), PUBLISHED)
    ]
    for usual, published in (practice, files):
        for i in range(8):
            one, two = usual[i, i], published[i, i]
            noise = one["labels"] == language.noise
            assert noise.any() and set(one["weights"][noise].tolist()) == {0.5}
            noise = two["labels"] == language.noise
            assert set(two["weights"][noise].tolist()) == {1}
            start = len(language.prompt)
            assert torch.equal(two["text"][start:], two["labels"][start - 1 : -1])
            assert not torch.equal(one["text"], two["text"]) and torch.equal(one["image"], two["image"])


# Images without objects -------------------------------------------------------------------------------------


def test_skip_empty(with_empty):
    index, images = CocoIndex.read(with_empty), with_empty.parent / "images"
    for skip, names in ((False, "0123"), (True, "13")):
        data = CocoDetections(index, images, LANGUAGE, [0], 32, noise=Noise(skip_empty=skip))
        assert [data.name(i) for i in range(len(data))] == [f"{name}.png" for name in names]
        for i, name in enumerate(names):
            sample = data[i, i]
            assert (sample["labels"] == LANGUAGE.class0).sum() == (name in "13")
            assert sample["image"][0, 0, 0] == 50 * int(name)


def test_skip_empty_after_augmentation(with_empty):
    """Where augmentation would move every object out of the picture, the picture stays as it is."""
    index, images = CocoIndex.read(with_empty), with_empty.parent / "images"
    usual, skipping = (
        CocoDetections(index, images, LANGUAGE, [0], 32, augment=True, noise=Noise(skip_empty=skip))
        for skip in (False, True)
    )
    moved_out = 0
    for draw in range(60):
        with Image.open(images / "1.png") as image:
            *_, kept = augment(np.random.default_rng([0, draw]), image, index.objects(1)[0])
        one, two = usual[draw, 1], skipping[draw, 0]
        assert (two["labels"] == LANGUAGE.class0).sum() == 1
        assert torch.equal(one["image"], two["image"]) or not len(kept)
        if not len(kept):
            assert not (one["labels"] == LANGUAGE.class0).any()
            assert (two["image"] == torch.tensor([50, 0, 0])).all()
            moved_out += 1
    assert moved_out > 5


def test_skip_empty_counts(with_empty, tiny, tmp_path, capsys):
    """The dry run's epochs are of the pictures that take part; data without any is refused."""
    for option, words in (
        ("", ("4 samples", "20.00 epochs")),
        ("--skip-empty", ("2 samples", "40.00 epochs")),
    ):
        run(tiny, tmp_path / "run", f"--patch-weight 0 --data {with_empty} --steps 20 --dry-run {option}")
        said = capsys.readouterr().out
        assert all(part in said for part in words)
    all_empty = tmp_path / "all_empty.json"
    all_empty.write_text(json.dumps(json.loads(with_empty.read_text()) | dict(annotations=[])))
    message = run_complaint(tiny, tmp_path / "run", f"--data {all_empty} --skip-empty")
    assert "all_empty.json" in message and "no samples with objects" in message
