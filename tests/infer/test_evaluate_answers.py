"""evaluate_answers.py on files and on practice scenes."""

import json
from pathlib import Path

import pytest
import torch
from helpers import call, disc, picture, write_jsonl
from PIL import Image

from infer import evaluate_answers
from infer.lib.answers import GAP, SIDE, answer_tile
from model.decoding.boxes import format_answer
from model.decoding.masks import crop, tight_box, to_rle
from model.io.hub import CODEC, NANO

MASK = disc(120, 80, 50, 40, 20)


def run(monkeypatch, capsys, *argv):
    code, out, err = call(monkeypatch, capsys, evaluate_answers, *argv)
    return code, out, [line for line in err.splitlines() if "%|" not in line and line.strip()]


@pytest.fixture
def data(here):
    lines = [
        dict(image="a.png", prefix="caption en", suffix="a cat"),
        dict(image="a.png", prefix="answer en where is the cat?", suffix="top left"),
        dict(image="b.png", prefix="segment cat", suffix="", mask=to_rle(MASK)),
        dict(image="b.png", prefix="how many lines cross?", suffix="2"),
    ]
    for name in ("a.png", "b.png"):
        picture(here / "images" / name, 120, 80)
    return write_jsonl(here / "answers.jsonl", *lines)


def test_program(monkeypatch, capsys, model, data):
    argv = "--data", data, "--model", model, "--codec", NANO / CODEC, "--max-tokens", 30
    files = "--json", "f.json", "--answers", "said.jsonl", "--sheet", "sheet.png", "--sheet-count", 3
    code, out, err = run(monkeypatch, capsys, *argv, *files)
    assert Image.open("sheet.png").width == 3 * (SIDE + GAP) + GAP
    assert (code, err) == (0, []) and "caption" in out and "mean IoU" in out
    figures = json.loads((data.parent / "f.json").read_text())["answers"]
    assert set(figures) == {"caption", "question", "mask", "other"} and "other" in out
    said = [json.loads(line) for line in (data.parent / "said.jsonl").read_text().splitlines()]
    assert len(said) == 4 and all(isinstance(line["answer"], str) for line in said)


def test_tiles_say_what_is_right(codec):
    """In words, and of masks by what is darkened."""
    image, line = Image.new("RGB", (120, 80), "white"), dict(prefix="", suffix=["2", "two"])
    assert answer_tile(line | dict(answer="Two"), image, None, 1024)[1] == ["right: Two"]
    assert answer_tile(line | dict(answer="1"), image, None, 1024)[1] == ["wrong: 1", "should be: 2"]
    line = dict(prefix="", suffix="", mask=to_rle(MASK), answer="")
    assert answer_tile(line, image, codec, 1024)[1] == ["no mask found"]
    box = tight_box(MASK)
    codes = codec.encode(torch.from_numpy(crop(MASK, box))[None]).numpy()
    line["answer"] = format_answer(box[None], ["cat"], 120, 80, codes)
    tile, (text,) = answer_tile(line, image, codec, 1024)
    assert float(text.removeprefix("IoU ")) > 0.8
    assert tile.getpixel((SIDE * 50 // 120, SIDE * 40 // 80)) == (255, 255, 255)
    assert tile.getpixel((SIDE // 2, SIDE * 75 // 80)) == (63, 63, 63)


def test_practice_scenes(monkeypatch, capsys, model, here):
    argv = "--model", model, "--codec", NANO / CODEC, "--count", 3, "--sets", "vendor", "--max-tokens", 20
    code, out, err = run(monkeypatch, capsys, *argv)
    assert (code, err) == (0, []) and "unseen vendor" in out and "(3 lines)" in out
    assert list(here.iterdir()) == []


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (dict(image="a.png", prefix="segment cat", suffix="", mask=dict(size=3)), "mask"),
        (
            dict(
                image="a.png", prefix="segment cat", suffix="", mask=dict(size=[10**6] * 2, counts=[10**12])
            ),
            "a mask of 1000000 x 1000000 pixels, but 120 x 80",
        ),
        (dict(image="none.png", prefix="caption en", suffix=""), "none.png"),
        (dict(image="a.png", suffix=""), "prefix"),
        (dict(image="a.png", prefix="caption" + " en" * 3000, suffix=""), "answers.jsonl: prompt and answer"),
    ],
)
def test_mistakes(monkeypatch, capsys, model, data, line, words):
    data.write_text(json.dumps(line) + "\n")
    argv = "--data", data, "--model", model, "--codec", NANO / CODEC, "--max-tokens", 5
    code, _, err = run(monkeypatch, capsys, *argv)
    assert code == 1 and len(err) == 1 and err[0].startswith("evaluate_answers.py: ") and words in err[0]


def test_images_of_no_data(monkeypatch, capsys):
    code, _, (err,) = run(monkeypatch, capsys, "--images", "pictures")
    assert code == 1 and "--data, which is missing" in err


@pytest.mark.parametrize("option", ["--json", "--answers", "--sheet"])
def test_the_data_is_not_replaced(monkeypatch, capsys, model, data, option):
    before = data.read_text()
    code, _, (err,) = run(monkeypatch, capsys, "--data", data, "--model", model, option, data)
    assert code == 1 and f"{option} {data}: is one of the files" in err and data.read_text() == before


def test_skip_broken(monkeypatch, capsys, model, data):
    """As if the lines of such pictures were not in the file; without the option, no figures."""
    argv = "--model", model, "--codec", NANO / CODEC, "--max-tokens", 5, "--json", "f.json", "--answers"
    assert run(monkeypatch, capsys, "--data", data, *argv, "good.jsonl")[0] == 0
    wanted = json.loads(Path("f.json").read_text())["answers"]
    good = Path("good.jsonl").read_text()
    lines = data.read_text() + json.dumps(dict(image="c.png", prefix="caption en", suffix="a dog")) + "\n"
    wrong = dict(image="d.png", prefix="segment cat", suffix="", mask=to_rle(MASK))
    data.write_text(lines + json.dumps(wrong) + "\n")
    Path("images/c.png").write_text("no picture")
    picture(Path("images/d.png"), 60, 80)
    code, out, err = run(monkeypatch, capsys, "--data", data, *argv, "a.jsonl")
    assert code == 1 and out == "" and "c.png: not a readable image" in err[-1] and "--skip-broken" in err[-1]
    code, out, err = run(monkeypatch, capsys, "--data", data, *argv, "a.jsonl", "--skip-broken")
    assert code == 0 and out.startswith("answers; 2 of 4 pictures left out as broken\n") and len(err) == 2
    figures = json.loads(Path("f.json").read_text())["answers"]
    skipped = figures.pop("skipped")
    assert (
        list(skipped) == ["c.png", "d.png"] and "a mask of 120 x 80 pixels, but 60 x 80" in skipped["d.png"]
    )
    assert figures == wanted and Path("a.jsonl").read_text() == good
    for file in Path("images").iterdir():
        file.write_text("no picture")
    code, out, err = run(monkeypatch, capsys, "--data", data, *argv, "a.jsonl", "--skip-broken")
    assert code == 1 and "none of its pictures can be used" in err[-1]
