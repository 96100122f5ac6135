"""Practice scenes as a camera sees them: a window whose edges fall anywhere, and what lenses and files do.

A scene is painted on whole pixels, so its boxes would use only every eighth of the 1,024 location tokens of a
picture of 128 pixels. A photograph's boxes lie anywhere, and the window makes that so.
"""

import io
from dataclasses import replace

import numpy as np
from PIL import Image, ImageFilter

from model.decoding.masks import tight_box

MIN_LEFT = 0.5  # of the pixels of an object that the window's edge cuts: with less it is not recognised
TRIES = 8  # windows, before the scene is taken as it was painted
SIDES = (0.72, 1.0)  # of the window, in those of the scene


def frame(rng, scene):
    """The part of a scene in a random window, resized to the whole. Boxes are cut at the window's edge and
    scaled with it, so that they fall between pixels. At least MIN_LEFT of each object is inside, or nothing,
    and not all are outside; if TRIES windows fail at that, the scene is returned as it is."""
    size = scene.owner.shape[0]
    pixels = np.bincount(scene.owner.ravel() + 1, minlength=len(scene.labels) + 1)[1:]
    for _ in range(TRIES):
        sides = size * rng.uniform(*SIDES) * np.exp(rng.normal(0, 0.06, 2))
        sides = np.minimum(sides, size)
        low = rng.uniform(0, size - sides)
        x0, y0, x1, y1 = *low, *(low + sides)
        inside = np.full_like(scene.owner, -1)
        view = slice(round(y0), round(y1)), slice(round(x0), round(x1))
        inside[view] = scene.owner[view]
        left = np.bincount(inside.ravel() + 1, minlength=len(pixels) + 1)[1:]
        kept = left >= MIN_LEFT * pixels
        if kept.any() and (kept | (left == 0)).all():
            break
    else:
        return scene
    window = (x0, y0, x1, y1)
    image = Image.fromarray(scene.image).resize((size, size), Image.Resampling.BICUBIC, window)
    owner = Image.fromarray(scene.owner.astype(np.uint8))  # none becomes 255
    owner = np.asarray(owner.transform((size, size), Image.Transform.EXTENT, window)).astype(np.int8)
    new_id = np.full(len(kept) + 1, -1, np.int8)  # the last entry is for none
    new_id[:-1][kept] = np.arange(kept.sum())
    boxes = np.array([tight_box(inside == k) for k in np.flatnonzero(kept)])
    boxes = (boxes - np.tile(low, 2)) * np.tile(size / sides, 2)
    boxes = boxes.clip(0, size).astype(np.float32)
    kept_things = dict(boxes=boxes, labels=scene.labels[kept], owner=new_id[owner])
    return replace(scene, image=np.asarray(image), **kept_things)


def develop(rng, image):
    """Light, lens and file: uint8 [H, W, 3] -> the same, with one to three random effects."""
    effects = [light, light, haze, blur, coarse, noise, vignette, jpeg]  # light is twice as likely
    for k in sorted(rng.choice(len(effects), int(rng.integers(1, 4)), replace=False)):
        image = effects[k](rng, image)
    return image


def light(rng, image):
    """Gamma, white balance and, rarely, no colour."""
    gains = np.exp(rng.normal(0, 0.12) + rng.normal(0, 0.08, 3))
    steps = np.linspace(0, 1, 256)[:, None] ** np.exp(rng.normal(0, 0.25)) * gains  # [256, 3]
    table = (steps * 255).clip(0, 255).astype(np.uint8)
    image = np.stack([table[image[..., c], c] for c in range(3)], axis=-1)
    if rng.random() < 0.08:
        image = np.repeat(image.mean(-1, keepdims=True), 3, axis=-1).astype(np.uint8)
    return image


def haze(rng, image):
    """Less contrast and less colour, towards one colour of the air."""
    amount, air = rng.uniform(0.05, 0.4), rng.uniform(60, 230) + rng.normal(0, 15, 3)
    return (image * (1 - amount) + air.clip(0, 255) * amount).astype(np.uint8)


def blur(rng, image):
    """Out of focus, or moved while it was taken."""
    picture = Image.fromarray(image)
    if rng.random() < 0.6:
        return np.asarray(picture.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 1.3))))
    length = float(rng.uniform(0.5, 1.6))
    return np.asarray(picture.filter(ImageFilter.BoxBlur((length, 0) if rng.random() < 0.5 else (0, length))))


def coarse(rng, image):
    """Enlarged from fewer pixels."""
    picture = Image.fromarray(image)
    side = round(len(image) / rng.uniform(1.2, 2.0))
    small = picture.resize((side, side), Image.Resampling.BOX)
    return np.asarray(small.resize(picture.size, Image.Resampling.BICUBIC))


def noise(rng, image):
    """A sensor's, of single pixels or of spots."""
    spot = 1 if rng.random() < 0.6 else 2
    side = -(-len(image) // spot)
    grain = rng.normal(0, rng.uniform(3, 18), (side, side, 3 if rng.random() < 0.6 else 1)).astype(np.float32)
    grain = grain.repeat(spot, 0).repeat(spot, 1)[: len(image), : len(image)]
    return (image + grain).clip(0, 255).astype(np.uint8)


def vignette(rng, image):
    """Darker, or brighter, towards one side or the edges."""
    side = len(image)
    y, x = np.mgrid[:side, :side] / side - rng.uniform(0.2, 0.8, (2, 1, 1))
    fall = 1 + rng.uniform(-0.9, 0.4) * (x * x + y * y) + rng.uniform(-0.4, 0.4) * x
    return (image * fall[..., None]).clip(0, 255).astype(np.uint8)


def jpeg(rng, image):
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=int(rng.integers(20, 90)))
    return np.asarray(Image.open(file))
