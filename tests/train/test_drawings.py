"""Lines that cross and creatures: what is said about a drawing is what is in it."""

import json
import re

import numpy as np
import pytest
from helpers import complaint
from PIL import ImageFilter

from train import convert
from train.data.jsonl import read_lines
from train.practice.creatures import COLOURS, make_creature
from train.practice.crossings import MIN_GAP, XS, draw_lines, make_crossing
from train.practice.drawings import write_drawings
from train.practice.sentences import NUMBERS


def turn(a, b, c):
    """On which side of a line through a and b the point c is."""
    return np.sign((b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0]))


def cross(a, b, c, d) -> bool:
    """Whether two segments do."""
    return turn(a, b, c) != turn(a, b, d) and turn(c, d, a) != turn(c, d, b)


@pytest.mark.parametrize("count", [0, 1, 2])
def test_crossings_by_geometry(count):
    """Each part of the one line against each of the other."""
    rng = np.random.default_rng(count)
    for _ in range(100):
        blue, red = (list(zip(XS, ys)) for ys in draw_lines(rng, count))
        found = sum(cross(*blue[i : i + 2], *red[j : j + 2]) for i in range(2) for j in range(2))
        assert found == count
        assert all(abs(b[1] - r[1]) >= MIN_GAP for b, r in zip(blue, red))


def test_crossings_by_pixels():
    """The line that is above changes as often as the answer says."""
    counts = []
    for seed in range(90):
        image, line = make_crossing(np.random.default_rng(seed), 128)
        r, g, b = np.asarray(image).astype(int).transpose(2, 0, 1)
        heights = []
        for lit in ((b > 180) & (r < 90) & (g < 90), (r > 180) & (b < 90) & (g < 90)):
            rows = np.arange(128)[:, None] * lit
            heights.append(np.where(lit.any(0), rows.sum(0) / np.maximum(lit.sum(0), 1), np.nan))
        gap = heights[0] - heights[1]
        above = gap[~np.isnan(gap) & (abs(gap) > 4)] > 0
        assert (above[1:] != above[:-1]).sum() == int(line["suffix"]), seed
        assert line["kind"] == f"{line['suffix']} crossings"
        counts.append(line["suffix"])
    assert all(counts.count(answer) > 15 for answer in "012")


def test_creatures():
    captions = set()
    for seed in range(40):
        image, line = make_creature(np.random.default_rng(seed), 128)
        pixels, mask = np.asarray(image).astype(int), np.asarray(line["mask"])
        assert set(np.unique(mask)) == {0, 255}
        near = np.asarray(line["mask"].filter(ImageFilter.MaxFilter(5)))
        assert pixels[near == 0].min() > 140 and pixels[mask > 0].min() < 40, (
            "pale outside, black lines inside"
        )
        colour, legs, eyes, horns = re.fullmatch(
            r"an? (\w+) creature with (\w+) legs, (\w+) eyes? and (no )?horns", line["suffix"]
        ).groups()
        body = [int(COLOURS[colour][i : i + 2], 16) for i in (1, 3, 5)]
        assert np.abs(np.median(pixels[mask > 0], 0) - body).max() < 6
        rows = np.flatnonzero(mask.any(1))
        bottom = np.diff(np.pad(mask[rows[-3]] > 0, 1).astype(int))
        assert (bottom == 1).sum() == NUMBERS.index(legs), "runs of pixels near the ground"
        columns = np.flatnonzero(mask.any(0))
        shape = (rows[-1] - rows[0]) / (columns[-1] - columns[0])
        assert (shape > 1.1) == (horns is None), "horns make it higher: 1 / 0.84, not 0.84 / 0.84"
        captions.add(line["suffix"])
    assert len(captions) > 30


def test_files(tmp_path):
    write_drawings("creatures", tmp_path / "a", (5, 3), size=48)
    write_drawings("creatures", tmp_path / "b", (5, 3), size=48)
    images = {}
    for part, count in (("train", 5), ("test", 3)):
        lines = [line for _, line in read_lines(tmp_path / f"a/{part}.jsonl", tmp_path / "a/images")]
        assert len(lines) == count and (tmp_path / f"b/{part}.jsonl").read_text().count("\n") == count
        for line in lines:
            one, two = ((tmp_path / name / "images" / line["image"]).read_bytes() for name in "ab")
            assert one == two, "the same arguments, the same bytes"
            images[line["image"]] = one
        out = tmp_path / f"a/{part}-codes.jsonl"
        convert.main(["masks-to-jsonl", "--data", str(tmp_path / f"a/{part}-masks.jsonl"), "--out", str(out)])
        codes = [json.loads(line) for line in out.read_text().splitlines()]
        assert [line["image"] for line in codes] == [line["image"] for line in lines]
        assert all(line["prefix"] == "segment creature" and line["mask"] for line in codes)
    assert len(set(images.values())) == 8, "no drawing is in both parts"


def test_mistakes(tmp_path):
    assert "--size 8" in complaint(write_drawings, "crossings", tmp_path / "new", (1, 1), 8)
    (tmp_path / "notes.txt").touch()
    assert "exists" in complaint(write_drawings, "crossings", tmp_path, (1, 1))
