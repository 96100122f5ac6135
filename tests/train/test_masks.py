"""Masks from files to lines of tokens: every form they come in, and all that can be wrong with them."""

import json
from pathlib import Path

import numpy as np
import pytest
from helpers import call, complaint, write_jsonl
from PIL import Image
from pycocotools.mask import decode

from model.decoding.boxes import parse_answer
from model.decoding.masks import from_rle, to_rle
from model.io.hub import CODEC, NANO
from train import convert

WIDTH, HEIGHT = 100, 60


def rectangle(x0=20, y0=10, x1=60, y1=40):
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[y0:y1, x0:x1] = True
    return mask


def uncompressed(mask) -> dict:
    """COCO's run-length encoding as a list of counts, column by column, first the zeros."""
    flat = np.concatenate(([0], mask.T.ravel(), [2]))
    edges = np.flatnonzero(np.diff(flat) != 0)
    counts = np.diff(np.concatenate(([0], edges)))
    return dict(size=list(mask.shape), counts=counts.tolist())


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    for name in ("a.png", "b.png"):
        Image.new("RGB", (WIDTH, HEIGHT), "grey").save(tmp_path / "images" / name)
    return tmp_path


def coco_file(folder, *segmentations, crowd=0, width=WIDTH) -> Path:
    data = dict(
        images=[dict(id=7, file_name="a.png", width=width, height=HEIGHT)],
        categories=[dict(id=3, name="traffic light")],
        annotations=[
            dict(id=900 + k, image_id=7, category_id=3, iscrowd=crowd, segmentation=form)
            for k, form in enumerate(segmentations)
        ],
    )
    file = folder / "instances.json"
    file.write_text(json.dumps(data))
    return file


@pytest.fixture
def run(folder, monkeypatch, capsys):
    """masks-to-jsonl on a file: the lines that were written, and the complaint."""

    def run(data, *options) -> tuple[list[dict], str]:
        out = folder / "out.jsonl"
        argv = ["masks-to-jsonl", "--data", data, "--images", folder / "images", "--out", out, "--force"]
        code, run.printed, complaint = call(monkeypatch, capsys, convert, *argv, *options)
        assert code == 0 or complaint
        return [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else [], complaint

    return run


def masks_file(folder, **record) -> Path:
    return write_jsonl(folder / "masks.jsonl", record)


FORMS = {
    "polygon": lambda: [[20, 10, 60, 10, 60, 40, 20, 40]],
    "two polygons": lambda: [[20, 10, 40, 10, 40, 40, 20, 40], [40, 10, 60, 10, 60, 40, 40, 40]],
    "compressed": lambda: to_rle(rectangle()),
    "uncompressed": lambda: uncompressed(rectangle()),
}


@pytest.mark.parametrize("form", FORMS)
def test_coco(folder, run, form):
    """One box and 16 codes, the whole mask beside them."""
    (line,), said = run(coco_file(folder, FORMS[form]()))
    assert not said and (line["image"], line["prefix"]) == ("a.png", "segment traffic light")
    ((found),) = parse_answer(line["suffix"])
    assert found.label == "traffic light" and len(found.seg) == 16
    assert found.locs == tuple(round(1024 * x) for x in (10 / 60, 20 / 100, 40 / 60, 60 / 100))
    assert np.array_equal(from_rle(line["mask"]), rectangle())


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "I;16"])
def test_pictures(folder, run, mode):
    mask = rectangle()
    if mode == "I;16":
        Image.fromarray(mask.astype(np.uint16) * 65535).save(folder / "m.png")
    else:
        Image.fromarray(mask).convert(mode).save(folder / "m.png")
    (line,), said = run(masks_file(folder, image="b.png", label="cat", mask="m.png"))
    assert not said and line["prefix"] == "segment cat"
    assert np.array_equal(from_rle(line["mask"]), rectangle())


def test_lines_and_sheet(folder, run):
    """A line for each class of an image; of more objects than --most, none; what comes back is told."""
    masks = [to_rle(rectangle(5 * k, 5, 5 * k + 20, 50)) for k in range(4)]
    lines, said = run(coco_file(folder, *masks[:3]), "--sheet", folder / "sheet.png", "--most", 3)
    assert not said and len(lines) == 1 and len(parse_answer(lines[0]["suffix"])) == 3
    assert "mask" not in lines[0] and Image.open(folder / "sheet.png").width > 300
    assert "3 objects in 1 lines" in run.printed
    assert float(run.printed.split("reconstructions ")[1].split(";")[0]) > 0.8
    assert not list(folder.glob(".*"))
    lines, said = run(coco_file(folder, *masks), "--most", 3)
    assert lines == [] and "4 of classes with more than 3" in run.printed
    assert "4 of 4 objects left out" in said and "--most 4 keeps all" in said
    argv = ["masks-to-jsonl", *f"--data x --out {folder}/new.jsonl --sheet {folder}/sheet.png".split()]
    assert "sheet.png exists: choose another" in complaint(convert.main, argv)


def test_crowds_are_left_out(folder, run):
    assert run(coco_file(folder, to_rle(rectangle()), crowd=1)) == ([], "")


FAULTS = {
    "empty": (to_rle(np.zeros((HEIGHT, WIDTH), bool)), "empty"),
    "full": (to_rle(np.ones((HEIGHT, WIDTH), bool)), "whole image"),
    "size": (to_rle(np.eye(30, 40, dtype=bool)), "40 x 30 pixels, its image 100 x 60"),
    "none": (None, "no segmentation"),
    "no polygon": ([[1, 2, 3, 4]], "polygon"),
    "odd polygon": ([[1, 2, 3, 4, 5, 6, 7]], "polygon"),
    "nested polygon": ([[[1, 2], [3, 4], [5, 6]]], "polygon"),
    "words": ([["a", 2, 3, 4, 5, 6]], "polygon"),
    "null": ([[1, 2, None, 4, 5, 6]], "polygon"),
    "not a number": ([[float("nan"), 2, 3, 4, 5, 6]], "polygon"),
    "far away": ([[1, 2, 1e12, 4, 5, 6]], "polygon"),
    "no counts": (dict(size=[HEIGHT, WIDTH]), "run-length"),
    "empty counts": (dict(size=[HEIGHT, WIDTH], counts=""), "do not fill"),
    "few counts": (dict(size=[HEIGHT, WIDTH], counts=[10]), "do not fill"),
    "negative counts": (dict(size=[HEIGHT, WIDTH], counts=[-10, HEIGHT * WIDTH + 10]), "do not fill"),
    "negative size": (dict(size=[-HEIGHT, -WIDTH], counts=[10, HEIGHT * WIDTH - 10]), "do not fill"),
    "huge": (dict(size=[2 * 10**6] * 2, counts=[4 * 10**12]), "2000000 x 2000000 pixels, its image 100 x 60"),
    "endless": (dict(size=[HEIGHT, WIDTH], counts="o" * 100_000), "more than 60 bits"),
    "fractions": (dict(size=[HEIGHT, WIDTH], counts=[10.0, HEIGHT * WIDTH - 10]), "do not fill"),
    "outside": ([[200, 200, 220, 200, 220, 230]], "empty"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_of_coco(folder, run, fault):
    """Told with the annotation; nothing is written; --skip-bad goes on without it."""
    form, words = FAULTS[fault]
    data = coco_file(folder, to_rle(rectangle()), form)
    lines, said = run(data)
    assert (
        lines == []
        and said.startswith("convert.py: ")
        and words in said
        and "annotation 901 of image 7" in said
    )
    lines, said = run(data, "--skip-bad")
    assert len(lines) == 1 and not said


def test_image_of_another_size(folder, run):
    """Polygons do not tell which size they are for: the file's record does."""
    lines, said = run(coco_file(folder, FORMS["polygon"](), width=2 * WIDTH))
    assert lines == [] and "200 x 60 pixels, it has 100 x 60" in said


@pytest.mark.parametrize(
    ("part", "change", "words"),
    [
        ("categories", dict(name="c;t"), "c;t"),
        (
            "images",
            dict(file_name="../a.png"),
            "image 7: file_name '../a.png' leaves",
        ),  # more in test_data.py
        ("annotations", dict(segmentation=3), "annotation 900"),
    ],
)
def test_malformed_coco(folder, run, part, change, words):
    file = coco_file(folder, to_rle(rectangle()))
    data = json.loads(file.read_text())
    data[part][0] |= change
    file.write_text(json.dumps(data))
    lines, said = run(file)
    assert lines == [] and said.startswith("convert.py: ") and words in said and said.count("\n") == 1


def picture(folder, pixels, name="m.png"):
    Image.fromarray(pixels).save(folder / name)


@pytest.mark.parametrize(
    ("pixels", "words"),
    [
        (np.zeros((HEIGHT, WIDTH), np.uint8), "empty"),
        (np.full((HEIGHT, WIDTH), 255, np.uint8), "whole image"),
        (np.eye(30, 40, dtype=np.uint8), "40 x 30 pixels, its image 100 x 60"),
        (np.arange(HEIGHT * WIDTH, dtype=np.uint8).reshape(HEIGHT, WIDTH), "values 0, 1, 2, 3"),
        (np.where(rectangle(), 255, 9).astype(np.uint8), "values 9, 255"),
        (np.stack([rectangle() * 200, rectangle() * 100, rectangle() * 0], -1).astype(np.uint8), "colours"),
    ],
)
def test_faults_of_pictures(folder, run, pixels, words):
    picture(folder, pixels)
    lines, said = run(masks_file(folder, image="a.png", label="cat", mask="m.png"))
    assert lines == [] and words in said and "masks.jsonl:1" in said and said.count("\n") == 1


@pytest.mark.parametrize(
    ("record", "words"),
    [
        (dict(image="a.png", label="cat", mask="none.png"), "none.png: no such file"),
        (dict(image="a.png", label="cat", mask="masks.jsonl"), "not a readable image"),
        (dict(image="c.png", label="cat", mask="m.png"), "c.png"),
        (dict(image="a.png", label="c;t", mask="m.png"), "c;t"),
        (dict(image="a.png", label="", mask="m.png"), "must be text"),
        (dict(image="a.png", mask="m.png"), "label"),
    ],
)
def test_faults_of_lines(folder, run, record, words):
    picture(folder, rectangle().astype(np.uint8))
    lines, said = run(masks_file(folder, **record))
    assert lines == [] and said.startswith("convert.py: ") and words in said and said.count("\n") == 1


@pytest.mark.parametrize("line", [b"caf\xe9", b"[" * 100_000])
def test_a_line_that_is_no_json(folder, run, line):
    picture(folder, rectangle().astype(np.uint8))
    file = masks_file(folder, image="a.png", label="cat", mask="m.png")
    with open(file, "ab") as handle:
        handle.write(line)
    lines, said = run(file)
    assert lines == [] and f"{file}:2: not" in said and said.count("\n") == 1


def test_codec_is_checked(folder, run):
    _, said = run(coco_file(folder, to_rle(rectangle())), "--codec", folder / "none.npz")
    assert "none.npz: no such file" in said and (NANO / CODEC).exists()


def test_run_lengths():
    """Both ways, and from a list of counts; pycocotools reads and writes the same."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        mask = rng.random(rng.integers(1, 90, 2)) < rng.choice([0, 0.02, 0.5, 0.98, 1])
        rle = to_rle(mask)
        assert decode(rle).astype(bool).tolist() == mask.tolist()
        assert from_rle(rle).tolist() == mask.tolist() == from_rle(uncompressed(mask)).tolist()
