"""What goes wrong in data without an error: its boxes or lines are read, its pictures opened."""

import math
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np

from infer.checkup.finding import Finding, Tally
from model import PaliGemma
from model.decoding.boxes import boxes_to_locs, check_label, parse_answer
from model.decoding.closed_set import ClosedSet
from model.io.tokenizer import LOC_PATTERN, LOCS, Tokenizer
from train.data.coco import CocoDetections, CocoIndex
from train.data.jsonl import JsonlPairs, is_jsonl, read_lines, right_answers
from train.data.open import classes_for
from train.data.records import read_records
from train.run.pictures import broken_pictures

SLACK = 1.0  # pixels by which boxes of COCO itself leave their pictures
SLIPS = 0.1  # share of boxes: if no more fit in another order only, these are single mistakes
MANY_PIECES = 8  # tokens of a label: with more, it is spelt nearly letter by letter
GRID = 0.5  # share of the location tokens that so many coordinates should use: with fewer, they lie on a grid
MANY_PICTURES = 2000  # with more, worker processes open them
SAMPLES = 16  # to look at as training makes them
_SPECIAL = re.compile(r"<(?:loc|seg)[^<>]*>?")
_EXISTS = re.compile(LOC_PATTERN + r"|<seg(?:0[0-9]{2}|1[01][0-9]|12[0-7])>")


def check_data(model: PaliGemma, file: Path, images: Path) -> Iterator[Finding]:
    """All checks of a file. One that cannot be read has no others."""
    check = "the data can be read"
    try:
        findings = list((check_lines if is_jsonl(file) else check_boxes)(model, file, images))
        data = as_trained(model, file, images)
    except (ValueError, OSError) as error:
        yield Finding(check, False, where=str(error))
        return
    yield Finding(check, True, f"{len(data):,}", "samples")
    yield from findings
    workers = os.cpu_count() if len(data) > MANY_PICTURES else 0
    faults = broken_pictures(data, range(len(data)), workers, title="opening pictures")
    number, first = f"{len(faults):,} of {len(data):,}", next(iter(faults.values()), "")
    yield Finding("pictures open", not faults, number, first)
    whole = (item for item in range(len(data)) if item not in faults)
    yield from check_samples(model.tokenizer, data, list(islice(whole, SAMPLES)))


def as_trained(model: PaliGemma, file: Path, images: Path) -> JsonlPairs | CocoDetections:
    """The data as training reads it, in sequence."""
    size = model.config.vision.image_size
    if is_jsonl(file):
        return JsonlPairs(file, images, model.tokenizer, size)
    index, language = CocoIndex.read(file, images), ClosedSet.of(model.config, model.tokenizer)
    language = replace(language, classes=classes_for(index, language.classes))
    return CocoDetections(index, images, language, [language.classes.index(c) for c in index.classes], size)


# ---- files -------------------------------------------------------------------------------------------------


def check_boxes(model: PaliGemma, file: Path, images: Path) -> Iterator[Finding]:
    """A COCO file. Readers clip its boxes to the picture and drop what is left without an area: boxes in
    another order, or of another size of the picture, are lost or wrong without a word."""
    categories, pictures, annotations = read_records(file, images)
    other, outside, locs, objects = Tally(), Tally(), set(), dict.fromkeys(pictures, 0)
    for i, record in annotations.items():
        picture, box = pictures[record["image_id"]], record["bbox"]
        width, height, where = picture["width"], picture["height"], f"annotation {i}: {box}"
        objects[record["image_id"]] += not record["iscrowd"]
        if not fits(*box, width, height):
            outside.add(f"{where} in {width} x {height} pixels")
            a, b, c, d = box
            if fits(a, b, c - a, d - b, width, height):
                other.add(f"{where} fits as x0, y0, x1, y1")
            elif fits(b, a, d, c, width, height):
                other.add(f"{where} fits as y, x, height, width")
        x, y, w, h = box
        locs.update(boxes_to_locs(np.array([x, y, x + w, y + h]), width, height)[0].tolist())
    count = len(annotations)
    found = other.finding("boxes are x, y, width, height", count)
    yield replace(found, passed=other.count <= SLIPS * count)
    yield outside.finding("boxes lie inside their pictures", count)
    most, cut = model.config.groups, Tally()
    for i, number in objects.items():
        if model.config.answers == "sequence" and number > most:
            cut.add(f"image {i} has {number} objects, an answer {most}")
    yield cut.finding("no answer is cut off", len(pictures))
    yield check_labels(model.tokenizer, (record["name"] for record in categories.values()))
    yield check_locations(locs, 4 * count)


def fits(x: float, y: float, w: float, h: float, width: int, height: int) -> bool:
    inside = min(x, y) >= -SLACK and x + w <= width + SLACK and y + h <= height + SLACK
    return inside and w > 0 and h > 0


def check_lines(model: PaliGemma, file: Path, images: Path) -> Iterator[Finding]:
    """JSON lines. What is no location token is taught as letters, and four of them in another order, or
    fewer, as a box that no program can draw."""
    room = model.config.text.max_positions - model.config.vision.tokens
    lines, boxes, locs, labels = 0, 0, set(), {}
    order, unknown, loose, cut, newline, ends = (Tally() for _ in range(6))
    for _, record in read_lines(file, images):
        lines += 1
        where = f"entry {lines}, {record['image']:.100}"
        prompt = model.tokenizer.encode_prompt(record["prefix"])
        if "\n" in record["prefix"]:
            newline.add(f"{where}: the prefix has a line end of its own")
        for answer in right_answers(record):
            if len(prompt) + len(model.tokenizer.encode(answer)) + 1 > room:
                cut.add(f"{where}: more than the {room} tokens after the image")
            if "<eos>" in answer:
                ends.add(f"{where}: the suffix has <eos> in it, as text")
            for special in _SPECIAL.findall(answer):
                if not _EXISTS.fullmatch(special):
                    unknown.add(f"{where}: {special:.20}")
            found = parse_answer(answer)
            if rest := len(re.findall(LOC_PATTERN, answer)) - 4 * len(found):
                loose.add(f"{where}: {rest} locations that are no box")
            for box in found:
                boxes += 1
                y0, x0, y1, x1 = box.locs
                locs.update(box.locs)
                labels.setdefault(box.label)
                if y1 < y0 or x1 < x0:
                    order.add(f"{where}: {box.locs} ends before it begins")
    yield order.finding("boxes are y0, x0, y1, x1", boxes)
    yield unknown.finding("locations and codes exist", lines)
    yield loose.finding("locations come in fours", lines)
    yield cut.finding("no answer is cut off", lines)
    yield check_labels(model.tokenizer, labels)
    yield newline.finding("prompts have no line end of their own", lines)
    yield ends.finding("answers have no eos of their own", lines)
    yield check_locations(locs, 4 * boxes)


def check_labels(tokenizer: Tokenizer, labels: Iterable[str]) -> Finding:
    """A label that falls into bytes or letters, or differs from another one only by a space or its case, is
    hard to learn; one with ; < or > cannot be read back."""
    wrong, seen = Tally(), {}
    for name in labels:
        plain = " ".join(name.split())
        same = seen.setdefault(plain.casefold(), name)
        pieces = [tokenizer.piece(i) for i in tokenizer.encode(f" {name}") if i < tokenizer.loc0]
        in_bytes = any(piece == "<unk>" or piece.startswith("<0x") for piece in pieces)
        try:
            check_label(name)
        except ValueError as error:
            wrong.add(str(error))
        else:
            if same != name or name != plain:
                wrong.add(f"{name!r} and {same!r}" if same != name else f"{name!r} has spaces too many")
            elif in_bytes or len(pieces) > MANY_PIECES:
                wrong.add(f"{name!r} is {' '.join(pieces):.60}")
    return wrong.finding("labels tokenise well", len(seen))


def check_locations(locs: set[int], coordinates: int) -> Finding:
    """Small or resized pictures have edges on a grid of whole pixels: most of the location tokens then never
    occur, and stay as they are. Of fewer coordinates than there are tokens, nothing can be said."""
    expected = LOCS * (1 - math.exp(-coordinates / LOCS))
    passed = len(locs) >= GRID * expected if coordinates >= LOCS else None
    where = "" if passed else f"in {coordinates:,} coordinates" + ", on a grid" * (passed is False)
    return Finding("location tokens that occur", passed, f"{len(locs):,} of {LOCS:,}", where)


# ---- samples -----------------------------------------------------------------------------------------------


def check_samples(
    tokenizer: Tokenizer, data: JsonlPairs | CocoDetections, items: list[int]
) -> Iterator[Finding]:
    """Without the newline that ends every prompt a checkpoint does not know that it has to answer, and
    without eos it never learns to stop."""
    newline, eos = Tally(), Tally()
    for item in items:
        sample, where = data[0, item], f"sample {item}, {data.name(item)}"
        prompt = sample["text"][: sample["prefix_len"]].tolist()
        if prompt[0] != tokenizer.bos or prompt[-1] != tokenizer.newline:
            newline.add(where)
        if sample["labels"][-1] != tokenizer.eos or not sample["weights"][-1] > 0:
            eos.add(where)
    yield newline.finding("prompts begin with bos and end in a newline", len(items))
    yield eos.finding("answers end in eos", len(items))
