"""COCO instances files: one reader for everything that takes them, and closed-set samples from them."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from model.config import MAX_CLASSES
from model.decoding.closed_set import ClosedSet
from model.io.image import check_size, load_image, square
from model.io.writing import explain, open_regular
from train.data.augment import augment
from train.data.samples import closed_set_lengths, closed_set_sample
from train.data.targets import NANO_NOISE, Noise

MAX_SIDE = 2**31 - 1  # pixels: what image formats can say at most


def read_records(
    file: Path, images: Path | None = None, boxes: bool = True, outlines: bool = False, sizes: bool = True
) -> tuple[dict[int, dict], dict[int, dict], dict[int, dict]]:
    """Categories, images and annotations of a COCO file by id, in the file's order.

    Each category has a name of its own; each image has a file_name inside the image folder, and an int width
    and height; each annotation has an image and a category of the file, `iscrowd` 0 or 1, and an `area` that
    is a number or None. Other fields are passed on unchecked.
    images: their folder, if it is to be checked. boxes: each annotation must have a bbox. outlines: keep the
    segmentations, which are most of a file. sizes: each image must have a width and a height.
    """
    if images is not None and not images.is_dir():
        raise ValueError(f"{images}: no such folder (the images of {file})")
    not_json = f"{file} is not a COCO annotation file: not JSON"
    with open_regular(file) as handle, explain(not_json, ValueError, RecursionError, MemoryError):
        if handle.peek(1)[:1] not in b"{[ \t\r\n\xef":  # what is none is not read, however long it is
            raise ValueError("it does not begin with {")
        data = json.loads(handle.read(), object_hook=None if outlines else _without_outlines)
    return check_records(data, file, boxes, sizes)


def check_records(
    data: dict, file: Path, boxes: bool = True, sizes: bool = True
) -> tuple[dict[int, dict], dict[int, dict], dict[int, dict]]:
    """The same of what such a file holds. file: for messages."""
    categories, pictures, annotations = (
        _by_id(data, key, file) for key in ("categories", "images", "annotations")
    )
    if not pictures:
        raise ValueError(f"{file} has no images")
    _check_categories(categories, file)
    for i, record in pictures.items():
        where = f"{file}: image {i}"
        _check_file_name(record, where)
        given = [side for side in ("width", "height") if sizes or side in record]
        record |= {side: _side(record, side, where) for side in given}
    for i, record in annotations.items():
        where = f"{file}: annotation {i}"
        for key, known in (("image_id", pictures), ("category_id", categories)):
            if type(record.get(key)) is not int or record[key] not in known:
                raise ValueError(
                    f"{where} has the {key} {record.get(key)!r:.60}, which the file does not define"
                )
        if boxes:
            _check_bbox(record, where)
        area, crowd = record.setdefault("area", None), record.get("iscrowd")
        if area is not None and not (_is_number(area) and area >= 0):
            raise ValueError(f"{where} has the area {area!r:.60}: it must be a number of at least 0")
        if crowd not in (None, 0, 1):
            raise ValueError(f"{where} has the iscrowd {crowd!r:.60}: it must be 0 or 1")
        record["iscrowd"] = int(crowd or 0)
    return categories, pictures, annotations


def _without_outlines(record: dict) -> dict:
    """Drop an annotation's outline as soon as it is read, to save memory."""
    record.pop("segmentation", None)
    return record


def _by_id(data: dict, key: str, file: Path) -> dict[int, dict]:
    """The records of one of the file's lists by id, in the list's order."""
    if not isinstance(data, dict) or not isinstance(data.get(key), list):
        raise ValueError(f"{file} is not a COCO annotation file: no {key!r} list")
    records = {}
    for record in data[key]:
        i = record.get("id") if isinstance(record, dict) else None
        if type(i) is not int or abs(i) >= 2**63:
            raise ValueError(f"{file}: an entry of {key!r} has no whole number as id: {record!r:.80}")
        if i in records:
            raise ValueError(f"{file}: two entries of {key!r} have the id {i}")
        records[i] = record
    return records


def _check_categories(categories: dict[int, dict], file: Path) -> None:
    ids = {}
    for i, record in categories.items():
        name = record.get("name")
        if not isinstance(name, str) or not name.strip():
            raise ValueError(f"{file}: category {i} has no name")
        if not _is_text(name):
            raise ValueError(f"{file}: category {i} has a name that is no text: {name!r:.60}")
        if (other := ids.setdefault(name, i)) != i:
            raise ValueError(f"{file}: the categories {other} and {i} have the same name, {name!r:.60}")


def _check_file_name(record: dict, where: str) -> None:
    name = record.get("file_name")
    if not isinstance(name, str) or not name:
        raise ValueError(f"{where} has no file_name")
    if not _is_text(name):
        raise ValueError(f"{where}: {name!r:.60} cannot be the name of a file")
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise ValueError(f"{where}: file_name {name!r:.200} leaves the image folder")


def _is_text(value: str) -> bool:
    """Whether a string can be written in UTF-8 and has no control characters: no line end, no NUL."""
    return value.encode(errors="replace").decode() == value and not any(x < " " for x in value)


def _is_number(value) -> bool:
    """Whether a value is a number to compute with: Python's JSON has NaN, and whole numbers of any length."""
    return type(value) in (int, float) and abs(value) <= 2**53


def _side(record: dict, side: str, where: str) -> int:
    value = record.get(side)
    if not _is_number(value) or not 0 < value <= MAX_SIDE or value % 1 != 0:
        raise ValueError(f"{where} has the {side} {value!r:.60}: it must be a whole number of pixels")
    return int(value)


def _check_bbox(record: dict, where: str) -> None:
    box = record.get("bbox")
    if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)):
        raise ValueError(f"{where} has the bbox {box!r:.60}: it must be [x, y, width, height]")


@dataclass(frozen=True, eq=False)
class CocoIndex:
    """N images and A objects of an instances file, as flat tensors in memory that all workers share."""

    classes: tuple[str, ...]  # names of the file's categories, in the order of their ids
    sizes: Tensor  # int64 [N, 2] width, height; images are in the order of the file
    offsets: Tensor  # int64 [N + 1]: image i has the objects offsets[i] .. offsets[i + 1]
    boxes: Tensor  # float64 [A, 4] x0, y0, x1, y1 in pixels, clipped to the image
    labels: Tensor  # int64 [A] positions in `classes`
    names: Tensor  # uint8: the file names in UTF-8, one after the other
    name_offsets: Tensor  # int64 [N + 1]
    skipped_crowd: int
    skipped_degenerate: int  # without width or height inside the image

    def __len__(self) -> int:
        return len(self.sizes)

    def name(self, row: int) -> str:
        """File name of an image, relative to the image folder."""
        return bytes(self.names[self.name_offsets[row] : self.name_offsets[row + 1]].numpy()).decode()

    def objects(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """Boxes float64 [n, 4] and labels int64 [n] of an image."""
        span = slice(self.offsets[row], self.offsets[row + 1])
        return self.boxes[span].numpy(), self.labels[span].numpy()

    @classmethod
    def read(
        cls, file: Path, images: Path | None = None, max_classes: int | None = MAX_CLASSES
    ) -> "CocoIndex":
        """Index a file. images: their folder, if it is to be checked; max_classes None: no limit."""
        return cls.of(read_records(file, images), file, max_classes)

    @classmethod
    def of(
        cls, records: tuple[dict, dict, dict], file: Path, max_classes: int | None = MAX_CLASSES
    ) -> "CocoIndex":
        """Index what read_records or check_records returned. file: for messages."""
        categories, pictures, annotations = records
        if max_classes is not None and len(categories) > max_classes:
            raise ValueError(f"{file} has {len(categories)} categories, there are tokens for {max_classes}")
        ids = sorted(categories)
        names = [record["file_name"].encode() for record in pictures.values()]
        sizes = [[record["width"], record["height"]] for record in pictures.values()]
        crowd, owners, labels, boxes = 0, [], [], []
        image_rows, category_rows = ({i: row for row, i in enumerate(keys)} for keys in (pictures, ids))
        for record in annotations.values():
            if record["iscrowd"]:
                crowd += 1
                continue
            owners.append(image_rows[record["image_id"]])
            labels.append(category_rows[record["category_id"]])
            boxes.append(record["bbox"])

        owners, boxes = np.array(owners, np.int64), np.array(boxes, np.float64).reshape(-1, 4)
        boxes = np.concatenate((boxes[:, :2], boxes[:, :2] + boxes[:, 2:]), axis=1)  # x0, y0, x1, y1
        boxes = boxes.clip(0, np.tile(np.array(sizes), 2)[owners])
        order = np.argsort(owners, kind="stable")  # by image, and within it as in the file
        order = order[(boxes[:, 2:] > boxes[:, :2]).all(1)[order]]  # without degenerate ones
        arrays = dict(
            sizes=np.array(sizes, np.int64),
            offsets=np.searchsorted(owners[order], np.arange(len(pictures) + 1)),
            boxes=boxes[order],
            labels=np.array(labels, np.int64)[order],
            names=np.frombuffer(bytearray(b"".join(names)), np.uint8),
            name_offsets=np.cumsum([0, *map(len, names)]),
        )
        return cls(
            classes=tuple(categories[i]["name"] for i in ids),
            **{name: torch.from_numpy(array).share_memory_() for name, array in arrays.items()},
            skipped_crowd=crowd,
            skipped_degenerate=len(boxes) - len(order),
        )


class CocoDetections(Dataset):
    """Closed-set samples (train/data/samples.py), one for each image of a COCO file."""

    closed_set = True

    def __init__(
        self,
        index: CocoIndex,
        images: Path,
        language: ClosedSet,
        label_of: Sequence[int],
        size: int,
        seed: int = 0,
        augment: bool = False,
        noise: Noise = NANO_NOISE,
        branches: int | None = None,
        flip_vertical: bool = False,
    ):
        """label_of: the model's class number of each of the file's classes. size: S, the image's side.
        branches: objects of a picture that are taught in parallel; None: they are taught in sequence.
        flip_vertical: as a part of augment."""
        self.label_of = np.asarray(label_of, np.int64)
        if self.label_of.shape != (len(index.classes),):
            raise ValueError(
                f"label_of must have {len(index.classes)} entries, one for each class of the file"
            )
        for name, label in zip(index.classes, self.label_of, strict=True):
            if not 0 <= label < len(language.classes):
                raise ValueError(f"class {name!r} of the file: the model has no class number {label}")
        self.index, self.images, self.language = index, images, language
        self.size, self.seed, self.augment, self.noise = size, seed, augment, noise
        self.flip_vertical = flip_vertical
        rows = torch.arange(len(index))
        # Item i is the image in row rows[i] of the index.
        self.rows = (rows[index.offsets.diff() > 0] if noise.skip_empty else rows).share_memory_()
        # If all real boxes are on whole pixels, noise boxes must be too: fractions would tell them apart.
        self.grid = float((index.boxes == index.boxes.round()).all())
        self.branches, most = branches, int(index.offsets.diff().max())
        self.text_tokens, self.text_positions = closed_set_lengths(
            len(language.prompt), language.groups, most, branches, noise
        )

    def __len__(self) -> int:
        return len(self.rows)

    def same_picture(self, item: int) -> int:
        """The first item with the same picture: in a COCO file, each has its own."""
        return item

    def name(self, item: int) -> str:
        return self.index.name(int(self.rows[item]))

    def picture_size(self, item: int) -> tuple[int, int]:
        """Width and height, as given in the file."""
        return tuple(self.index.sizes[self.rows[item]].tolist())

    def picture(self, item: int) -> Image.Image:
        """The upright picture, of the size that the file gives."""
        file = self.images / self.name(item)
        image = load_image(file)
        check_size(image, file, *self.picture_size(item))
        return image

    def keep(self, items: Sequence[int]) -> None:
        """Leave out all other items; those that stay are numbered anew."""
        self.rows = self.rows[torch.as_tensor(items, dtype=torch.int64)].share_memory_()

    def objects(self, item: int) -> tuple[np.ndarray, np.ndarray]:
        """Boxes float64 [n, 4] in pixels, and the model's class numbers int64 [n]."""
        boxes, labels = self.index.objects(int(self.rows[item]))
        return boxes, self.label_of[labels]

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Tensor]:
        draw, item = key
        rng = np.random.default_rng([self.seed, draw])
        image = self.picture(item)
        boxes, labels = self.objects(item)
        if self.augment:
            changed, moved, kept = augment(rng, image, boxes, self.flip_vertical)
            if len(kept) or not self.noise.skip_empty:  # else no object is left: take the image unchanged
                image, boxes, labels = changed, moved, labels[kept]
        pixels = square(image, self.size)
        return closed_set_sample(
            rng, pixels, boxes, labels, image.size, self.language, self.branches, self.grid, self.noise
        )
