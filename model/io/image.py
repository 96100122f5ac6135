"""Image files -> the network's input, pixel for pixel as transformers' SigLIP processor (PIL) makes it.

`to_network(square(load_image("photo.jpg"), 224))` is float32 [3, 224, 224] in [-1, 1].
"""

import struct
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from model.io.writing import explain

READERS = 4  # threads that decode image files: Pillow's decoders let other threads run
PILLOWS_ERRORS = (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError)
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}


def load_image(source: str | Path | Image.Image) -> Image.Image:
    """An upright RGB image from a file or a PIL image."""
    if isinstance(source, Image.Image):
        return upright(source)
    if not isinstance(source, str | Path):
        raise ValueError(f"an image is a file or a PIL image, not of type {type(source).__name__}")
    if not Path(source).exists():
        raise ValueError(f"{source}: no such file")
    with explain(f"{source}: not a readable image", *PILLOWS_ERRORS), Image.open(source) as image:
        return upright(image)


def upright(image: Image.Image) -> Image.Image:
    """An RGB image, turned as EXIF says, from an image of any mode."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):  # Pillow's own conversion clips everything above 255
        image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
    return image.convert("RGB")


def image_folder(file: Path, images: Path | None) -> Path:
    """The folder of the images that a file lists: by default images/ beside it."""
    return images or file.parent / "images"


def check_size(image: Image.Image, file: Path, width: int, height: int) -> None:
    """Refuse an upright image of another size than its annotations are for: its boxes would be off."""
    if image.size != (width, height):
        raise ValueError(
            f"{file} has {image.width}x{image.height} pixels (upright), "
            f"its annotations are for {width}x{height}"
        )


def square(image: Image.Image, size: int) -> np.ndarray:
    """RGB image -> uint8 [size, size, 3], squashed to a square, bicubic."""
    return np.array(image.resize((size, size), Image.Resampling.BICUBIC))


def to_network(pixels: np.ndarray | Tensor) -> Tensor:
    """uint8 [..., H, W, 3], on any device -> float32 [..., 3, H, W] in [-1, 1].

    In two steps, as transformers rounds them: / 127.5 - 1 is not the same to the last bit.
    """
    scaled = torch.as_tensor(pixels) * (1 / 255)
    return ((scaled - 0.5) / 0.5).movedim(-1, -3)


def read_ahead(items: Iterable, size: int) -> Iterator[list[tuple[Any, Future]]]:
    """Batches of (file, future of its image): the images are read in the background while the caller works.

    The future's result() is the image, or raises what load_image did.
    """
    with ThreadPoolExecutor(READERS) as pool:
        items, waiting = iter(items), deque()
        while True:
            more = islice(items, 2 * size - len(waiting))
            waiting.extend((item, pool.submit(load_image, item)) for item in more)
            if not waiting:
                return
            yield [waiting.popleft() for _ in range(min(size, len(waiting)))]
