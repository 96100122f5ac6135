"""Pairs of texts about an image, one JSON object a line, as big_vision, Vertex and Roboflow write them:

    {"image": "file.jpg", "prefix": "caption en", "suffix": "a cat"}

suffix may be a list of right answers. Other keys are ignored, blank lines skipped.
"""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

KEYS = ("image", "prefix", "suffix")
HEAD = 1 << 20  # bytes of a first line that are looked at


def is_jsonl(path: Path) -> bool:
    """True for lines of this kind, False for anything else, such as one JSON document; told by content."""
    with open(path, "rb") as file:
        line = next((line for line in iter(lambda: file.readline(HEAD), b"") if line.strip()), b"")
    try:
        first = json.loads(line)
    except ValueError:  # the beginning of a document, or a broken line
        return re.match(rb'\s*\{\s*"(image|prefix|suffix)"', line) is not None
    return isinstance(first, dict) and any(key in first for key in KEYS)


def answers(record: dict) -> list[str]:
    """The right answers of a line."""
    return record["suffix"] if isinstance(record["suffix"], list) else [record["suffix"]]


def read_lines(file: Path, images: Path, allow_outside: bool = False) -> Iterator[tuple[int, dict]]:
    """Byte offset and record of every line, checked. Raises ValueError "FILE:LINE: what is wrong".

    images: their folder; an image elsewhere, be it by way of a link, is refused without allow_outside.
    """
    root, offset = os.path.realpath(images), 0
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    record = _parse(line)
                    if not allow_outside and not _inside(root, record["image"]):
                        raise ValueError(f"image {record['image']!r} lies outside the image folder {images}")
                except ValueError as error:
                    raise ValueError(f"{file}:{number}: {error}") from error
                yield offset, record
            offset += len(line)


def _inside(root: str, name: str) -> bool:
    return not os.path.isabs(name) and Path(os.path.realpath(os.path.join(root, name))).is_relative_to(root)


def _parse(line: bytes) -> dict:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg} at column {error.colno})") from error
    if not isinstance(record, dict):
        raise ValueError(f"not a JSON object: {record!r:.60}")
    for key in KEYS:
        if key not in record:
            raise ValueError(f"no {key!r}")
        texts = answers(record) if key == "suffix" else [record[key]]
        if not texts or not all(isinstance(text, str) for text in texts):
            kind = "text, or a list of texts" if key == "suffix" else "text"
            raise ValueError(f"{key!r} must be {kind}, not {record[key]!r:.60}")
    if not record["image"]:
        raise ValueError("'image' is empty")
    return record
