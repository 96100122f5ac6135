"""Augmentation of an image together with its boxes: flip, scale and shift, colour.

    image, boxes, kept = augment(rng, image, boxes)
    labels = labels[kept]

Boxes are float64 [n, 4], x0, y0, x1, y1 in pixels of the image that they are passed or returned with. The
published closed-set recipe also rotates by up to 15 degrees. That is left out: the upright box around a box
rotated by 15 degrees has 1.5 times its area or more, so the model would learn boxes that are too large.
"""

import numpy as np
from PIL import Image, ImageEnhance

from model.decoding.boxes import areas

FLIP, RESCALE, JITTER = 0.5, 0.7, 0.5  # probability of each step
SCALE = (0.5, 1.25)  # range of the crop's sides, in those of the image: below 1 zooms in
SHIFT = 0.1  # how far the crop may stray from where it fits, in the image's sides
MIN_KEPT = 0.3  # share of a box's area: an object with less of it in the crop is dropped
FILL = (127, 127, 127)  # around the image: 0 for the network
BRIGHTNESS, CONTRAST, SATURATION = 0.2, 0.2, 0.3  # x: a factor between 1 - x and 1 + x
ENOUGH = 4  # times the network's pixels a side: what a picture is read with, for a crop that zooms in
HUE = 5  # at most, in steps of 1/256 of the colour circle


def flip(image: Image.Image, boxes: np.ndarray, vertical: bool = False) -> tuple[Image.Image, np.ndarray]:
    """Swap left and right, or top and bottom."""
    axis, way = (1, "FLIP_TOP_BOTTOM") if vertical else (0, "FLIP_LEFT_RIGHT")
    mirrored = boxes.copy()
    mirrored[:, [axis, axis + 2]] = image.size[axis] - boxes[:, [axis + 2, axis]]
    return image.transpose(Image.Transpose[way]), mirrored


def rescale(
    rng: np.random.Generator, image: Image.Image, boxes: np.ndarray
) -> tuple[Image.Image, np.ndarray, np.ndarray]:
    """A random crop of the image's aspect ratio, possibly larger than the image. Boxes are clipped to it.

    kept int64 [m]: the rows of the boxes that stay.
    """
    size = np.array(image.size)
    crop_size = np.round(size * np.exp(rng.uniform(*np.log(SCALE)))).clip(1).astype(int)
    room = size - crop_size  # negative if the crop is larger
    low = rng.uniform(np.minimum(room, 0), np.maximum(room, 0)) + rng.uniform(-SHIFT, SHIFT, 2) * size
    low = np.round(low).astype(int)
    cropped = Image.new("RGB", tuple(crop_size.tolist()), FILL)
    cropped.paste(image, tuple((-low).tolist()))
    clipped = (boxes - np.tile(low, 2)).clip(0, np.tile(crop_size, 2))
    kept = np.flatnonzero((areas(clipped) > 0) & (areas(clipped) >= MIN_KEPT * areas(boxes)))
    return cropped, clipped[kept], kept


def jitter(rng: np.random.Generator, image: Image.Image) -> Image.Image:
    """Change brightness, contrast, saturation and, slightly, hue."""
    strengths = ((ImageEnhance.Brightness, BRIGHTNESS), (ImageEnhance.Contrast, CONTRAST))
    for enhance, strength in (*strengths, (ImageEnhance.Color, SATURATION)):
        image = enhance(image).enhance(rng.uniform(1 - strength, 1 + strength))
    hue, saturation, value = image.convert("HSV").split()
    shift = int(rng.integers(-HUE, HUE + 1))
    hue = hue.point([(step + shift) % 256 for step in range(256)])
    return Image.merge("HSV", (hue, saturation, value)).convert("RGB")


def augment(
    rng: np.random.Generator, image: Image.Image, boxes: np.ndarray, flip_vertical: bool = False
) -> tuple[Image.Image, np.ndarray, np.ndarray]:
    """Take each step with its probability. kept int64 [m]: the rows of the boxes [n, 4] that are returned.
    flip_vertical: top and bottom are swapped as often as left and right, for pictures without an up."""
    kept = np.arange(len(boxes))
    if rng.random() < FLIP:
        image, boxes = flip(image, boxes)
    if flip_vertical and rng.random() < FLIP:
        image, boxes = flip(image, boxes, vertical=True)
    if rng.random() < RESCALE:
        image, boxes, kept = rescale(rng, image, boxes)
    if rng.random() < JITTER:
        image = jitter(rng, image)
    return image, boxes, kept
