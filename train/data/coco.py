"""The objects of a COCO file, or of another form of data, in memory; and closed-set samples from them."""

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
from model.io.image import check_size, load_with_size, square
from train.data.augment import ENOUGH, augment
from train.data.records import read_records
from train.data.samples import closed_set_lengths, closed_set_sample
from train.data.targets import NANO_NOISE, Noise


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
        image_rows, category_rows = ({i: row for row, i in enumerate(keys)} for keys in (pictures, ids))
        objects = [record for record in annotations.values() if not record["iscrowd"]]
        owners = np.array([image_rows[record["image_id"]] for record in objects], np.int64)
        labels = np.array([category_rows[record["category_id"]] for record in objects], np.int64)
        boxes = np.array([record["bbox"] for record in objects], np.float64).reshape(-1, 4)
        boxes = np.concatenate((boxes[:, :2], boxes[:, :2] + boxes[:, 2:]), axis=1)  # x0, y0, x1, y1
        boxes = boxes.clip(0, np.tile(np.array(sizes), 2)[owners])
        order = np.argsort(owners, kind="stable")  # by image, and within it as in the file
        order = order[(boxes[:, 2:] > boxes[:, :2]).all(1)[order]]  # without degenerate ones
        arrays = dict(
            sizes=np.array(sizes, np.int64),
            offsets=np.searchsorted(owners[order], np.arange(len(pictures) + 1)),
            boxes=boxes[order],
            labels=labels[order],
            names=np.frombuffer(bytearray(b"".join(names)), np.uint8),
            name_offsets=np.cumsum([0, *map(len, names)]),
        )
        return cls(
            classes=tuple(categories[i]["name"] for i in ids),
            **{name: torch.from_numpy(array).share_memory_() for name, array in arrays.items()},
            skipped_crowd=len(annotations) - len(objects),
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
        count = len(index.classes)
        if self.label_of.shape != (count,):
            raise ValueError(f"label_of must have {count} entries, one for each class of the file")
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

    def picture(self, item: int, enough: int | None = None) -> Image.Image:
        """The upright picture, of the size that the file gives; with `enough`, as load_image makes it."""
        file = self.images / self.name(item)
        image, size = load_with_size(file, enough)
        check_size(size, file, *self.picture_size(item))
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
        image = self.picture(item, ENOUGH * self.size if self.augment else None)
        boxes, labels = self.objects(item)
        smaller = np.tile(np.divide(image.size, self.picture_size(item)), 2)
        boxes, grid = boxes * smaller, self.grid if (smaller == 1).all() else 0
        if self.augment:
            changed, moved, kept = augment(rng, image, boxes, self.flip_vertical)
            if len(kept) or not self.noise.skip_empty:  # else no object is left: take the image unchanged
                image, boxes, labels = changed, moved, labels[kept]
        pixels = square(image, self.size)
        return closed_set_sample(
            rng, pixels, boxes, labels, image.size, self.language, self.branches, grid, self.noise
        )
