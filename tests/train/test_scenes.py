"""The practice scenes: same seed, same bytes; boxes that fit; held-out drawings kept out; COCO files."""

import hashlib
import json
import runpy

import numpy as np
import pytest
from helpers import call
from PIL import Image
from pycocotools.coco import COCO

from model.config import COCO_CLASSES
from model.decoding.boxes import boxes_to_locs
from model.decoding.masks import MaskCodec, tight_box
from model.io.hub import CODEC, NANO
from train.data.jsonl import read_lines
from train.practice import scenes, write
from train.practice.scenes import (
    DISTRACTOR,
    MIN_VISIBLE,
    SPLITS,
    SPRITES,
    Stack,
    load_sprites,
    make_scene,
    paste,
)
from train.practice.surfaces import SURFACES
from train.practice.write import COCO_IDS, answer_lines, main


@pytest.mark.parametrize("split", SPLITS)
def test_scenes_are_well_formed(split):
    for seed in range(40):
        scene = make_scene(seed, split=split)
        n = len(scene.labels)
        assert scene.image.shape == (128, 128, 3) and scene.image.dtype == np.uint8
        assert scene.boxes.shape == (n, 4) and scene.boxes.dtype == np.float32
        assert scene.labels.dtype == np.int64 and ((scene.labels >= 0) & (scene.labels < 80)).all()
        assert 1 <= n <= 12
        assert (scene.boxes >= 0).all() and (scene.boxes <= 128).all()
        assert set(np.unique(scene.owner)) - {-1} == set(range(n))
        for k, box in enumerate(scene.boxes):
            seen = scene.owner == k
            assert seen.sum() >= 36 - 9 * SPLITS[split].framed  # the window's edge may have cut a small one
            # Exactly, if the scene is as it was painted; a window's edge may lie within a pixel.
            assert np.abs(tight_box(seen) - box).max() <= SPLITS[split].framed


def test_training_uses_every_location_token():
    """Boxes on whole pixels of 128 would use an eighth of the 1,024."""
    used = np.zeros(1024, bool)
    for seed in range(600):
        used[boxes_to_locs(make_scene(seed).boxes, 128, 128)] = True
    assert used.mean() > 0.97
    still = [boxes_to_locs(make_scene(seed, split="same").boxes, 128, 128) for seed in range(50)]
    assert all((locs % 8 == 0)[locs < 1023].all() for locs in still)


def test_held_out_scenes_stay_what_they_are():
    """All figures that were ever reported are of them."""
    digests = dict(
        same="4780aeaae26eb877",
        vendor="f8742ff71c4c0303",
        development="824575a212a473c7",
        crowded="657ec478468e04c8",
    )
    for split, expected in digests.items():
        digest = hashlib.sha256()
        for seed in range(3):
            scene = make_scene(seed, split=split)
            for array in (scene.image, scene.boxes, scene.labels, scene.owner):
                digest.update(array.tobytes())
        assert digest.hexdigest().startswith(expected), split


def test_same_seed_same_bytes():
    a, b = make_scene(5), make_scene(5)
    assert a.image.tobytes() == b.image.tobytes() and a.boxes.tobytes() == b.boxes.tobytes()
    assert (a.labels == b.labels).all()


def test_seeds_and_splits_differ():
    images = {make_scene(seed, split=split).image.tobytes() for seed in range(5) for split in SPLITS}
    assert len(images) == 5 * len(SPLITS)


def test_other_sizes():
    scene = make_scene(3, size=224)
    assert scene.image.shape == (224, 224, 3) and scene.owner.shape == (224, 224)
    assert scene.boxes.max() > 128


def test_held_out_sources_are_disjoint():
    def sources(held_out):
        return {s.source for groups in load_sprites(held_out).values() for group in groups for s in group}

    assert sources(True) and sources(False) and not sources(True) & sources(False)
    assert set(range(80)) <= set(load_sprites(False)), "every class must have a training sprite"


def test_classes_are_cocos():
    """Labels of scenes are positions in the pack's list; everything else takes them for COCO's."""
    assert json.loads((SPRITES / "sprites.json").read_text())["classes"] == list(COCO_CLASSES)
    tables = runpy.run_path(str(SPRITES / "sources.py"))
    assert list(tables["classes"]()) == list(COCO_CLASSES)


@pytest.mark.parametrize("name", SURFACES)
def test_surfaces(name):
    """Of any size; no two alike; the same generator, the same surface."""
    for size in (32, 100, 128):
        drawn = [SURFACES[name](np.random.default_rng(seed), size) for seed in (*range(12), 0)]
        assert all(image.shape == (size, size, 3) and image.dtype == np.uint8 for image in drawn)
        assert len({image.tobytes() for image in drawn}) == 12 and (drawn[0] == drawn[-1]).all()


def test_surfaces_are_for_training_only(monkeypatch):
    """The held-out sets ask for backgrounds that training has not seen, and stay what they are."""
    painted = []
    for name, surface in SURFACES.items():
        monkeypatch.setitem(SURFACES, name, lambda *args, s=surface: painted.append(s.__name__) or s(*args))
    for split in SPLITS:
        painted.clear()
        for seed in range(80):
            make_scene(seed, split=split)
        assert set(painted) == (set(SURFACES) if split == "train" else set()), split


def test_crowded_is_crowded():
    def mean(split):
        return np.mean([len(make_scene(seed, split=split).labels) for seed in range(60)])

    assert mean("crowded") > 7 and 3 < mean("train") < 6


def test_boxes_are_where_the_paint_is(monkeypatch):
    """White silhouettes on black: what is white belongs to an object, but for soft rims upon soft rims."""

    def silhouette(rng, canvas, sprite, piece, x, y):
        if sprite.label != DISTRACTOR:
            paste(canvas, piece[..., [3, 3, 3, 3]], x, y)

    monkeypatch.setattr(
        scenes, "draw_background", lambda rng, size, *_: np.zeros((size, size, 3), np.float32)
    )
    monkeypatch.setattr(scenes, "simulate_camera", lambda rng, canvas: canvas.round().astype(np.uint8))
    monkeypatch.setattr(scenes, "paint", silhouette)
    for seed in range(30):
        scene = make_scene(seed, split="development")
        white, owned = scene.image[..., 0] > 127, scene.owner >= 0
        assert white[owned].all() and (white == owned).mean() > 0.995


def test_stack_refuses_to_hide_objects():
    def square(side):
        return np.full((side, side, 4), 255, np.float32)

    stack = Stack(64, 4)
    assert not stack.add(square(5), 10, 10)  # too small
    assert not stack.add(square(20), -5, 10)  # cut by a quarter
    assert stack.add(square(20), 10, 10)
    assert not stack.add(square(30), 5, 5)  # would cover it
    assert stack.add(square(20), 20, 10)  # covers half
    assert stack.visible[0] == MIN_VISIBLE * stack.whole[0] == 200
    assert stack.boxes().tolist() == [[10, 10, 20, 30], [20, 10, 40, 30]]
    assert not stack.add(square(6), 12, 12)  # not one pixel more


def test_files_are_coco(tmp_path):
    out = tmp_path / "new" / "set"
    out.mkdir(parents=True)  # an empty folder is as good as none
    main(["--out", str(out), "--count", "5", "--split", "vendor", "--seed", "7"])
    coco = COCO(out / "instances.json")
    assert coco.getCatIds() == COCO_IDS and len(COCO_IDS) == 80 and COCO_IDS[-1] == 90
    assert coco.loadCats(18)[0]["name"] == "dog"
    assert len(coco.getImgIds()) == 5 and [p.name for p in out.parent.iterdir()] == ["set"]
    for i in coco.getImgIds():
        scene = make_scene(7 + i, split="vendor")
        with Image.open(out / "images" / coco.imgs[i]["file_name"]) as image:
            assert (np.asarray(image) == scene.image).all()
        boxes = np.array([a["bbox"] for a in coco.imgToAnns[i]])
        boxes[:, 2:] += boxes[:, :2]
        assert (boxes == scene.boxes).all()
        assert [a["category_id"] for a in coco.imgToAnns[i]] == [COCO_IDS[c] for c in scene.labels]
    assert json.loads((out / "instances.json").read_text())["info"]["split"] == "vendor"


def test_answers_are_of_their_pictures(tmp_path):
    """--answers adds prompts with right answers; each line is about the scene that its picture shows."""
    out = tmp_path / "set"
    main(["--out", str(out), "--count", "3", "--seed", "11", "--answers"])
    assert {path.name for path in out.iterdir()} == {"images", "instances.json", "answers.jsonl"}
    lines = [record for _, record in read_lines(out / "answers.jsonl", out / "images")]
    codec = MaskCodec.load(NANO / CODEC)
    expected = [
        dict(image=f"{i:06d}.png") | line
        for i in range(3)
        for line in answer_lines(np.random.default_rng([11 + i, 2]), make_scene(11 + i, split="same"), codec)
    ]
    assert lines == expected and {"caption", "segment"} <= {line["kind"] for line in lines}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((), "not an empty folder"),
        (("--size", "31"), "at least 1 scene of 32 pixels"),
        (("--codec", "codec.safetensors"), "--codec is for --answers"),
        (("--answers", "--codec", "none.safetensors"), "none.safetensors: no such file"),
    ],
)
def test_faults(tmp_path, monkeypatch, capsys, options, words):
    """One line that names the program; what was there stays as it was, and nothing is added."""
    (tmp_path / "notes.txt").write_text("mine")
    code, _, error = call(monkeypatch, capsys, write, "--out", tmp_path, "--count", 1, *options)
    assert code == 1 and error.startswith("write.py: ") and words in error and error.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_workers_change_nothing(tmp_path, monkeypatch):
    """Scenes that several processes draw: the same files, byte for byte."""
    codec = MaskCodec.load(NANO / CODEC)
    for name, workers_from in (("alone", 100), ("workers", 1)):
        monkeypatch.setattr(write, "WORKERS_FROM", workers_from)
        write.write_coco(tmp_path / name, 5, "crowded", codec=codec)
    files = [sorted(file for file in (tmp_path / name).rglob("*.*")) for name in ("alone", "workers")]
    assert len(files[0]) == 7
    for one, other in zip(*files, strict=True):
        assert one.name == other.name and one.read_bytes() == other.read_bytes()
