"""JSON lines: pairs of a prompt and an answer, and all that can be wrong with them."""

import json
import os
import re
from pathlib import Path

import pytest
import torch
from helpers import complaint_about, write_jsonl
from PIL import Image
from torch.utils.data import DataLoader
from training import CAT, LIGHT, instances

from model.io.tokenizer import Tokenizer
from model.io.writing import each_line
from train.data.jsonl import JsonlPairs, is_jsonl, read_lines
from train.data.masks import read_outlines
from train.data.records import read_records

SIZE = 32


BLUE = (0, 0, 255)


@pytest.fixture(scope="module")
def tokenizer(tokenizer_file):
    return Tokenizer(tokenizer_file)


def test_pairs(folder, tokenizer):
    """Text and labels line up; blank lines and other keys do no harm; answers are drawn from a list."""
    several = dict(image="b.png", prefix="", suffix=["cow", "a long traffic light", ""])
    file = write_jsonl(
        folder / "train.jsonl",
        "",
        CAT | dict(id=7),
        "  ",
        json.dumps(LIGHT, ensure_ascii=False) + "\r",
        several,
    )
    data = JsonlPairs(file, folder / "images", tokenizer, SIZE)
    assert len(data) == 3 and [data.name(i) for i in range(3)] == ["a.png", "sub/c.png", "b.png"]
    for item, record in enumerate((CAT, LIGHT)):
        sample = data[5, item]
        prompt, answer = tokenizer.encode_prompt(record["prefix"]), tokenizer.encode(record["suffix"])
        assert sample["text"].tolist() == prompt + answer and sample["prefix_len"] == len(prompt)
        before = [0] * (len(prompt) - 1)
        assert sample["labels"].tolist() == before + answer + [tokenizer.eos]
        assert sample["weights"].tolist() == before + [1] * (len(answer) + 1)
        assert sample["image"].shape == (SIZE, SIZE, 3) and sample["labels"].dtype == torch.int64
    seen = {tokenizer.decode(data[draw, 2]["text"].tolist()[2:]) for draw in range(30)}
    assert seen == set(several["suffix"])
    texts = [data[draw, item]["text"] for item in range(3) for draw in range(30)]
    assert data.text_tokens == max(map(len, texts))
    assert data.offsets.is_shared()


def test_pairs_depend_on_the_key_alone(folder, tokenizer):
    """With two workers as with none; augmentation changes colours and nothing else."""
    file = write_jsonl(folder / "train.jsonl", CAT, LIGHT | dict(suffix=["x", "y", "z"]))
    plain, data = (JsonlPairs(file, folder / "images", tokenizer, SIZE, augment=on) for on in (False, True))
    keys = [(draw, draw % 2) for draw in range(12)]
    for key, other in zip(keys, DataLoader(data, batch_size=None, sampler=keys, num_workers=2), strict=True):
        assert all(torch.equal(tensor, other[name]) for name, tensor in data[key].items())
    changed = [not torch.equal(data[draw, 0]["image"], plain[draw, 0]["image"]) for draw in range(20)]
    assert any(changed) and not all(changed)
    assert all(torch.equal(data[draw, 0]["text"], plain[draw, 0]["text"]) for draw in range(20))


BAD_LINES = {
    "not JSON (": "{'image': 1}",
    "not a JSON object: [1]": [1],
    "not JSON (it is nested": "[" * 100_000,
    "no 'image'": dict(prefix="", suffix=""),
    "no 'prefix'": dict(image="a.png", suffix=""),
    "no 'suffix'": dict(image="a.png", prefix=""),
    "'image' must be text, not 3": CAT | dict(image=3),
    "'prefix' must be text, not None": CAT | dict(prefix=None),
    "'suffix' must be text, or a list of texts, not {": CAT | dict(suffix={}),
    "'suffix' must be text, or a list of texts, not []": CAT | dict(suffix=[]),
    "'suffix' must be text, or a list of texts, not ['a', 1]": CAT | dict(suffix=["a", 1]),
    "'image' is empty": CAT | dict(image=""),
    "'../secret.png' lies outside": CAT | dict(image="../secret.png"),
    "'sub/../../secret.png' lies outside": CAT | dict(image="sub/../../secret.png"),
    "'link.png' lies outside": CAT | dict(image="link.png"),
    "'prefix' is not text: 'caption \\ud800'": CAT | dict(prefix="caption \ud800"),
    "'suffix' is not text": CAT | dict(suffix=["a cat", "\udcff"]),
    "lies outside the image folder": CAT | dict(image=str(Path.cwd() / "a.png")),
}


@pytest.mark.parametrize("message", BAD_LINES)
def test_bad_lines(folder, tokenizer, message):
    """Found before training, with file and line; outside paths only where they are allowed."""
    Image.new("RGB", (9, 9), BLUE).save(folder / "secret.png")
    (folder / "images/link.png").symlink_to(folder / "secret.png")
    file = write_jsonl(folder / "train.jsonl", CAT, "", BAD_LINES[message], CAT)
    with pytest.raises(ValueError, match=re.escape(f"{file}:3: ") + ".*" + re.escape(message)):
        JsonlPairs(file, folder / "images", tokenizer, SIZE)
    if "secret" in message or "link" in message:
        data = JsonlPairs(file, folder / "images", tokenizer, SIZE, allow_outside=True)
        assert (data[0, 1]["image"] == torch.tensor(BLUE)).all()


@pytest.mark.parametrize("name", ["../secret.png", "link.png", "/etc/passwd"])
@pytest.mark.parametrize("key", ["image", "mask"])
def test_lines_of_masks_open_nothing_outside(key, name, folder):
    (folder / "secret.png").touch()
    (folder / "images/link.png").symlink_to(folder / "secret.png")
    line = dict(image="a.png", label="cat", mask="a.png") | {key: name}
    file = write_jsonl(folder / "images" / "masks.jsonl", line)
    with pytest.raises(
        ValueError, match=re.escape(f"{file}:1: {key} '{name}' lies outside the {key} folder")
    ):
        list(read_outlines(file, folder / "images"))


def test_no_lines(folder, tokenizer):
    with pytest.raises(ValueError, match="has no lines"):
        JsonlPairs(write_jsonl(folder / "train.jsonl", "", " "), folder / "images", tokenizer, SIZE)


def test_is_jsonl(folder):
    """By content: COCO files on one line or many are none, broken first lines of pairs are."""
    for text, expected in (
        (json.dumps(CAT) + "\n" + json.dumps(CAT), True),
        ("\n\n" + json.dumps(dict(id=3) | CAT), True),
        ('{"image": "a.png", prefix: "x"}\n', True),
        (json.dumps(dict(label="cat", mask="m.png", image="a.png")), True),  # a line of masks
        (json.dumps(dict(label="cat", mask="m.png")), True),
        (json.dumps(instances()), False),
        (json.dumps(instances(), indent=2), False),
        (json.dumps([CAT]), False),
        ("", False),
        ("[" * 100_000, False),
        ("\x00\xff", False),
    ):
        (folder / "some.txt").write_text(text, encoding="latin-1")
        assert is_jsonl(folder / "some.txt") == expected, text


READERS = {
    "is_jsonl": is_jsonl,
    "lines": lambda file: list(read_lines(file, file.parent)),
    "coco": read_records,
    "masks": lambda file: list(read_outlines(file, file.parent)),
    "log": lambda file: list(each_line(file)),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kind", ["FIFO", "/dev/zero", "folder", "missing"])
def test_only_regular_files_are_read(reader, kind, tmp_path):
    """A FIFO would be waited for, a device read without an end."""
    file = tmp_path / "data.json"
    if kind == "FIFO":
        os.mkfifo(file)
    elif kind == "folder":
        file.mkdir()
    elif kind != "missing":
        file.symlink_to(kind)
    assert complaint_about(file, READERS[reader]).startswith(f"{file}: ")


@pytest.mark.parametrize("reader", ["lines", "coco", "masks", "log"])
def test_a_terabyte_of_zeros(reader, tmp_path):
    """It takes no room on the disk, but would in memory."""
    file = tmp_path / "data.json"
    file.touch()
    os.truncate(file, 1 << 40)
    complaint_about(file, READERS[reader])
