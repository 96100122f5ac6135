"""What the practice scenes are made of besides objects: surfaces, horizons, floors, clutter, a camera.

Every surface is a scalar field in 0..1 (one formula of a table) looked up in a random palette; a few layouts
put one or two of them together. Variety matters more than beauty: a detector learns to ignore what it has
seen behind its objects, and nothing else. Axes: H = W = size, in pixels. Colours are 0..255.
"""

import math
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFilter


def pick(rng, items):
    return items[int(rng.integers(len(items)))]


def vivid(rng, count):
    """Random colours with doubled contrast, so that saturated, dark and light ones are common. [count, 3]"""
    return np.clip(rng.random((count, 3)) * 510 - 127, 0, 255)


def frac(x):
    return x - np.floor(x)  # several times faster than x % 1


def tri(x):
    return np.abs(frac(x) * 2 - 1)


# name: (fewest and most periods across the image, formula). s: periods; u, v: turned coordinates in periods;
# n(k): noise with k bumps across.
TEXTURES = {
    "flat": (1, 1, lambda u, v, s, n: n(1)),
    "ramp": (0.3, 0.8, lambda u, v, s, n: tri(u)),
    "blobs": (2, 12, lambda u, v, s, n: n(s)),
    "grain": (20, 120, lambda u, v, s, n: n(s)),
    "clouds": (2, 6, lambda u, v, s, n: n(s) * 0.6 + n(2 * s) * 0.3 + n(4 * s) * 0.2),
    "rough": (3, 8, lambda u, v, s, n: n(s) * 0.4 + n(4 * s) * 0.3 + n(12 * s) * 0.3),
    "crumpled": (2, 6, lambda u, v, s, n: np.abs(n(s) - 0.5) + np.abs(n(2 * s) - 0.5) * 0.7),
    "stripes": (2, 16, lambda u, v, s, n: tri(u)),
    "bands": (1, 6, lambda u, v, s, n: tri(u + 1.5 * n(4))),
    "contours": (1, 5, lambda u, v, s, n: tri(s * n(4))),
    "checks": (2, 12, lambda u, v, s, n: (np.floor(u) + np.floor(v)) % 2 * 0.8 + 0.1),
    "plaid": (2, 10, lambda u, v, s, n: (tri(u) + tri(v) + n(60) * 0.3) / 2.3),
    "bricks": (2, 8, lambda u, v, s, n: np.minimum(tri(u / 2 + np.floor(v) % 2 / 2), tri(v) / 2)),
    "dots": (0.7, 14, lambda u, v, s, n: np.hypot(frac(u) - 0.5, frac(v) - 0.5) * 1.4),
}
# Never trained on: half of the backgrounds of the other sets are made of these.
HELD_OUT_TEXTURES = {
    "paving": (2, 7, lambda u, v, s, n: (np.floor(u + n(5)) * 5 + np.floor(v + n(5)) * 3) % 7 / 7),
    "rings": (2, 10, lambda u, v, s, n: tri(np.hypot(u, v) + n(4))),
    "weave": (3, 14, lambda u, v, s, n: np.where((np.floor(u) + np.floor(v)) % 2 > 0, tri(u), tri(v))),
}


@cache
def coordinates(size):
    return np.mgrid[:size, :size].astype(np.float32)[::-1] / size


def noise(rng, size, bumps):
    """A smooth random field, float32 [size, size] in 0..1."""
    side = min(max(1, round(bumps)), size)
    grid = np.frombuffer(rng.bytes(side * side), np.uint8).reshape(side, side)
    field = Image.fromarray(grid).resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(field, np.float32) / 255


def texture(rng, size, table):
    """One field of the table, coloured softly or in hard steps: uint8 [size, size, 3]."""
    low, high, formula = pick(rng, list(table.values()))
    scale, angle = low * (high / low) ** rng.random(), rng.uniform(0, math.pi) * (rng.random() < 0.5)
    cos, sin = scale * math.cos(angle), scale * math.sin(angle)
    x, y = coordinates(size) - rng.random((2, 1, 1), np.float32)
    field = formula(x * cos + y * sin, y * cos - x * sin, scale, lambda bumps: noise(rng, size, bumps))
    count = int(rng.integers(2, 7))
    spread = pick(rng, (0.15, 0.4, 1.0))  # most real surfaces vary about one colour
    palette = vivid(rng, 1) * (1 - spread) + vivid(rng, count) * spread
    grey = rng.random()
    palette = palette * (1 - grey) + palette.mean(1, keepdims=True) * grey
    if rng.random() < 0.4:
        lookup = palette[np.arange(256) * count // 256]
    else:
        knots = np.linspace(0, 255, count)
        lookup = np.stack([np.interp(np.arange(256), knots, channel) for channel in palette.T], 1)
    return lookup.astype(np.uint8)[np.clip(field * 255, 0, 255).astype(np.uint8)]


def clutter(rng, image):
    """Bars, ellipses, polygons and lines in random colours: edges and corners that are no objects."""
    picture = Image.fromarray(image)
    draw = ImageDraw.Draw(picture)
    size = len(image)
    for _ in range(int(rng.integers(1, 7))):
        colour = tuple(vivid(rng, 1)[0].astype(int).tolist())
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


def background(rng, size, table, any_picture):
    """A whole background out of the surfaces of `table`, float32 [size, size, 3].
    any_picture: a function () -> a small premultiplied picture, to be shown far out of focus."""
    image = texture(rng, size, table)
    layout = rng.random()
    if layout < 0.2:  # one surface showing through another
        holes = noise(rng, size, rng.uniform(2, 9))[..., None] > 0.5
        image = np.where(holes, texture(rng, size, table), image)
    elif layout < 0.45:  # sky above hills, a wall above the floor
        x, y = coordinates(size)
        edge = rng.uniform(0.3, 0.8) + rng.normal(0, 0.15) * (x - 0.5)
        if rng.random() < 0.5:
            edge = edge + rng.uniform(0, 0.4) * (noise(rng, size, rng.uniform(2, 8))[0] - 0.5)
        image = np.where((y < edge)[..., None], image, texture(rng, size, table))
    elif layout < 0.55:  # something out of focus
        few = int(rng.integers(3, 9))
        rgba = np.asarray(any_picture().resize((few, few), Image.Resampling.BOX))
        rgb = (rgba[..., :3] + vivid(rng, 1) * (1 - rgba[..., 3:] / 255)).astype(np.uint8)
        image = np.asarray(Image.fromarray(rgb).resize((size, size), Image.Resampling.BICUBIC))
    if rng.random() < 0.35:
        image = clutter(rng, image)
    image = image.astype(np.float32)
    if rng.random() < 0.4:  # uneven light
        image *= (0.6 + 0.7 * noise(rng, size, rng.uniform(2, 5)))[..., None]
    return image


def camera(rng, canvas):
    """Exposure, a soft lens, a noisy sensor: each only sometimes. Returns uint8 [H, W, 3]."""
    if rng.random() < 0.3:
        canvas = canvas * rng.uniform(0.7, 1.15) + rng.uniform(-20, 20)
    if rng.random() < 0.25:
        grain = np.frombuffer(rng.bytes(canvas.size), np.int8).reshape(canvas.shape)
        canvas = canvas + grain * np.float32(rng.uniform(0.02, 0.14))
    image = np.clip(canvas, 0, 255).astype(np.uint8)
    if rng.random() < 0.12:
        image = np.asarray(Image.fromarray(image).filter(ImageFilter.BoxBlur(rng.uniform(0.3, 0.8))))
    return image
