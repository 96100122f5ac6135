"""The converters between COCO files and JSON lines."""

import json
import urllib.parse
from pathlib import Path

import numpy as np
import pytest
from helpers import call, edit_json, write_jsonl
from PIL import Image
from training import CAT, HEIGHT, LIGHT, WIDTH, broken

from infer import detect
from model.decoding.boxes import parse_answer
from model.io.tokenizer import LOCS
from train import convert
from train.data.coco import CocoIndex
from train.data.jsonl import is_jsonl, read_lines

A, B = "<loc0010><loc0020><loc0030><loc0040>", "<loc0000><loc0000><loc1023><loc1023>"


def test_round_trip(folder, capsys):
    """COCO -> lines -> COCO: names, sizes and classes are the same, boxes are within half a location."""
    source, lines, back = folder / "instances.json", folder / "out.jsonl", folder / "back.json"
    convert.main(["coco-to-jsonl", "--data", str(source), "--out", str(lines)])
    assert (
        "2 lines of 3 images; 1 images without a line, skipped 1 crowd and 3 deg" in capsys.readouterr().out
    )
    assert is_jsonl(lines) and "<loc1024>" not in lines.read_text()
    convert.main(
        ["jsonl-to-coco", "--data", str(lines), "--images", str(folder / "images"), "--out", str(back)]
    )
    assert "4 boxes of 3 categories in 2 images; skipped 0 boxes" in capsys.readouterr().out
    before, after = CocoIndex.read(source), CocoIndex.read(back, folder / "images")
    assert after.classes == ("bird", "cat", "traffic light")
    for row, old in enumerate((0, 2)):  # the image without objects has no line
        assert after.name(row) == before.name(old) and after.sizes[row].equal(before.sizes[old])
        (boxes, labels), (old_boxes, old_labels) = after.objects(row), before.objects(old)
        assert [after.classes[i] for i in labels] == [before.classes[i] for i in old_labels]
        bins = before.sizes[old].repeat(2).numpy() / LOCS
        assert (np.abs(boxes - old_boxes) <= bins / 2 + 1e-9).all()


def test_counts_of_one_image(folder, capsys):
    source = folder / "instances.json"
    edit_json(source, lambda data: data.update(images=data["images"][:1], annotations=[]))
    convert.main(["to-jsonl", "--data", str(source), "--out", str(folder / "out.jsonl"), "--absent", "9"])
    printed = capsys.readouterr()
    assert "1 lines of 1 images; 0 images without a line" in printed.out
    assert "1 of 1 images lack fewer" in printed.err


@pytest.mark.parametrize("most", [None, 1, 2])
def test_absent_classes(folder, most):
    """Each class of an image is asked for once, with N others, at most K a line; each answers for its own."""
    lines = folder / "out.jsonl"
    options = ["coco-to-jsonl", "--data", str(folder / "instances.json"), "--absent", "1"]
    options += ["--classes-per-line", str(most)] if most else []
    convert.main([*options, "--out", str(lines)])
    asked = {}
    for _, record in read_lines(lines, folder / "images"):
        names = record["prefix"].removeprefix("detect ").split(" ; ")
        assert len(names) <= (most or 3) and {box.label for box in parse_answer(record["suffix"])} <= set(
            names
        )
        asked.setdefault(record["image"], []).extend(names)
    assert sorted(asked["a.png"]) == sorted(asked["sub/c.png"]) == ["bird", "cat", "traffic light"]
    assert len(asked["b.png"]) == 1
    text = lines.read_text()
    convert.main([*options, "--out", str(lines), "--force"])
    assert lines.read_text() == text
    orders = set()
    for seed in range(8):
        convert.main([*options, "--out", str(lines), "--force", "--seed", str(seed)])
        orders.add(lines.read_text())
    assert len(orders) > 1


def test_lines_to_coco(folder, capsys):
    """Several lines of an image become one; what is no box with a label is counted."""
    suffix = f"{A} cat ; {B} ; <loc0005> dog ; <loc0009><loc0001><loc0009><loc0004> cat"
    file = write_jsonl(
        folder / "train.jsonl", CAT | dict(suffix=suffix), LIGHT, CAT | dict(suffix=[f"{B} dog", "x"]), CAT
    )
    out = folder / "back.json"
    convert.main(
        ["jsonl-to-coco", "--data", str(file), "--images", str(folder / "images"), "--out", str(out)]
    )
    assert (
        "3 boxes of 3 categories in 2 images; skipped 1 boxes without a label, 1 degenerate ones and 1 loc"
        in (capsys.readouterr().out)
    )
    data = json.loads(out.read_text())
    assert [(c["id"], c["name"]) for c in data["categories"]] == [(1, "bé"), (2, "cat"), (3, "dog")]
    assert [(a["image_id"], a["category_id"]) for a in data["annotations"]] == [(1, 2), (2, 1), (1, 3)]
    assert data["annotations"][2]["bbox"] == [0, 0, WIDTH, HEIGHT]


def test_converter_errors(folder, monkeypatch, capsys):
    """One line, exit code 1, nothing written and nothing overwritten."""
    source, out = str(folder / "instances.json"), folder / "out.jsonl"
    semicolon = folder / "semicolon.json"
    semicolon.write_text(json.dumps(broken("categories", 0, name="a;b")))
    bad = write_jsonl(folder / "train.jsonl", CAT, "{")
    back = ["jsonl-to-coco", "--images", str(folder / "images"), "--out", str(out), "--data"]
    forth = ["coco-to-jsonl", "--out", str(out), "--data"]
    for command, message in (
        ([*forth, str(folder / "none.json")], "none.json"),
        ([*forth, str(bad)], "not a COCO annotation file"),
        ([*forth, str(semicolon)], "'a;b'"),
        ([*forth, source, "--absent", "-1"], "--absent"),
        ([*forth, source, "--classes-per-line", "0"], "argument --classes-per-line: "),
        ([*forth, source, "--abs", "1"], "unrecognized arguments: --abs"),
        ([*forth[:2], str(folder / "no/out.jsonl"), "--data", source], "no such folder"),
        ([*forth[:2], source, "--data", source], "exists"),
        ([*back, str(bad)], "train.jsonl:2: not JSON"),
        (
            [*back, str(write_jsonl(folder / "images" / "train.jsonl", CAT | dict(image="x.png")))],
            "x.png: no such file",
        ),
    ):
        code, printed, complaint = call(monkeypatch, capsys, convert, *command)
        assert message in complaint and not printed and not out.exists() and not list(folder.glob(".out*"))
        if "usage: " not in complaint:  # argparse's own
            assert code == 1 and complaint.startswith("convert.py: ") and complaint.count("\n") == 1
    assert json.loads(Path(source).read_text())["images"]


def test_annotations_for_label_studio(folder):
    """In percent of the picture: the boxes of the file come back, in any units."""
    source, out = folder / "instances.json", folder / "tasks.json"
    url = "/data/local-files/?d=photos/"
    convert.main(["label-studio", "--data", str(source), "--out", str(out), "--url", url])
    tasks, index = json.loads(out.read_text()), CocoIndex.read(source)
    assert len(tasks) == len(index) == 3
    for row, task in enumerate(tasks):
        assert urllib.parse.unquote(task["data"]["image"]) == url + index.name(row)
        [annotation] = task["annotations"]
        boxes, labels = index.objects(row)
        size = np.tile(index.sizes[row].numpy(), 2) / 100
        for region, box, label in zip(annotation["result"], boxes, labels, strict=True):
            value = region["value"]
            sides = [value[side] for side in ("x", "y", "width", "height")]
            assert np.allclose(sides * size, [*box[:2], *(box[2:] - box[:2])]) and max(sides) <= 100
            assert value["rectanglelabels"] == [index.classes[label]] and value["rotation"] == 0
            assert [region["original_width"], region["original_height"]] == index.sizes[row].tolist()
            assert (region["from_name"], region["to_name"], region["type"]) == (
                "label",
                "image",
                "rectanglelabels",
            )
        assert len({region["id"] for region in annotation["result"]}) == len(boxes)


def test_predictions_for_label_studio(folder, monkeypatch, capsys):
    """What detect.py found, with its scores; and what it did not write."""
    found, out, image = folder / "found.json", folder / "tasks.json", folder / "images" / "a b#.png"
    Image.effect_noise((200, 100), 80).save(image)
    options = "--image", image, "--json", found, "--out", folder / "drawn", "--score-threshold", 0
    assert call(monkeypatch, capsys, detect, *options)[0] == 0
    assert call(monkeypatch, capsys, convert, "label-studio", "--data", found, "--out", out)[0] == 0
    [task], [record] = json.loads(out.read_text()), json.loads(found.read_text())
    assert task["data"]["image"].endswith("/a%20b%23.png") and record["detections"]
    [prediction] = task["predictions"]
    for region, detection in zip(prediction["result"], record["detections"], strict=True):
        value, (x0, y0, x1, y1) = region["value"], detection["box"]
        assert np.allclose(
            [value["x"] * 2, value["y"], value["width"] * 2, value["height"]], [x0, y0, x1 - x0, y1 - y0]
        )
        assert region["score"] == detection["score"] and value["rectanglelabels"] == [detection["label"]]
    for wrong in ("[3]", '[{"image": "a"}]', '[{"width": 0, "height": 1}]', "[", "{}"):
        found.write_text(wrong)
        code, _, err = call(
            monkeypatch, capsys, convert, "label-studio", "--data", found, "--out", out, "--force"
        )
        assert code == 1 and err.count("\n") == 1 and "found.json is not" in err
