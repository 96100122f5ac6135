"""Augmentation of a picture and the boxes in it: flip, scale and shift, colour.

    image, boxes, kept = augment(rng, image, boxes)
    labels = labels[kept]

Boxes are float64 [n, 4], x0, y0, x1, y1 in pixels of the picture they come or go with. The published
closed-set recipe also rotates by up to 15 degrees. That is left out: the upright box around a box turned by
15 degrees has 1.5 times its area or more, so the model would be taught boxes that are too large.
"""

import numpy as np
from PIL import Image, ImageEnhance

from model.decoding.boxes import areas

FLIP, RESCALE, JITTER = 0.5, 0.7, 0.5  # chance of each step
SCALE = (0.5, 1.25)  # sides of the window that is shown, in those of the picture: below 1 zooms in
SHIFT = 0.1  # of the picture's sides, how far the window may stray beyond where its size alone puts it
MIN_KEPT = 0.3  # of a box's area: an object with less of it in the window is dropped
FILL = (127, 127, 127)  # around the picture: 0 for the network
BRIGHTNESS, CONTRAST, SATURATION = 0.2, 0.2, 0.3  # a factor within 1 - x .. 1 + x
HUE = 5  # steps of 256 around the colour circle


def flip(image: Image.Image, boxes: np.ndarray) -> tuple[Image.Image, np.ndarray]:
    """Left and right swapped."""
    mirrored = boxes.copy()
    mirrored[:, [0, 2]] = image.width - boxes[:, [2, 0]]
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), mirrored


def rescale(
    rng: np.random.Generator, image: Image.Image, boxes: np.ndarray
) -> tuple[Image.Image, np.ndarray, np.ndarray]:
    """What a random window over the picture shows, as many pixels as the window has; its shape is kept.

    Boxes are cut at the window. kept int64 [m]: the boxes that stay.
    """
    size = np.array(image.size)
    window = np.round(size * np.exp(rng.uniform(*np.log(SCALE)))).clip(1).astype(int)
    room = size - window
    low = rng.uniform(np.minimum(room, 0), np.maximum(room, 0)) + rng.uniform(-SHIFT, SHIFT, 2) * size
    low = np.round(low).astype(int)
    shown = Image.new("RGB", tuple(window.tolist()), FILL)
    shown.paste(image, tuple((-low).tolist()))
    cut = (boxes - np.tile(low, 2)).clip(0, np.tile(window, 2))
    kept = np.flatnonzero((areas(cut) > 0) & (areas(cut) >= MIN_KEPT * areas(boxes)))
    return shown, cut[kept], kept


def jitter(rng: np.random.Generator, image: Image.Image) -> Image.Image:
    """Brightness, contrast, saturation and, slightly, hue."""
    strengths = ((ImageEnhance.Brightness, BRIGHTNESS), (ImageEnhance.Contrast, CONTRAST))
    for enhance, strength in (*strengths, (ImageEnhance.Color, SATURATION)):
        image = enhance(image).enhance(rng.uniform(1 - strength, 1 + strength))
    hue, saturation, value = image.convert("HSV").split()
    turn = int(rng.integers(-HUE, HUE + 1))
    hue = hue.point([(step + turn) % 256 for step in range(256)])
    return Image.merge("HSV", (hue, saturation, value)).convert("RGB")


def augment(
    rng: np.random.Generator, image: Image.Image, boxes: np.ndarray
) -> tuple[Image.Image, np.ndarray, np.ndarray]:
    """Each step by its chance. kept int64 [m]: which of the boxes [n, 4] the boxes [m, 4] returned are."""
    kept = np.arange(len(boxes))
    if rng.random() < FLIP:
        image, boxes = flip(image, boxes)
    if rng.random() < RESCALE:
        image, boxes, kept = rescale(rng, image, boxes)
    if rng.random() < JITTER:
        image = jitter(rng, image)
    return image, boxes, kept
