"""How answers are measured: exact match, CIDEr-D, mean IoU; the program on files."""

import json

import numpy as np
import pytest
import torch
from helpers import call, disc, picture, write_jsonl

from infer import evaluate_answers
from infer.evaluate_answers import cider_d, judge, overlap
from model.decoding.boxes import format_answer
from model.decoding.masks import crop, to_rle
from model.io.hub import CODEC, NANO

MASK, MOVED = disc(120, 80, 50, 40, 20), disc(120, 80, 60, 45, 20)
ELSEWHERE = disc(120, 80, 100, 20, 8)


def answer(mask, codec) -> str:
    y, x = np.nonzero(mask)
    box = np.array([[x.min(), y.min(), x.max() + 1, y.max() + 1]], float)
    codes = codec.encode(torch.from_numpy(crop(mask, box[0]))[None]).numpy()
    return format_answer(box, ["cat"], 120, 80, codes)


def test_cider_d():
    """10 for captions that are right, 0 for those that share nothing; figures of coco-caption's program."""
    right = [["a cat left of two dogs"], ["three people above a bus"], ["a red kite at the top left"]]
    assert cider_d([texts[0] for texts in right], right) == pytest.approx(10)
    assert cider_d(["zebra", "zebra", "zebra"], right) == 0
    said = ["a cat left of a dog", "two people above a bus", "a kite"]
    better = cider_d(["A cat, left of two dogs!", *said[1:]], right)
    assert 0 < cider_d(said, right) < better < 10
    # of coco-caption's own scorer (pycocoevalcap)
    assert cider_d(said, right) == pytest.approx(4.170767508276349)
    several = [right[0] + ["a cat and two dogs"], *right[1:]]
    assert cider_d(said, several) == pytest.approx(3.534315323953491)


def test_overlap(codec):
    said = answer(MASK, codec)
    assert overlap(said, MASK, codec) > 0.9
    assert overlap(f"{said} ; {answer(ELSEWHERE, codec)}", MASK, codec) == overlap(said, MASK, codec)
    assert overlap(said, MASK, codec, bins=1023) != overlap(said, MASK, codec)
    assert 0 < overlap(answer(MOVED, codec), MASK, codec) < 0.8
    assert overlap(answer(ELSEWHERE, codec), MASK, codec) == 0


def test_invalid_answers_score_nothing(codec):
    """Too few tokens, codes out of range, a box turned inside out."""
    said = answer(MASK, codec)
    locs, rest = said[:36], said[36:]
    for text in ("", "a cat", locs, said[: 36 + 15 * 8], said.replace("<seg", "<sag"), locs[9:] + rest):
        assert overlap(text, MASK, codec) == 0
    turned = locs[18:] + locs[:18] + rest
    assert overlap(turned, MASK, codec) == 0


def test_judge(codec):
    records = [
        dict(image="a", prefix="answer en how many?", suffix="2", kind="how many"),
        dict(image="a", prefix="answer en how many?", suffix=["3", "three"], kind="how many"),
        dict(image="a", prefix="answer en where?", suffix="top left", kind="where"),
        dict(image="a", prefix="caption en", suffix="a cat left of two dogs"),
        dict(image="b", prefix="caption en", suffix="a bus and a zebra"),
        dict(image="a", prefix="segment cat", suffix="", mask=to_rle(MASK)),
        dict(image="b", prefix="segment cat", suffix="", mask=to_rle(MASK)),
    ]
    said = [
        "2",
        "Three",
        "top right",
        "a cat left of two dogs",
        "a bus",
        answer(MASK, codec),
        "none",
    ]
    figures = judge(records, said, codec)
    assert figures["question"]["exact"] == 0.6667 and figures["question"]["lines"] == 3
    assert figures["question"]["kinds"] == {
        "how many": dict(exact=1.0, lines=2),
        "where": dict(exact=0.0, lines=1),
    }
    assert figures["caption"]["exact"] == 0.5 and 0 < figures["caption"]["CIDEr-D"] < 10
    assert 0.45 < figures["mask"]["mean IoU"] <= 0.5 and figures["mask"]["lines"] == 2


def run(monkeypatch, capsys, *argv):
    code, out, err = call(monkeypatch, capsys, evaluate_answers, *argv)
    return code, out, [line for line in err.splitlines() if "%|" not in line and line.strip()]


@pytest.fixture
def data(here):
    lines = [
        dict(image="a.png", prefix="caption en", suffix="a cat"),
        dict(image="a.png", prefix="answer en where is the cat?", suffix="top left"),
        dict(image="b.png", prefix="segment cat", suffix="", mask=to_rle(MASK)),
    ]
    for name in ("a.png", "b.png"):
        picture(here / "images" / name, 120, 80)
    return write_jsonl(here / "answers.jsonl", *lines)


def test_program(monkeypatch, capsys, model, data):
    argv = "--data", data, "--model", model, "--codec", NANO / CODEC, "--max-tokens", 30
    code, out, err = run(monkeypatch, capsys, *argv, "--json", "f.json", "--answers", "said.jsonl")
    assert (code, err) == (0, []) and "caption" in out and "mean IoU" in out
    figures = json.loads((data.parent / "f.json").read_text())["answers"]
    assert set(figures) == {"caption", "question", "mask"}
    said = [json.loads(line) for line in (data.parent / "said.jsonl").read_text().splitlines()]
    assert len(said) == 3 and all(isinstance(line["answer"], str) for line in said)


def test_practice_scenes(monkeypatch, capsys, model, here):
    argv = "--model", model, "--codec", NANO / CODEC, "--count", 3, "--sets", "vendor", "--max-tokens", 20
    code, out, err = run(monkeypatch, capsys, *argv)
    assert (code, err) == (0, []) and "unseen vendor" in out and "(3 lines)" in out
    assert list(here.iterdir()) == []


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (dict(image="a.png", prefix="segment cat", suffix=""), "mask"),
        (dict(image="a.png", prefix="segment cat", suffix="", mask=dict(size=3)), "mask"),
        (dict(image="a.png", prefix="detect cat", suffix=""), "detect cat"),
        (dict(image="none.png", prefix="caption en", suffix=""), "none.png"),
        (dict(image="a.png", suffix=""), "prefix"),
    ],
)
def test_mistakes(monkeypatch, capsys, model, data, line, words):
    data.write_text(json.dumps(line) + "\n")
    argv = "--data", data, "--model", model, "--codec", NANO / CODEC, "--max-tokens", 5
    code, _, err = run(monkeypatch, capsys, *argv)
    assert code == 1 and len(err) == 1 and err[0].startswith("evaluate_answers.py: ") and words in err[0]
