"""Masks of objects -> lines of location and segmentation tokens, and a picture of what the 16 codes keep.

Masks come from a COCO instances file (polygons, or run lengths as text or as a list) or from mask pictures,
which are 0 outside and one other value inside, named by JSON lines such as
{"image": "a.jpg", "label": "cat", "mask": "a-cat.png"}.

Axes: n objects of an image, H, W pixels.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from pycocotools.mask import decode, frPyObjects, merge

from model.decoding.boxes import box_prompt, boxes_to_locs, check_label, format_answer, locs_to_boxes
from model.decoding.masks import MaskCodec, crop, from_rle, mask_iou, paste_mask, tight_box, to_rle
from model.io.image import load_image, open_image
from model.io.writing import each_line, explain, located
from train.data.jsonl import MASK_KEYS, check_inside, is_jsonl
from train.data.records import read_records

# The contact sheet: pixels of a cell's side, pairs of cells in a row, pairs at most.
CELL, PAIRS_PER_ROW, MAX_PAIRS = 160, 4, 24
HEAD, FRAME = 22, "#9a9a9a"  # pixels above the pairs, for their titles; the line around each picture


@dataclass(frozen=True)
class Outline:
    """An object's mask in the form that it has in a file."""

    image: str
    label: str
    mask: dict | list | Path  # run-length encoding, polygons, or a picture
    where: str  # for error messages
    size: tuple[int, int] | None = None  # width and height of the image, if the file says so


def read_outlines(
    file: Path, folder: Path, records: tuple[dict, dict, dict] | None = None
) -> Iterator[Outline]:
    """The objects of a COCO file, except crowds, or of JSON lines, in the order of the file. folder: of the
    images. records: what check_records returned about another form."""
    if records is None and is_jsonl(file):
        for number, _, line in each_line(file):
            yield _of_line(line, file, folder, f"{file}:{number}")
        return
    categories, images, annotations = records or read_records(file, boxes=False, outlines=True)
    for i, record in annotations.items():
        if not record.get("iscrowd"):
            image, label = images[record["image_id"]], categories[record["category_id"]]["name"]
            where = f"{file}: annotation {i} of image {record['image_id']}"
            size = image["width"], image["height"]
            yield Outline(image["file_name"], label, record.get("segmentation"), where, size)


def _of_line(line: bytes, file: Path, folder: Path, where: str) -> Outline:
    what = f'{where}: not {{"image": ..., "label": ..., "mask": ...}}'
    with explain(what, ValueError, KeyError, TypeError, RecursionError):
        record = json.loads(line)
        image, label, mask = (record[key] for key in MASK_KEYS)
    if not all(isinstance(text, str) and text for text in (image, label, mask)):
        raise ValueError(f"{where}: image, label and mask must be text, not {record!r:.80}")
    with located(where):
        check_inside(image, folder, "image")
        check_inside(mask, file.parent, "mask")
    return Outline(image, label, file.parent / mask, where)


def to_mask(outline: Outline, width: int, height: int) -> np.ndarray:
    """The mask bool [H, W] of an object in an image of this size."""
    with located(outline.where):
        check_label(outline.label)
        if outline.size not in (None, (width, height)):
            given = "{} x {}".format(*outline.size)
            raise ValueError(f"the file gives the image {given} pixels, it has {width} x {height}")
        mask = np.ascontiguousarray(_pixels(outline.mask, width, height)).astype(bool)
        if mask.shape != (height, width):
            own = "{1} x {0}".format(*mask.shape)
            raise ValueError(f"the mask has {own} pixels, its image {width} x {height}")
        if not mask.any():
            raise ValueError("the mask is empty")
        if mask.all():
            raise ValueError("the mask is the whole image; is it inverted, or of another image?")
    return mask


def _pixels(mask: dict | list | Path, width: int, height: int) -> np.ndarray:
    if isinstance(mask, Path):
        return _of_picture(mask)
    if isinstance(mask, list):
        return _of_polygons(mask, width, height)
    if isinstance(mask, dict):
        return from_rle(mask, (width, height))
    raise ValueError(f"there is no segmentation, but {mask!r:.60}")


def _of_polygons(polygons: list, width: int, height: int) -> np.ndarray:
    outlines, far = [], 10 * max(width, height)
    for polygon in polygons or [None]:
        try:
            points = np.asarray(polygon, float)
        except (ValueError, TypeError):
            points = np.zeros(0)
        if points.ndim != 1 or len(points) < 6 or len(points) % 2 or not (abs(points) < far).all():
            raise ValueError(f"a polygon must be x, y of three points or more, not {polygon!r:.60}")
        outlines.append(points.tolist())
    return decode(merge(frPyObjects(outlines, height, width)))


def _of_picture(file: Path) -> np.ndarray:
    with open_image(file) as picture:
        one_channel = picture.mode in ("1", "L", "P", "I", "I;16")
        values = np.asarray(picture if one_channel else picture.convert("RGB"))
    if values.ndim == 3:
        if (values != values[..., :1]).any():
            raise ValueError(f"{file} has colours; a mask has one channel")
        values = values[..., 0]
    different = np.unique(values)
    if len(different) > 2 or (len(different) == 2 and different[0] != 0):
        some = ", ".join(map(str, different[:4].tolist()))
        raise ValueError(f"{file} has the values {some} ...; a mask has 0 and one other")
    return values


class Sheet:
    """A contact sheet of pairs: an object under its mask, and under the mask made from its box and codes."""

    def __init__(self):
        self.pairs, self.ious = [], []

    def add(
        self, image: Image.Image, box: np.ndarray, label: str, before: np.ndarray, after: np.ndarray
    ) -> None:
        self.ious.append(float(mask_iou(before, after)))
        if len(self.pairs) >= MAX_PAIRS:
            return
        x0, y0, x1, y1 = box
        side = max(x1 - x0, y1 - y0) * 0.6
        x, y = (x0 + x1) / 2, (y0 + y1) / 2
        frame = [round(x - side), round(y - side), round(x + side), round(y + side)]
        pair = Image.new("RGB", (2 * CELL, CELL + 18), "white")
        for i, mask in enumerate((before, after)):
            lit = Image.composite(image, image.point(lambda value: value // 4), Image.fromarray(mask))
            lit = lit.crop(frame).resize((CELL - 4, CELL - 4), Image.Resampling.NEAREST)
            pair.paste(ImageOps.expand(lit, 1, FRAME), (i * CELL, 0))
        text = f"{label}: {self.ious[-1]:.2f}"
        ImageDraw.Draw(pair).text((2, CELL), text, fill="black", font=ImageFont.load_default(12))
        self.pairs.append(pair)

    def draw(self) -> Image.Image:
        width, height = 2 * CELL + 12, CELL + 24
        columns, rows = min(PAIRS_PER_ROW, len(self.pairs)), -(-len(self.pairs) // PAIRS_PER_ROW)
        sheet = Image.new("RGB", (width * columns, HEAD + height * rows), "white")
        pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
        for cell, words in enumerate(("mask", "after 16 tokens") * columns):
            pen.text((cell // 2 * width + cell % 2 * CELL + 2, 3), words, fill="black", font=font)
        for k, pair in enumerate(self.pairs):
            sheet.paste(pair, (k % PAIRS_PER_ROW * width, HEAD + k // PAIRS_PER_ROW * height))
        return sheet


def segment_lines(
    outlines: Iterator[Outline], images: Path, codec: MaskCodec, most: int, skip_bad: bool, counts: Counter
) -> Iterator[tuple[dict, Image.Image, list]]:
    """For each image and class with at most `most` objects: the line, the image, and for each object its box,
    label, mask and reconstructed mask. counts: updated with "objects" and with those left out, "bad" and
    "crowded", and with "most", the largest number of those in an image."""
    by_image = defaultdict(list)
    for outline in outlines:
        by_image[outline.image].append(outline)
    for name, of_image in by_image.items():
        image, by_label = load_image(images / name), defaultdict(list)
        size = image.size
        for outline in of_image:
            try:
                by_label[outline.label].append(to_mask(outline, *size))
            except ValueError:
                if not skip_bad:
                    raise
                counts["bad"] += 1
        for label, masks in by_label.items():
            if len(masks) > most:
                counts["crowded"] += len(masks)
                counts["most"] = max(counts["most"], len(masks))
                continue
            counts["objects"] += len(masks)
            boxes = np.stack([tight_box(mask) for mask in masks])
            crops = np.stack([crop(mask, box) for mask, box in zip(masks, boxes)])
            codes = codec.encode(torch.from_numpy(crops))
            suffix = format_answer(boxes, [label] * len(masks), *size, codes.numpy())
            line = dict(image=name, prefix=box_prompt([label], masks=True), suffix=suffix)
            if len(masks) == 1:  # infer/evaluate_answers.py compares the first mask of an answer with it
                line["mask"] = to_rle(masks[0])
            rounded = locs_to_boxes(boxes_to_locs(boxes, *size), *size)  # as the answer gives them
            decoded = codec.decode(codes).numpy()
            after = [paste_mask(mask, box, *size) for mask, box in zip(decoded, rounded)]
            yield line, image, list(zip(boxes, [label] * len(masks), masks, after))
