"""Image files -> the network's input, pixel for pixel as transformers' SigLIP processor (PIL) makes it.

`to_network(square(load_image("photo.jpg"), 224))` is float32 [3, 224, 224] in [-1, 1].
"""

import contextlib
import re
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from model.io.names import shown
from model.io.writing import explain, open_regular

READERS = 4  # threads that decode image files: Pillow's decoders let other threads run
# The formats of photographs, drawings and data sets. Pillow's other 37 decoders stay off (AVIF, JPEG 2000,
# PPM, PSD and EPS, which starts Ghostscript, are some): each is code that a hostile file could attack.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
MAX_PIXELS = 178_956_970  # half a gigabyte in RGB; a file may say that it has any number. Pillow's own limit
PIXELS_AHEAD = 2 * MAX_PIXELS  # decoded at a time, 1.4 GB: Pillow keeps 4 bytes of each
# Of TIFF: the tags of a tile's sides, and how long they may be in a file whose image is smaller than that.
TILE_WIDTH, TILE_HEIGHT, MAX_TILE = 322, 323, 4096
# Of JPEG: encoders write about ten scans, libtiff refuses more than 100. A marker is FF and a byte that is no
# stuffing, no restart and no filler; after each but END comes a segment that begins with its length.
MAX_SCANS, SCAN, END = 50, b"\xff\xda", b"\xff\xd9"
MARKER = re.compile(rb"\xff[\x02-\xcf\xd9-\xfe]")
HEAD_BYTES = 1 << 14  # of a file that lists images: the first of them is there
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}


def load_image(source: str | Path | Image.Image, enough: int | None = None) -> Image.Image:
    """An upright RGB image from a file or a PIL image.

    enough: pixels a side to which a larger file may be reduced, roughly: JPEG is decoded at 1/2, 1/4 or 1/8,
    which is quicker, and others are divided by a whole number.
    """
    if isinstance(source, Image.Image):
        return upright(source)
    if not isinstance(source, str | Path):
        raise ValueError(f"an image is a file or a PIL image, not of type {type(source).__name__}")
    return load_with_size(source, enough)[0]


def load_with_size(file: str | Path, enough: int | None = None) -> tuple[Image.Image, tuple[int, int]]:
    """load_image of a file; and the width and height of the upright picture, whatever it was reduced to."""
    with open_image(file) as image:
        size = turned_size(image)
        if enough:
            image.draft(image.mode, (enough, enough))
        image = upright(image)
    if enough and min(image.size) >= 2 * enough:
        image = image.reduce(min(image.size) // enough)
    return image, size


@contextlib.contextmanager
def open_image(file: str | Path) -> Iterator[Image.Image]:
    """An image file whose header is read and whose size is checked; its pixels are decoded when asked for.

    Whatever goes wrong, here or inside the block, is a ValueError that names the file.
    """
    name = shown(file) or "''"
    # Decoders fail in more ways than they document (RuntimeError, EOFError, KeyError, MemoryError, ...), and
    # one picture must not end a run over many.
    with open_regular(file) as stream, explain(f"{name}: not a readable image", Exception):
        try:
            image = Image.open(stream, formats=FORMATS)
        except UnidentifiedImageError:  # its own words are about the stream
            raise ValueError(f"not in one of the formats {', '.join(FORMATS)}") from None
        with image:
            check_header(image, stream)
            yield image


def check_header(image: Image.Image, stream: BinaryIO) -> None:
    """Compare what an opened file says about itself with limits, before any of its pixels are decoded."""
    pixels = image.width * image.height
    if not 0 < pixels <= MAX_PIXELS:
        raise ValueError(f"{image.width} x {image.height} pixels; the limit is {MAX_PIXELS:,} pixels")
    if image.format == "TIFF":
        width, height = (int(image.tag_v2.get(tag, 1)) for tag in (TILE_WIDTH, TILE_HEIGHT))
        if width * height > max(pixels, MAX_TILE**2):  # a whole tile is decoded, however small the image is
            raise ValueError(f"tiles of {width} x {height} pixels in {image.width} x {image.height} pixels")
    if image.format in ("JPEG", "MPO"):  # an MPO file is a JPEG file with further pictures after the first
        start = stream.tell()
        stream.seek(0)
        scans = count_scans(stream.read())
        stream.seek(start)
        if scans > MAX_SCANS:  # each costs time for all pixels and may take no more than 30 bytes
            raise ValueError(f"more than {MAX_SCANS} scans")


def count_scans(jpeg: bytes) -> int:
    """How many scans the first picture of a JPEG file has; counting stops after MAX_SCANS."""
    if jpeg.count(SCAN) <= MAX_SCANS:  # fast, and true of all that a camera writes
        return jpeg.count(SCAN)
    # The two bytes may stand in a segment or in what follows the picture: only a walk says what they are.
    scans, at = 0, 2
    while scans <= MAX_SCANS and (marker := MARKER.search(jpeg, at)) and marker[0] != END:
        scans += marker[0] == SCAN
        at = marker.end() + int.from_bytes(jpeg[marker.end() : marker.end() + 2], "big")
    return scans


def upright(image: Image.Image) -> Image.Image:
    """An RGB image, turned as EXIF says, from an image of any mode."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):  # Pillow's own conversion clips everything above 255
        image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
    elif image.mode in ("I", "F"):  # 32 bits: Pillow clips here, too, and nothing says what is white
        low, high = image.getextrema()
        if low < 0 or high > 255 or 0 < high <= 1:
            raise ValueError(f"pixels of 32 bits from {low:g} to {high:g}: save it in 8 or 16 bits")
    return image.convert("RGB")


def upright_size(file: str | Path) -> tuple[int, int]:
    """Width and height of the picture that load_image would return, by its header."""
    with open_image(file) as image:
        return turned_size(image)


def turned_size(image: Image.Image) -> tuple[int, int]:
    """The size of an opened image after `upright`."""
    turned = image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)  # others mean nothing
    return (image.height, image.width) if turned else image.size


def image_folder(file: Path, images: Path | None) -> Path:
    """The folder of the images that a file lists: by default images/ beside it, or where there is none the
    file's own folder, if that has pictures. That, too, if names begin with images/, as Label Studio's do."""
    beside = file.parent / "images"
    if images or beside.is_dir():
        return images or (file.parent if _names_folder(file) and not (beside / "images").is_dir() else beside)
    there = file.parent.iterdir() if file.parent.is_dir() else ()
    return file.parent if any(other.suffix.lower() in SUFFIXES for other in there) else beside


def _names_folder(file: Path) -> bool:
    """Whether the first image of a COCO file or of JSON lines is images/..."""
    if not file.is_file():
        return False
    with open_regular(file) as handle:
        first = re.search(rb'"(file_name|image)"\s*:\s*"(images/)?', handle.read(HEAD_BYTES))
    return first is not None and first[2] is not None


def check_size(size: tuple[int, int], file: Path, width: int, height: int) -> None:
    """Refuse an upright image of another size than its annotations are for: its boxes would be off."""
    if size != (width, height):
        raise ValueError(
            f"{file} has {size[0]}x{size[1]} pixels (upright), its annotations are for {width}x{height}"
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


def pixels_of(source: str | Path | Image.Image) -> int:
    """How many pixels an image has, by its header; 0 if it has none that can be read."""
    if isinstance(source, Image.Image):
        return source.width * source.height
    with contextlib.suppress(ValueError), open_image(source) as image:  # load_image will say what is wrong
        return image.width * image.height
    return 0


def read_ahead(items: Iterable, size: int, most: int = PIXELS_AHEAD) -> Iterator[list[tuple[Any, Future]]]:
    """Batches of (file, future of its image): the images are read in the background while the caller works.

    The future's result() is the image, or raises what load_image did. A batch has at most half of `most`
    pixels, and together with what is read for the next one at most all of them, or is a single image: so
    large images make batches of fewer than `size`.
    """
    # Headers in a thread of their own: they would wait for the decoding of all images before them.
    headers, decoders = ThreadPoolExecutor(1), ThreadPoolExecutor(READERS)
    items, waiting, reading = iter(items), deque(), deque()
    try:
        while True:
            more = islice(items, 2 * size - len(waiting) - len(reading))
            waiting.extend((item, headers.submit(pixels_of, item)) for item in more)
            pixels = sum(count for _, count, _ in reading)
            while waiting and (not reading or pixels + waiting[0][1].result() <= most):
                item, header = waiting.popleft()
                pixels += header.result()
                reading.append((item, header.result(), decoders.submit(load_image, item)))
            if not reading:
                return
            batch, room = [], most // 2
            while reading and len(batch) < size and (not batch or reading[0][1] <= room):
                item, count, image = reading.popleft()
                batch.append((item, image))
                room -= count
            yield batch
            del batch, image  # they hold images
    finally:  # if the caller stops early, it need not wait for all that was to be read
        for pool in (headers, decoders):
            pool.shutdown(cancel_futures=True)
