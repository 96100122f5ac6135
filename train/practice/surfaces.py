"""More surfaces for the training scenes' backgrounds, nearer to photographs than the formulas are.

Where a formula of backgrounds.py looks one field up in a palette, these vary in colour and brightness apart
from each other, hold many small things, or have a depth. The held-out sets are not made of them.

Every surface is a function (rng, size) -> uint8 [size, size, 3].
"""

import math

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from train.practice.backgrounds import coordinates, random_colours, smooth_noise, wave


def muted_colours(rng, count):
    """Colours [count, 3] around one colour, most of them greyish as those of nature and of rooms are."""
    base = 128 + (random_colours(rng, 1) - 128) * 0.8
    grey = rng.uniform(0.3, 1.0)
    base = base * (1 - grey) + base.mean() * grey + rng.normal(0, 8, 3)
    return (base + rng.normal(0, rng.uniform(8, 40), (count, 1)) + rng.normal(0, 8, (count, 3))).clip(0, 255)


def octaves(rng, size, slope, count=7):
    """Noise whose amplitude falls with the frequency to the power of slope: float32 [size, size], mean about
    0, deviation 1."""
    fields = (smooth_noise(rng, size, 2 * 2**k) * np.float32(2 ** (-slope * k)) for k in range(count))
    field = sum(fields)
    return (field - field.mean()) / field.std().clip(1e-3)


def shade(colour, *parts):
    """A colour [3] plus fields [H, W], each times its own colour or number -> uint8 [H, W, 3]."""
    varied = sum(field[..., None] * np.asarray(by, np.float32) for field, by in parts)
    image = np.asarray(colour, np.float32) + varied
    return image.clip(0, 255).astype(np.uint8)


def natural(rng, size):
    """Earth, plaster, fog, foliage from afar: brightness and tint vary on all scales, by a random slope."""
    bright = octaves(rng, size, rng.uniform(0.3, 1.5))
    tint = octaves(rng, size, rng.uniform(0.8, 1.8), count=4)
    return shade(muted_colours(rng, 1)[0], (bright, rng.uniform(5, 45)), (tint, rng.normal(0, 15, 3)))


def cells(rng, size):
    """Stones, tiles, scales: every pixel has the colour of the nearest of some random points."""
    count = int(rng.integers(5, 26))
    x, y = coordinates(size)
    centres = rng.random((count, 2), np.float32)
    nearest, second = np.full((2, size, size), 9, np.float32)
    owner = np.zeros((size, size), np.uint8)
    for k, (cx, cy) in enumerate(centres):
        distance = (x - cx) ** 2 + (y - cy) ** 2
        closer = distance < nearest
        second = np.minimum(second, np.maximum(nearest, distance))
        nearest = np.minimum(nearest, distance)
        owner[closer] = k
    image = muted_colours(rng, count).astype(np.float32)[owner]
    if rng.random() < 0.7:  # joints
        depth = np.sqrt(second) - np.sqrt(nearest)
        image = image * (depth / rng.uniform(0.01, 0.15)).clip(rng.uniform(0, 0.8), 1)[..., None]
    return image.clip(0, 255).astype(np.uint8)


def grain(rng, size):
    """Wood, brushed metal, grass, water: noise that is drawn out in one direction."""
    across, along = rng.uniform(8, 64), rng.uniform(1, 6)
    sides = max(1, round(along)), max(1, min(round(across), size))
    field = Image.fromarray(rng.integers(0, 256, sides[::-1], np.uint8))
    field = np.asarray(field.resize((size, size), Image.Resampling.BICUBIC), np.float32) / 255 - 0.5
    if rng.random() < 0.5:  # year rings
        rings = wave(smooth_noise(rng, size, along) * 2 + coordinates(size)[1] * across / 4)
        field = field * 0.5 + rings - 0.5
    if rng.random() < 0.5:
        field = field.T
    base, other = muted_colours(rng, 2)
    return shade(base, (field, (other - base) * 2 + rng.uniform(10, 80)))


def lights(rng, size):
    """A dusk or a room far out of focus: a gradient with discs of light, some of them blurred."""
    x, y = coordinates(size)
    top, bottom = muted_colours(rng, 2) * rng.uniform(0.3, 1.0)
    fall = y * rng.uniform(0.5, 1) + x * rng.uniform(-0.3, 0.3)
    picture = Image.fromarray(shade(top, (fall, bottom - top)))
    draw = ImageDraw.Draw(picture, "RGBA")
    reach = size * rng.uniform(0.01, 0.08)
    for colour in random_colours(rng, int(rng.integers(4, 40))).astype(int).tolist():
        (cx, cy), r = rng.random(2) * size, reach * rng.uniform(0.5, 1.6)
        draw.ellipse((cx - r, cy - r, cx + r, cy + r), fill=(*colour, int(rng.integers(40, 200))))
    if rng.random() < 0.6:
        picture = picture.filter(ImageFilter.BoxBlur(size / 128 * rng.uniform(0.5, 5)))
    return np.asarray(picture)


def litter(rng, size):
    """Leaves, pebbles, blades of grass, a pile: many small pieces upon each other, the upper ones lighter."""
    count, length = int(rng.integers(60, 200)), size * rng.uniform(0.03, 0.16)
    colours = muted_colours(rng, count) * np.linspace(rng.uniform(0.3, 1), 1.1, count)[:, None]
    centres = rng.uniform(0, size, (count, 1, 2))
    angle = rng.uniform(0, 2 * math.pi) + rng.normal(0, rng.uniform(0.2, 3), count)
    long = length * rng.uniform(0.5, 1.5, (count, 1)) * np.stack((np.cos(angle), np.sin(angle)), 1)
    broad = long[:, ::-1] * (-1, 1) * rng.uniform(0.1, 0.9)
    corners = centres + np.stack((long, broad, -long, -broad), 1)  # [count, 4, 2]: diamonds
    picture = Image.fromarray(np.full((size, size, 3), colours[0].clip(0, 255), np.uint8))
    draw = ImageDraw.Draw(picture)
    outlines, fills = corners.reshape(count, 8).tolist(), colours.clip(0, 255).astype(int).tolist()
    for outline, colour in zip(outlines, fills, strict=True):
        draw.polygon(outline, fill=tuple(colour))
    if rng.random() < 0.4:
        picture = picture.filter(ImageFilter.BoxBlur(size / 128 * rng.uniform(0.4, 3)))
    return np.asarray(picture)


def room(rng, size):
    """A wall, a floor and upright and lying slabs in between, each lit from one side."""
    picture = Image.fromarray(shade(muted_colours(rng, 1)[0], (smooth_noise(rng, size, 2) - 0.5, 60)))
    draw = ImageDraw.Draw(picture)
    edge = size * rng.uniform(0.4, 0.85)
    colours = muted_colours(rng, 12) * rng.uniform(0.5, 1.2, (12, 1))
    colours = [tuple(colour) for colour in colours.clip(0, 255).astype(int).tolist()]
    draw.rectangle((0, edge, size, size), fill=colours[0])
    for k in range(1, int(rng.integers(3, 7))):
        x0, w = rng.uniform(-0.2, 0.9) * size, rng.uniform(0.05, 0.6) * size
        y1 = edge + rng.uniform(-0.3, 0.25) * size
        y0 = y1 - rng.uniform(0.03, 0.8) * size
        draw.rectangle((x0, y0, x0 + w, y1), fill=colours[k])
        if rng.random() < 0.6:  # its other face, in the shade
            draw.rectangle((x0 + w, y0, x0 + w * rng.uniform(1.05, 1.3), y1), fill=colours[k + 5])
    if rng.random() < 0.6:
        picture = picture.filter(ImageFilter.BoxBlur(size / 128 * rng.uniform(0.4, 4)))
    return np.asarray(picture)


SURFACES = {each.__name__: each for each in (natural, cells, grain, lights, litter, room)}
