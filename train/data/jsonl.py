"""JSON lines: a prompt about an image and its answer, as big_vision, Vertex and Roboflow write them:

    {"image": "file.jpg", "prefix": "caption en", "suffix": "a cat"}

suffix may be a list of right answers. Other keys are ignored, blank lines skipped.
"""

import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from model.io.image import load_image, square
from model.io.tokenizer import Tokenizer
from model.io.writing import each_line, explain, located, open_regular
from train.data.augment import ENOUGH, JITTER, jitter
from train.data.samples import answer_sample
from train.data.targets import text_target

KEYS = ("image", "prefix", "suffix")
MASK_KEYS = ("image", "label", "mask")  # of lines that name a mask picture (train/data/masks.py)
FIRST_LINE_BYTES = 1 << 20  # a COCO file may be a single line of gigabytes


def is_jsonl(path: Path) -> bool:
    """True for a file of JSON lines, False for anything else, such as a COCO file. Its content decides."""
    with open_regular(path) as file:
        lines = iter(lambda: file.readline(FIRST_LINE_BYTES), b"")
        line = next((line for line in lines if line.strip()), b"")
    try:
        first = json.loads(line)
    except (ValueError, RecursionError):  # the beginning of a document, or a broken line
        return re.match(rb'\s*\{\s*"(image|prefix|suffix|label|mask)"', line) is not None
    return isinstance(first, dict) and not first.keys().isdisjoint(KEYS + MASK_KEYS)


def right_answers(record: dict) -> list[str]:
    """The right answers of a line, one or several."""
    return record["suffix"] if isinstance(record["suffix"], list) else [record["suffix"]]


def read_lines(file: Path, images: Path, allow_outside: bool = False) -> Iterator[tuple[int, dict]]:
    """Byte offset and record of every line, checked; faults are reported as "FILE:LINE: what is wrong".

    images: their folder. An image outside it, also through a link, is refused unless allow_outside is set.
    """
    for number, offset, line in each_line(file):
        with located(f"{file}:{number}"):
            record = _parse(line)
            if not allow_outside:
                check_inside(record["image"], images, "image")
        yield offset, record


def check_inside(name: str, folder: Path, what: str) -> None:
    """Refuse a file name that leads out of the folder it belongs in, also through a link."""
    root = os.path.realpath(folder)
    if os.path.isabs(name) or not Path(os.path.realpath(os.path.join(root, name))).is_relative_to(root):
        raise ValueError(f"{what} {name!r} lies outside the {what} folder {folder}")


def _parse(line: bytes) -> dict:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg} at column {error.colno})") from error
    except RecursionError as error:
        raise ValueError("not JSON (it is nested too deeply)") from error
    if not isinstance(record, dict):
        raise ValueError(f"not a JSON object: {record!r:.60}")
    for key in KEYS:
        if key not in record:
            raise ValueError(f"no {key!r}")
        texts = right_answers(record) if key == "suffix" else [record[key]]
        if not texts or not all(isinstance(text, str) for text in texts):
            kind = "text, or a list of texts" if key == "suffix" else "text"
            raise ValueError(f"{key!r} must be {kind}, not {record[key]!r:.60}")
        if key != "image":  # whose bytes may be anything that a file system allows
            with explain(f"{key!r} is not text: {record[key]!r:.60}", UnicodeEncodeError):
                "".join(texts).encode()
    if not record["image"]:
        raise ValueError("'image' is empty")
    return record


class JsonlPairs(Dataset):
    """Samples (train/data/samples.py), one for each line: prefix and suffix are prompt and answer."""

    closed_set = False

    def __init__(
        self,
        file: Path,
        images: Path,
        tokenizer: Tokenizer,
        size: int,
        seed: int = 0,
        augment: bool = False,
        allow_outside: bool = False,
    ):
        """size: S, the image's side. augment: colours only, as boxes and words like "left" are text."""
        self.file, self.images, self.tokenizer = file, images, tokenizer
        self.size, self.seed, self.augment = size, seed, augment
        offsets, first, self.text_tokens = [], {}, 0
        pictures = []  # of each line, the number of the first line with the same picture
        for offset, record in read_lines(file, images, allow_outside):
            pictures.append(first.setdefault(record["image"], len(offsets)))
            offsets.append(offset)
            prompt = len(tokenizer.encode_prompt(record["prefix"]))
            answer = max(len(tokenizer.encode(text)) for text in right_answers(record))
            self.text_tokens = max(self.text_tokens, prompt + answer)
        if not offsets:
            raise ValueError(f"{file} has no lines")
        self.text_positions = self.text_tokens
        self.offsets = torch.tensor(offsets).share_memory_()
        self.pictures = torch.tensor(pictures)

    def __len__(self) -> int:
        return len(self.offsets)

    def same_picture(self, item: int) -> int:
        """The first item with the same picture."""
        return int(self.pictures[item])

    def keep(self, items: Sequence[int]) -> None:
        """Leave out all other items and number those that stay anew. All lines of a picture must stay or go
        together."""
        items = torch.as_tensor(items, dtype=torch.int64)
        self.offsets = self.offsets[items].share_memory_()
        self.pictures = torch.searchsorted(items, self.pictures[items])

    def name(self, item: int) -> str:
        return self._record(item)["image"]

    def picture(self, item: int, enough: int | None = None) -> Image.Image:
        """enough: as load_image has it."""
        return load_image(self.images / self.name(item), enough)

    def _record(self, item: int) -> dict:
        with open(self.file, "rb") as file:  # every time: workers would share the position of an open file
            file.seek(self.offsets[item])
            return json.loads(file.readline())

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Tensor]:
        draw, item = key
        rng = np.random.default_rng([self.seed, draw])
        record = self._record(item)
        image = self.picture(item, ENOUGH * self.size if self.augment else None)
        if self.augment and rng.random() < JITTER:
            image = jitter(rng, image)
        prompt, answers = self.tokenizer.encode_prompt(record["prefix"]), right_answers(record)
        target = text_target(self.tokenizer, answers[rng.integers(len(answers))])
        return answer_sample(square(image, self.size), prompt, target)
