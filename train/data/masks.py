"""Masks of objects -> lines of location and segmentation tokens, and a look at what the 16 codes lose.

Masks come from a COCO instances file (polygons, or either run-length encoding) or from pictures, named by
JSON lines {"image": "a.jpg", "label": "cat", "mask": "a-cat.png"}: 0 outside, one other value inside.

Axes: n objects of an image, H, W pixels.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from pycocotools.mask import decode, frPyObjects, merge

from model.decoding.boxes import box_prompt, boxes_to_locs, check_label, format_answer, locs_to_boxes
from model.decoding.masks import MaskCodec, crop, from_rle, paste_mask, to_rle
from model.io.image import load_image
from train.data.coco import read_records

CELL, ACROSS = 160, 4  # of a contact sheet: pixels of a picture, pairs of them in a row
MOST_SHOWN = 24


@dataclass(frozen=True)
class Outline:
    """An object's mask as a file has it."""

    image: str
    label: str
    mask: dict | list | Path  # run-length encoding, polygons, or a picture
    where: str  # for complaints
    size: tuple[int, int] | None = None  # width and height of the picture, if the file tells them


def read_outlines(file: Path, lines: bool) -> Iterator[Outline]:
    """The objects of a COCO file, crowds left out, or of JSON lines, in the order of the file."""
    if lines:
        with open(file, encoding="utf-8") as handle:
            for number, line in enumerate(handle, 1):
                if line.strip():
                    yield _of_line(line, file, f"{file}:{number}")
        return
    categories, pictures, annotations = read_records(file)
    for i, record in annotations.items():
        if not record.get("iscrowd"):
            picture, label = pictures[record["image_id"]], categories[record["category_id"]]["name"]
            where = f"{file}: annotation {i} of image {record['image_id']}"
            size = picture["width"], picture["height"]
            yield Outline(picture["file_name"], label, record.get("segmentation"), where, size)


def _of_line(line: str, file: Path, where: str) -> Outline:
    try:
        record = json.loads(line)
        image, label, mask = (record[key] for key in ("image", "label", "mask"))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f'{where}: not {{"image": ..., "label": ..., "mask": ...}} ({error!r})') from error
    if not all(isinstance(text, str) and text for text in (image, label, mask)):
        raise ValueError(f"{where}: image, label and mask must be texts, not {record!r:.80}")
    return Outline(image, label, file.parent / mask, where)


def to_mask(outline: Outline, width: int, height: int) -> np.ndarray:
    """The mask bool [H, W] of an object in a picture of this size. Raises ValueError if anything is wrong."""
    try:
        check_label(outline.label)
        if outline.size not in (None, (width, height)):
            raise ValueError(
                "the file gives the image {} x {} pixels, it has {} x {}".format(*outline.size, width, height)
            )
        mask = np.ascontiguousarray(_read(outline.mask, width, height)).astype(bool)
        if mask.shape != (height, width):
            raise ValueError(
                f"the mask has {mask.shape[1]} x {mask.shape[0]} pixels, its image {width} x {height}"
            )
        if not mask.any():
            raise ValueError("the mask is empty")
        if mask.all():
            raise ValueError("the mask is the whole image; is it turned inside out, or of another file?")
    except ValueError as error:
        raise ValueError(f"{outline.where}: {error}") from error
    return mask


def _read(mask: dict | list | Path, width: int, height: int) -> np.ndarray:
    if isinstance(mask, Path):
        return _of_picture(mask)
    if isinstance(mask, list):
        return _of_polygons(mask, width, height)
    if isinstance(mask, dict):
        return from_rle(mask)
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
    try:
        with Image.open(file) as picture:
            values = np.asarray(
                picture if picture.mode in ("1", "L", "P", "I", "I;16") else picture.convert("RGB")
            )
    except FileNotFoundError as error:
        raise ValueError(f"{file}: no such file") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{file} is not a readable image ({error})") from error
    if values.ndim == 3:
        if (values != values[..., :1]).any():
            raise ValueError(f"{file} has colours; a mask has one channel")
        values = values[..., 0]
    different = np.unique(values)
    if len(different) > 2 or (len(different) == 2 and different[0] != 0):
        told = ", ".join(map(str, different[:4].tolist()))
        raise ValueError(f"{file} has the values {told} ...; a mask has 0 and one other")
    return values


def tight_box(mask: np.ndarray) -> np.ndarray:
    """x0, y0, x1, y1 around the pixels of a mask."""
    x, y = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
    return np.array([x[0], y[0], x[-1] + 1, y[-1] + 1], float)


class Sheet:
    """A contact sheet: objects as they are, and as box and codes give them back."""

    def __init__(self):
        self.cells, self.overlaps = [], []

    def add(
        self, image: Image.Image, box: np.ndarray, label: str, before: np.ndarray, after: np.ndarray
    ) -> None:
        overlap = (before & after).sum() / (before | after).sum()
        self.overlaps.append(overlap)
        if len(self.cells) >= MOST_SHOWN:
            return
        x0, y0, x1, y1 = box
        side = max(x1 - x0, y1 - y0) * 0.6
        x, y = (x0 + x1) / 2, (y0 + y1) / 2
        frame = [round(x - side), round(y - side), round(x + side), round(y + side)]
        pair = Image.new("RGB", (2 * CELL, CELL + 18), "white")
        for i, mask in enumerate((before, after)):
            drawn = Image.composite(image, image.point(lambda value: value // 4), Image.fromarray(mask))
            pair.paste(
                drawn.crop(frame).resize((CELL - 2, CELL - 2), Image.Resampling.NEAREST), (i * CELL, 0)
            )
        text = f"{label}: {overlap:.2f}"
        ImageDraw.Draw(pair).text((2, CELL), text, fill="black", font=ImageFont.load_default(12))
        self.cells.append(pair)

    def picture(self) -> Image.Image:
        rows = -(-len(self.cells) // ACROSS)
        width, height = 2 * CELL + 12, CELL + 24
        sheet = Image.new("RGB", (width * min(ACROSS, len(self.cells)), height * rows), "white")
        for k, cell in enumerate(self.cells):
            sheet.paste(cell, (k % ACROSS * width, k // ACROSS * height))
        return sheet


def segment_lines(
    outlines: Iterator[Outline], images: Path, codec: MaskCodec, most: int, skip_bad: bool, counts: Counter
) -> Iterator[tuple[dict, Image.Image, list]]:
    """A line for each class of an image that has at most `most` objects: the line, the picture, and of each
    object (box, label, mask, what comes back of it). counts: of objects, and of what was left out."""
    by_image = defaultdict(list)
    for outline in outlines:
        by_image[outline.image].append(outline)
    for name, of_image in by_image.items():
        image, by_label = load_image(images / name), defaultdict(list)
        for outline in of_image:
            try:
                by_label[outline.label].append(to_mask(outline, *image.size))
            except ValueError:
                if not skip_bad:
                    raise
                counts["bad"] += 1
        for label, masks in by_label.items():
            if len(masks) > most:
                counts["crowded"] += len(masks)
                continue
            counts["objects"] += len(masks)
            boxes = np.stack([tight_box(mask) for mask in masks])
            crops = np.stack([crop(mask, box) for mask, box in zip(masks, boxes)])
            codes = codec.encode(torch.from_numpy(crops))
            suffix = format_answer(boxes, [label] * len(masks), *image.size, codes.numpy())
            line = dict(image=name, prefix=box_prompt([label], masks=True), suffix=suffix)
            if len(masks) == 1:
                line["mask"] = to_rle(masks[0])
            rounded = locs_to_boxes(boxes_to_locs(boxes, *image.size), *image.size)
            back = [
                paste_mask(mask, box, *image.size) for mask, box in zip(codec.decode(codes).numpy(), rounded)
            ]
            yield line, image, list(zip(boxes, [label] * len(masks), masks, back))
