"""The practice scenes: small drawings of COCO's 80 classes pasted onto random backgrounds.

`make_scene(seed)` draws a scene in two milliseconds, so training never sees one twice and needs no files.
train/practice/write.py writes scenes to disk.

A scene is painted back to front: a background, distractors (drawings of other things), the objects, camera
effects. A map records which object owns each pixel, and boxes are read off that map, so they fit what is
visible. Sprites stay premultiplied by alpha, which makes resampling, tinting and pasting plain sums.

Axes: H, W pixels; n objects of a scene. Colours are floats 0..255 until the camera.
"""

import json
import math
from collections import defaultdict
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

from model.decoding.masks import tight_box
from train.practice.backgrounds import (
    HELD_OUT_TEXTURES,
    TEXTURES,
    draw_background,
    pick,
    random_colours,
    simulate_camera,
)
from train.practice.camera import develop, frame
from train.practice.surfaces import SURFACES

SPRITES = Path(__file__).parents[2] / "media" / "sprites"
DISTRACTOR = -1  # label of sprites outside COCO's classes
MIP_SIDES = (96, 64, 43, 28)  # steps of 1.5: bilinear sampling aliases if it shrinks by much more
MIN_VISIBLE = 0.5  # of an object's pixels, after the image's edge and later objects have cut it
MIN_INSIDE = 0.8  # of an object's pixels, after the image's edge alone has cut it
MIN_PIXELS = 36  # fewer cannot be recognised


@dataclass(frozen=True)
class Split:
    """How the sets differ."""

    stream: int  # second word of the random seed: no two sets share a scene
    counts: tuple[float, ...]  # relative frequency of 1, 2, 3 ... objects
    sides: tuple[float, float] = (26, 80)  # range of an object's longest side, in pixels of an image of 128
    held_out_sources: bool = False
    held_out_textures: bool = True
    crowding: float = 0.1  # probability that an object is put next to an earlier one
    framed: float = 0.0  # probability that camera.frame cuts a window out of it
    developed: float = 0.0  # probability of the effects of camera.develop
    surfaces: bool = False  # backgrounds of surfaces.py too


USUAL_COUNTS = (10, 20, 22, 18, 12, 8, 4, 2, 1, 1, 1, 1)
SPLITS = {
    "train": Split(0, USUAL_COUNTS, held_out_textures=False, framed=0.7, developed=0.5, surfaces=True),
    "same": Split(1, USUAL_COUNTS),
    "vendor": Split(2, USUAL_COUNTS, held_out_sources=True),
    "development": Split(4, USUAL_COUNTS),  # for decisions, such as on constants: no reported figure is of it
    "crowded": Split(3, (0,) * 6 + (1,) * 6, sides=(18, 52), crowding=0.6),
}


@dataclass
class Scene:
    """A picture, and the truth about it."""

    image: np.ndarray  # uint8 [H, W, 3]
    boxes: np.ndarray  # float32 [n, 4]: x0, y0, x1, y1 in pixels, tight around the visible pixels
    labels: np.ndarray  # int64 [n], 0..79
    owner: np.ndarray  # int8 [H, W]: the object visible at each pixel, -1 for none


# ---- sprites -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sprite:
    source: str
    label: int  # 0..79 or DISTRACTOR
    tint: bool  # a one-colour icon, painted in a random colour
    picture: Image.Image  # RGBA

    @cached_property
    def mips(self) -> list[Image.Image]:
        """The picture at every size, largest first, premultiplied ("RGBa"), with a transparent border of one
        pixel that keeps rotated edges soft."""
        picture, mips = self.picture.convert("RGBa"), []
        for side in MIP_SIDES:
            scale = side / max(picture.size)
            w, h = (max(1, round(length * scale)) for length in picture.size)
            mips.append(Image.new("RGBa", (w + 2, h + 2)))
            mips[-1].paste(picture.resize((w, h), Image.Resampling.HAMMING), (1, 1))
        return mips


@cache
def load_sprites(held_out=False):
    """{label: [[sprites of one source], ...]} of the training sources or of the held-out ones."""
    pack = json.loads((SPRITES / "sprites.json").read_text())
    sources = [name for name, facts in pack["sources"].items() if facts["held_out"] == held_out]
    sheets = {name: Image.open(SPRITES / f"{name}.webp").convert("RGBA") for name in sources}
    pool = defaultdict(lambda: defaultdict(list))
    for entry in pack["sprites"]:
        if entry["source"] in sheets:
            label = DISTRACTOR if entry["class"] is None else pack["classes"].index(entry["class"])
            x, y, w, h = entry["box"]
            picture = sheets[entry["source"]].crop((x, y, x + w, y + h))
            # Some sources have a single distractor, which would be drawn too often: one group for them all.
            group = entry["source"] if label != DISTRACTOR else ""
            pool[label][group].append(Sprite(entry["source"], label, entry["tint"], picture))
    return {label: list(pool[label].values()) for label in sorted(pool)}


def pick_sprite(rng, pool, label):
    """Draw a source first, then one of its sprites, so that sources with many drawings do not dominate."""
    return pick(rng, pick(rng, pool[label]))


def pose(rng, sprite, side):
    """Scale, flip, stretch and rotate in one resampling. Returns premultiplied float32 [h, w, 4]."""
    # The smallest mip that is large enough; now and then the next smaller one, as a free blur.
    level = sum(s >= side for s in MIP_SIDES[1:]) + (rng.random() < 0.15)
    mip = sprite.mips[min(level, len(MIP_SIDES) - 1)]
    mw, mh = mip.size
    stretch = math.exp(rng.normal(0, 0.08))
    zoom = side / max(mw * stretch, mh / stretch)
    w, h = mw * stretch * zoom, mh / stretch * zoom
    angle = math.radians(rng.uniform(-90, 90) if rng.random() < 0.07 else np.clip(rng.normal(0, 9), -20, 20))
    cos, sin = math.cos(angle), math.sin(angle)
    out_w, out_h = math.ceil(w * abs(cos) + h * abs(sin)), math.ceil(w * abs(sin) + h * abs(cos))
    kx, ky = mw / w * (1 if rng.random() < 0.5 else -1), mh / h
    # PIL takes the inverse map, from pixels of the result to pixels of the mip; both centres coincide.
    a, b, d, e = kx * cos, kx * sin, -ky * sin, ky * cos
    c, f = (mw - a * out_w - b * out_h) / 2, (mh - d * out_w - e * out_h) / 2
    affine, bilinear = Image.Transform.AFFINE, Image.Resampling.BILINEAR
    return np.asarray(mip.transform((out_w, out_h), affine, (a, b, c, d, e, f), bilinear)).astype(np.float32)


def colour_matrix(rng, sprite, below):
    """[4, 4] for premultiplied RGBA @ matrix: a tint, or changes of hue, saturation, contrast, brightness.
    below: mean colour [3] under the sprite; the tint most different from it is taken."""
    matrix = np.diag(np.array([0, 0, 0, 1], np.float32))
    if sprite.tint:
        tints = random_colours(rng, 3)
        matrix[3, :3] = tints[np.abs(tints - below).sum(1).argmax()] / 255
        return matrix
    hue, saturation = rng.normal(0, 0.12), 0.15 if rng.random() < 0.04 else rng.uniform(0.7, 1.25)
    contrast, brightness = rng.uniform(0.75, 1.2), rng.uniform(-0.12, 0.12)
    # Rodrigues' rotation about the grey axis, shrunk towards it: i, j and k weight the identity, the mean of
    # the channels and the cross product.
    i, k = saturation * math.cos(hue), saturation * math.sin(hue) / math.sqrt(3)
    j = (1 - i) / 3
    turn = [[i + j, j - k, j + k], [j + k, i + j, j - k], [j - k, j + k, i + j]]
    matrix[:3, :3] = contrast * np.array(turn)
    matrix[3, :3] = (1 - contrast) / 2 + brightness
    return matrix


# ---- scenes ------------------------------------------------------------------------------------------------


def visible_slices(canvas, piece, x, y):
    """The part of a piece at x, y that lies on the canvas, as slices of the canvas and of the piece."""
    (height, width), (h, w) = canvas.shape[:2], piece.shape[:2]
    x0, y0, x1, y1 = max(x, 0), max(y, 0), min(x + w, width), min(y + h, height)
    x1, y1 = max(x1, x0), max(y1, y0)  # empty when they do not meet
    return (slice(y0, y1), slice(x0, x1)), (slice(y0 - y, y1 - y), slice(x0 - x, x1 - x))


def paste(canvas, piece, x, y):
    on, of = visible_slices(canvas, piece, x, y)
    canvas[on] *= 1 - piece[of][..., 3:] / 255  # the "over" operator for premultiplied colours
    canvas[on] += piece[of][..., :3]


def paint(rng, canvas, sprite, piece, x, y):
    """Colour the piece and paste it, sometimes over a shadow of it."""
    below = canvas[visible_slices(canvas, piece, x, y)[0]].mean((0, 1)) if sprite.tint else None
    if rng.random() < 0.2:
        alpha = Image.fromarray(piece[..., 3].astype(np.uint8)).filter(ImageFilter.BoxBlur(2))
        shadow = np.zeros_like(piece)
        shadow[..., 3] = np.asarray(alpha) * rng.uniform(0.2, 0.6)
        paste(canvas, shadow, x + int(rng.integers(-4, 5)), y + int(rng.integers(1, 5)))
    coloured = piece @ colour_matrix(rng, sprite, below)
    paste(canvas, np.clip(coloured, 0, piece[..., 3:], out=coloured), x, y)


class Stack:
    """Records which object is visible at each pixel, and refuses an object that would hide another."""

    def __init__(self, size, capacity):
        self.owner = np.full((size, size), -1, np.int8)
        self.whole, self.visible = np.zeros(capacity, int), np.zeros(capacity, int)  # pixels of each object
        self.count = 0

    def add(self, piece, x, y):
        """Put a piece on top of all others, or change nothing and return False."""
        k = self.count
        on, of = visible_slices(self.owner, piece, x, y)
        mask = piece[of][..., 3] > 127
        whole, inside = np.count_nonzero(piece[..., 3] > 127), np.count_nonzero(mask)
        if inside < max(MIN_PIXELS, MIN_INSIDE * whole):
            return False
        # What would be left visible of the objects below. owner is -1 for none, hence + 1 and [1:].
        left = self.visible[:k] - np.bincount(self.owner[on][mask] + 1, minlength=k + 1)[1:]
        if (left < np.maximum(MIN_PIXELS, MIN_VISIBLE * self.whole[:k])).any():
            return False
        self.owner[on][mask] = k
        self.visible[:k], self.visible[k], self.whole[k] = left, inside, whole
        self.count += 1
        return True

    def boxes(self):
        """float32 [n, 4]"""
        boxes = [tight_box(self.owner == k) for k in range(self.count)]
        return np.array(boxes, np.float32).reshape(-1, 4)


def make_scene(seed, size=128, split="train"):
    """Draw scene number `seed` of a split, `size` pixels a side. The same arguments give the same bytes."""
    how = SPLITS[split]
    rng = np.random.default_rng([seed, how.stream])
    pool = load_sprites(how.held_out_sources)
    classes = [label for label in pool if label != DISTRACTOR]
    count = 1 + int(np.searchsorted(np.cumsum(how.counts) / sum(how.counts), rng.random(), side="right"))
    low, high = how.sides[0], min(how.sides[1], 200 / math.sqrt(count))  # many objects must be small

    def posed_sprite(label):
        sprite = pick_sprite(rng, pool, label)
        return sprite, pose(rng, sprite, low * (high / low) ** rng.random() * size / 128)

    textures = HELD_OUT_TEXTURES if how.held_out_textures and rng.random() < 0.5 else TEXTURES
    textures = textures | SURFACES if how.surfaces else textures
    canvas = draw_background(rng, size, textures, lambda: pick_sprite(rng, pool, pick(rng, classes)).mips[-1])
    for _ in range(int(rng.integers(1, 4)) if DISTRACTOR in pool and rng.random() < 0.4 else 0):
        paint(rng, canvas, *posed_sprite(DISTRACTOR), *rng.integers(-8, size - 16, 2).tolist())

    stack, labels, centres = Stack(size, count), [], []
    tries = 4 * count  # a full scene ends up with fewer objects
    while stack.count < count and (tries := tries - 1):
        label = pick(rng, classes)
        sprite, piece = posed_sprite(label)
        h, w = piece.shape[:2]
        for _ in range(4):
            centre = rng.uniform(0, size, 2)
            if centres and rng.random() < how.crowding:
                centre = pick(rng, centres) + rng.normal(0, max(w, h) / 2, 2)
            x, y = int(centre[0] - w / 2), int(centre[1] - h / 2)
            if stack.add(piece, x, y):
                paint(rng, canvas, sprite, piece, x, y)
                labels.append(label)
                centres.append(centre)
                break
    scene = Scene(simulate_camera(rng, canvas), stack.boxes(), np.array(labels, np.int64), stack.owner)
    if rng.random() < how.framed:
        scene = frame(rng, scene)
    if rng.random() < how.developed:
        scene = replace(scene, image=develop(rng, scene.image))
    return scene
