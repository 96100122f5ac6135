"""On few pictures, options that are not given follow from the data and the model."""

import json
import math

import pytest
from helpers import picture
from training import WIDTH, instances

from train.run import defaults
from train.run.options import arguments, as_json, changed_options


@pytest.fixture
def few(tmp_path):
    """A set of so many pictures, which need not be there."""

    def make(count: int):
        image = instances()["images"][0]
        images = [image | dict(id=i, file_name=f"{i}.png") for i in range(count)]
        boxes = [dict(id=i, image_id=i, category_id=2, bbox=[0, 0, WIDTH, 9]) for i in range(count)]
        data = instances(images=images, annotations=boxes)
        (tmp_path / "few.json").write_text(json.dumps(data))
        (tmp_path / "images").mkdir(exist_ok=True)
        return tmp_path / "few.json"

    return make


def settled(data, *options, model="nano"):
    argv = ["--model", str(model), "--out", "x", "--data", str(data), *options]
    return arguments(argv, settle=defaults.defaults_for)


def test_they_follow_from_the_number_of_pictures(few):
    args = settled(few(100), "--val", "x")
    assert (args.batch_size, args.steps, args.val_every) == (8, 13 * defaults.EPOCHS, math.ceil(650 / 8))
    assert args.answers == "parallel" and args.augment and args.location_smoothing == 6
    assert args.lr == 5e-4 and args.min_lr == pytest.approx(1e-5)
    assert settled(few(3)).steps == 300 and settled(few(300)).steps == 900
    assert settled(few(300), "--val", "x").val_every == 113  # an eighth of the run is more than an epoch


def test_what_is_given_counts(few):
    given = "--answers sequence --batch-size 20 --lr 1e-4 --no-augment --warmup 7".split()
    args = settled(few(100), *given)
    assert args.answers == "sequence" and args.location_smoothing == 0 and not args.augment
    assert (args.batch_size, args.steps, args.lr, args.warmup) == (20, 300, 1e-4, 7)
    assert args.min_lr == pytest.approx(2e-6)
    assert settled(few(100), "--steps=40").steps == 40
    assert settled(few(100), "--lora").lr == 3e-3


def test_of_several_processes(few, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert settled(few(100)).batch_size == 6 and settled(few(100), "--accumulate", "4").batch_size == 12


def test_a_run_goes_on_as_it_began(few, tmp_path, monkeypatch):
    """On another number of processes, with more pictures by now, and whatever these defaults become."""
    began = settled(few(100), "--val", "x", "--steps", "40")
    (tmp_path / "run.json").write_text(json.dumps(as_json(began)))
    # Without a checkpoint it begins anew: options that ended in an error are not those of the next try.
    assert settled(few(100), "--out", str(tmp_path)).steps == 650
    (tmp_path / "step-0000001").mkdir()
    monkeypatch.setenv("WORLD_SIZE", "3")
    data, out = few(200), ("--out", str(tmp_path))
    goes_on = settled(data, *out, "--val", "x")
    assert (goes_on.batch_size, goes_on.steps, goes_on.val_every) == (8, 40, began.val_every)
    assert not changed_options(as_json(began), goes_on)
    assert settled(data, *out).val_every is None
    assert changed_options(as_json(began), settled(data, *out, "--lr", "1")) == ["--lr 0.0005"]


def test_large_sets_are_not_read_twice(few, tmp_path, monkeypatch):
    monkeypatch.setattr(defaults, "read_coco_index", lambda *_: pytest.fail("it was read"))
    monkeypatch.setattr(defaults, "LARGE", (100, 2))
    assert settled(few(100)).steps == 10_000
    folder = tmp_path / "yolo"
    for name in ("images", "labels"):
        (folder / name).mkdir(parents=True)
    (folder / "classes.txt").write_text("cat\n")
    for i in range(3):
        picture(folder / "images" / f"{i}.png")
        (folder / "labels" / f"{i}.txt").write_text("0 0.5 0.5 0.2 0.2\n")
    assert settled(folder).steps == 10_000


def test_a_wide_model_keeps_its_rate(few, monkeypatch):
    monkeypatch.setattr(defaults, "NANO_WIDTH", 100)
    args = settled(few(100))
    assert args.lr == 1e-5 and args.augment


def test_other_data_keeps_the_parsers_defaults(few, tmp_path, monkeypatch):
    plain = vars(arguments(["--model", "nano", "--out", "x", "--data", "x"]))
    lines = tmp_path / "a.jsonl"
    lines.write_text(json.dumps(dict(image="a.png", prefix="caption en", suffix="a cat")) + "\n")
    monkeypatch.setattr(defaults, "FEW", 99)
    for data in (few(100), lines, tmp_path / "none.json"):
        assert vars(settled(data)) == plain | dict(data=data)
