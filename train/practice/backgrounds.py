"""Practice scenes without their objects: surfaces, horizons, floors, clutter, and the effects of a camera.

A surface is a scalar field in 0..1 (a formula from a table) looked up in a random palette; a layout combines
one or two of them. Training has more surfaces, of surfaces.py. Variety matters more than beauty: a detector
learns to ignore only the backgrounds that it has seen. Axes: H = W = size, in pixels. Colours are 0..255.
"""

import math
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFilter


def pick(rng, items):
    """A random item, or None if there are none."""
    return items[int(rng.integers(len(items)))] if len(items) else None


def random_colours(rng, count):
    """Colours [count, 3] with doubled contrast, so that saturated, dark and light ones are common."""
    return np.clip(rng.random((count, 3)) * 510 - 127, 0, 255)


def frac(x):
    return x - np.floor(x)  # several times faster than x % 1


def wave(x):  # a triangle wave of period 1 between 0 and 1
    return np.abs(frac(x) * 2 - 1)


# name: (fewest and most periods across the image, formula). s: periods; u, v: rotated coordinates in periods;
# n(k): noise with k bumps across the image.
TEXTURES = {
    "flat": (1, 1, lambda u, v, s, n: n(1)),
    "ramp": (0.3, 0.8, lambda u, v, s, n: wave(u)),
    "blobs": (2, 12, lambda u, v, s, n: n(s)),
    "grain": (20, 120, lambda u, v, s, n: n(s)),
    "clouds": (2, 6, lambda u, v, s, n: n(s) * 0.6 + n(2 * s) * 0.3 + n(4 * s) * 0.2),
    "rough": (3, 8, lambda u, v, s, n: n(s) * 0.4 + n(4 * s) * 0.3 + n(12 * s) * 0.3),
    "crumpled": (2, 6, lambda u, v, s, n: np.abs(n(s) - 0.5) + np.abs(n(2 * s) - 0.5) * 0.7),
    "stripes": (2, 16, lambda u, v, s, n: wave(u)),
    "bands": (1, 6, lambda u, v, s, n: wave(u + 1.5 * n(4))),
    "contours": (1, 5, lambda u, v, s, n: wave(s * n(4))),
    "checks": (2, 12, lambda u, v, s, n: (np.floor(u) + np.floor(v)) % 2 * 0.8 + 0.1),
    "plaid": (2, 10, lambda u, v, s, n: (wave(u) + wave(v) + n(60) * 0.3) / 2.3),
    "bricks": (2, 8, lambda u, v, s, n: np.minimum(wave(u / 2 + np.floor(v) % 2 / 2), wave(v) / 2)),
    "dots": (0.7, 14, lambda u, v, s, n: np.hypot(frac(u) - 0.5, frac(v) - 0.5) * 1.4),
}
# Never trained on: half of the backgrounds of the held-out sets are made of these.
HELD_OUT_TEXTURES = {
    "paving": (2, 7, lambda u, v, s, n: (np.floor(u + n(5)) * 5 + np.floor(v + n(5)) * 3) % 7 / 7),
    "rings": (2, 10, lambda u, v, s, n: wave(np.hypot(u, v) + n(4))),
    "weave": (3, 14, lambda u, v, s, n: np.where((np.floor(u) + np.floor(v)) % 2 > 0, wave(u), wave(v))),
}


@cache
def coordinates(size):
    """x and y of every pixel, float32 [2, size, size] in 0..1."""
    return np.mgrid[:size, :size].astype(np.float32)[::-1] / size


def smooth_noise(rng, size, bumps):
    """A smooth random field, float32 [size, size] in 0..1."""
    side = min(max(1, round(bumps)), size)
    grid = np.frombuffer(rng.bytes(side * side), np.uint8).reshape(side, side)
    field = Image.fromarray(grid).resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(field, np.float32) / 255


def draw_texture(rng, size, table):
    """A random texture of the table, in a smooth or a stepped palette: uint8 [size, size, 3].
    Entries of the table that are functions (surfaces.py) are painted by themselves."""
    entry = pick(rng, list(table.values()))
    if callable(entry):
        return entry(rng, size)
    low, high, formula = entry
    scale, angle = low * (high / low) ** rng.random(), rng.uniform(0, math.pi) * (rng.random() < 0.5)
    cos, sin = scale * math.cos(angle), scale * math.sin(angle)
    x, y = coordinates(size) - rng.random((2, 1, 1), np.float32)
    field = formula(x * cos + y * sin, y * cos - x * sin, scale, lambda bumps: smooth_noise(rng, size, bumps))
    count = int(rng.integers(2, 7))
    spread = pick(rng, (0.15, 0.4, 1.0))  # most real surfaces vary around one colour
    palette = random_colours(rng, 1) * (1 - spread) + random_colours(rng, count) * spread
    grey = rng.random()
    palette = palette * (1 - grey) + palette.mean(1, keepdims=True) * grey
    if rng.random() < 0.4:
        lookup = palette[np.arange(256) * count // 256]
    else:
        knots = np.linspace(0, 255, count)
        lookup = np.stack([np.interp(np.arange(256), knots, channel) for channel in palette.T], 1)
    return lookup.astype(np.uint8)[np.clip(field * 255, 0, 255).astype(np.uint8)]


def add_clutter(rng, image):
    """Draw bars, ellipses, polygons and lines in random colours: edges and corners that are not objects."""
    picture = Image.fromarray(image)
    draw = ImageDraw.Draw(picture)
    size = len(image)
    for _ in range(int(rng.integers(1, 7))):
        colour = tuple(random_colours(rng, 1)[0].astype(int).tolist())
        centre, reach = rng.random(2) * size, size * rng.uniform(0.05, 0.45)
        points = centre + rng.uniform(-reach, reach, (int(rng.integers(3, 7)), 2))
        corners = [*points[:2].min(0).tolist(), *points[:2].max(0).tolist()]
        points = points.ravel().tolist()
        shape = int(rng.integers(4))
        if shape == 0:
            draw.rectangle(corners, fill=colour)
        elif shape == 1:
            draw.ellipse(corners, fill=colour)
        elif shape == 2:
            draw.polygon(points, fill=colour)
        else:
            draw.line(points, fill=colour, width=int(rng.integers(1, 5)))
    return np.asarray(picture)


def draw_background(rng, size, table, random_picture):
    """A background made of the textures of `table`, float32 [size, size, 3].
    random_picture: a function () -> a small premultiplied picture, to be shown far out of focus."""
    image = draw_texture(rng, size, table)
    layout = rng.random()
    if layout < 0.2:  # one surface showing through another
        holes = smooth_noise(rng, size, rng.uniform(2, 9))[..., None] > 0.5
        image = np.where(holes, draw_texture(rng, size, table), image)
    elif layout < 0.45:  # sky above hills, a wall above the floor
        x, y = coordinates(size)
        edge = rng.uniform(0.3, 0.8) + rng.normal(0, 0.15) * (x - 0.5)
        if rng.random() < 0.5:
            edge = edge + rng.uniform(0, 0.4) * (smooth_noise(rng, size, rng.uniform(2, 8))[0] - 0.5)
        image = np.where((y < edge)[..., None], image, draw_texture(rng, size, table))
    elif layout < 0.55:  # something out of focus
        few = int(rng.integers(3, 9))
        rgba = np.asarray(random_picture().resize((few, few), Image.Resampling.BOX))
        rgb = (rgba[..., :3] + random_colours(rng, 1) * (1 - rgba[..., 3:] / 255)).astype(np.uint8)
        image = np.asarray(Image.fromarray(rgb).resize((size, size), Image.Resampling.BICUBIC))
    if rng.random() < 0.35:
        image = add_clutter(rng, image)
    image = image.astype(np.float32)
    if rng.random() < 0.4:  # uneven light
        image *= (0.6 + 0.7 * smooth_noise(rng, size, rng.uniform(2, 5)))[..., None]
    return image


def simulate_camera(rng, canvas):
    """Exposure, sensor noise and a soft lens, each only sometimes. Returns uint8 [H, W, 3]."""
    if rng.random() < 0.3:
        canvas = canvas * rng.uniform(0.7, 1.15) + rng.uniform(-20, 20)
    if rng.random() < 0.25:
        grain = np.frombuffer(rng.bytes(canvas.size), np.int8).reshape(canvas.shape)
        canvas = canvas + grain * np.float32(rng.uniform(0.02, 0.14))
    image = np.clip(canvas, 0, 255).astype(np.uint8)
    if rng.random() < 0.12:
        image = np.asarray(Image.fromarray(image).filter(ImageFilter.BoxBlur(rng.uniform(0.3, 0.8))))
    return image
