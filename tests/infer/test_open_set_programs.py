"""detect.py and evaluate.py with classes by name, and segment.py."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers import BOX as A
from helpers import CODES as SEGS
from helpers import OTHER_BOX as B
from helpers import CannedAnswers, call, edit_json, picture
from PIL import Image

from infer import detect, evaluate, generate, segment
from infer.lib import options as loading
from model.decoding.masks import from_rle
from model.io.hub import CODEC, NANO


def run(monkeypatch, capsys, program, *argv):
    code, out, err = call(monkeypatch, capsys, program, *argv)
    return code, out, err.splitlines()


def test_detect_by_name(monkeypatch, capsys, model, here, tokenizer):
    """Writes what closed-set detection writes; class_id counts the classes asked for."""
    ask = CannedAnswers(tokenizer, {"detect cat ; traffic light": f"{A} traffic light ; {B} cat ; {B} dog"})
    monkeypatch.setattr(loading, "Prompter", lambda *_: ask)
    monkeypatch.setattr("model.decoding.open_set.fitting_batch", lambda *_: 4)
    argv = "--image", picture(here / "a.png"), "--model", model, "--classes", "cat ; traffic light"
    code, out, err = run(monkeypatch, capsys, detect, *argv, "--json", "out.json", "--tokens")
    assert (code, err) == (0, [])
    (record,) = json.loads((here / "out.json").read_text())
    assert set(record) == {"image", "width", "height", "detections", "tokens"}
    found = {(d["label"], d["class_id"], d["score"]) for d in record["detections"]}
    assert found == {("cat", 0, 0.9), ("traffic light", 1, 0.9)}


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--classes", "unicorn"], "unicorn"),
        (["--classes", ";"], "names no class"),
        (["--classes", "cat", "--groups", 3], "--groups"),
        (["--classes", "cat", "--early-stop", 0.5, 1], "--early-stop"),
        (["--classes", "cat", "--max-tokens", 100000], "positions"),
        (["--eos-offset", 1], "--eos-offset"),
        (["--temperature", -1], "temperature"),
    ],
)
def test_detect_mistakes(monkeypatch, capsys, model, here, options, word):
    argv = "--image", picture(here / "a.png"), "--model", model
    code, _, err = run(monkeypatch, capsys, detect, *argv, *options)
    assert code == 1 and len(err) == 1 and err[0].startswith("detect.py: ") and word in err[0]


def test_a_model_that_may_have_forgotten_words_says_so(monkeypatch, capsys, model, here):
    """In one line, when it is asked for them; not for what it was taught, and never of another checkpoint."""
    mine = shutil.copytree(model, here / "mine")
    edit_json(mine / "config.json", lambda raw: raw["detection"].update(closed_set_only=True))
    file = picture(here / "a.png")
    asked = (
        (detect, "--classes", "cat", "--max-tokens", 5),
        (generate, "--prompt", "caption en", "--max-tokens", 5),
    )
    for program, *options in (*asked, (detect,)):
        notes = []
        for folder in (mine, model):
            code, _, err = run(monkeypatch, capsys, program, "--image", file, "--model", folder, *options)
            assert code == 0
            notes.append(sum("trained on closed-set detection alone" in line for line in err))
        assert notes == ([1, 0] if options else [0, 0])


def test_evaluate_by_name(monkeypatch, capsys, model, coco):
    """All classes, so many a call, through pycocotools."""
    monkeypatch.chdir(coco.parent)
    for i in range(3):
        picture(coco.parent / "images" / f"{i}.png", 128, 128, seed=i)
    argv = "--model", model, "--data", coco, "--json", "f.json"
    code, out, _ = run(
        monkeypatch, capsys, evaluate, *argv, "--classes", "all", "--classes-per-call", 40, "--max-tokens", 8
    )
    assert not code and "mAP 0.000" in out
    assert json.loads(Path("f.json").read_text())["instances"]["images"] == 3


def test_segment(monkeypatch, capsys, model, here, tokenizer):
    """A drawing, a picture of each mask, and run-length encodings that are the same."""
    said = {"segment cat": f"{A}{SEGS} cat", "segment hair drier": f"{B}{SEGS} hair drier"}
    ask = CannedAnswers(tokenizer, said)
    monkeypatch.setattr(loading, "Prompter", lambda *_: ask)
    monkeypatch.setattr("model.decoding.open_set.fitting_batch", lambda *_: 4)
    argv = [
        "--image",
        picture(here / "a.png"),
        "--model",
        model,
        "--codec",
        NANO / CODEC,
        "--json",
        "out.json",
    ]
    argv += ["--classes", "cat ; hair drier"]
    code, out, err = run(monkeypatch, capsys, segment, *argv)
    assert (code, err) == (0, [])
    (record,) = json.loads((here / "out.json").read_text())
    names = {"a.png", "a.0-cat.png", "a.1-hair-drier.png"}
    assert {file.name for file in (here / "detections").iterdir()} == names
    for found in record["detections"]:
        mask = np.asarray(Image.open(here / found["mask"])) > 0
        assert mask.shape == (60, 90) and np.array_equal(from_rle(found["segmentation"]), mask)
        rows, columns = np.nonzero(mask)
        x0, y0, x1, y1 = found["box"]
        assert x0 - 1 <= columns.min() and columns.max() < x1 and y0 - 1 <= rows.min() and rows.max() < y1


def test_segment_needs_a_codec(monkeypatch, capsys, model, here):
    argv = "--image", picture(here / "a.png"), "--model", model, "--classes", "cat"
    for options, word in (([], "vae-oid.npz"), (["--codec", here / "a.png"], "a.png")):
        code, _, err = run(monkeypatch, capsys, segment, *argv, *options)
        assert code == 1 and len(err) == 1 and err[0].startswith("segment.py: ") and word in err[0]


@pytest.mark.parametrize("option", ["--decode=parallel", "--branches=4", "--groups=3"])
def test_segment_has_no_closed_set(monkeypatch, capsys, here, option):
    """Masks are asked for by name, so how the closed-set language is decoded is no option of it."""
    code, _, err = run(monkeypatch, capsys, segment, "--image", "a.png", "--classes", "cat", option)
    assert code == 2 and f"unrecognized arguments: {option}" in err[-1]
