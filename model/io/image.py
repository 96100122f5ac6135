"""Image files -> the network's input, pixel for pixel as transformers' SigLIP processor (PIL) makes it."""

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

READERS = 4  # threads that decode image files
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}


def load_image(path: str | Path) -> Image.Image:
    """An upright RGB image, EXIF orientation applied. Raises ValueError that names the file and the fault."""
    try:
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I;16"):  # Pillow's own conversion cuts all above 255 off
                image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
            return image.convert("RGB")
    except FileNotFoundError as error:
        raise ValueError(f"{path}: no such file") from error
    except (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: not a readable image ({error})") from error


def check_size(image: Image.Image, file: Path, width: int, height: int) -> None:
    """Raise ValueError if an upright image is not of the size that its annotations were made for: every box
    would be somewhere else."""
    if image.size != (width, height):
        raise ValueError(
            f"{file} has {image.width}x{image.height} pixels (upright), "
            f"its annotations are for {width}x{height}"
        )


def to_tensor(image: Image.Image, size: int) -> Tensor:
    """PIL image -> float32 [3, size, size] in [-1, 1]: bicubic, squashed to a square."""
    return pixels_to_tensor(np.asarray(image.resize((size, size), Image.Resampling.BICUBIC)))


def pixels_to_tensor(pixels: np.ndarray) -> Tensor:
    """uint8 [..., H, W, 3] -> float32 [..., 3, H, W] in [-1, 1]."""
    scaled = torch.from_numpy(pixels * np.float32(1 / 255))
    return ((scaled - 0.5) / 0.5).movedim(-1, -3)


def read_ahead(items: Iterable, size: int) -> Iterator[list[tuple[Any, Future]]]:
    """Batches of (file, future of its image), the image being read in the background while the caller works.

    The future's result() is the image, or raises the ValueError of load_image.
    """
    with ThreadPoolExecutor(READERS) as pool:
        items, waiting = iter(items), deque()
        while True:
            more = islice(items, 2 * size - len(waiting))
            waiting.extend((item, pool.submit(load_image, item)) for item in more)
            if not waiting:
                return
            yield [waiting.popleft() for _ in range(min(size, len(waiting)))]
