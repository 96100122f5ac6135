"""The practice data set: small drawings of COCO's 80 classes pasted onto made-up backgrounds.

    python train/practice/scenes.py --out practice/same --count 1000 --split same

writes PNG files and an `instances.json` in COCO's format. Training needs no files at all: `make_scene(seed)`
draws a scene in two milliseconds, so that no sample is ever seen twice.

A scene is painted back to front: a background, things that are no objects, the objects, what a camera adds.
A map remembers which object owns each pixel; boxes are read off that map, so that they fit what can be seen.
Sprites stay premultiplied by alpha, which turns resampling, tinting and pasting into plain sums.

Axes: H, W pixels; n objects of a scene. Colours are floats 0..255 until the camera.
"""

import argparse
import json
import math
import sys
import tempfile
from collections import defaultdict
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter
from tqdm import tqdm

from model.decoding.masks import to_rle
from train.practice.backgrounds import HELD_OUT_TEXTURES, TEXTURES, background, camera, pick, vivid

SPRITES = Path(__file__).parents[2] / "media" / "sprites"
DISTRACTOR = -1  # label of sprites outside COCO's classes
MIP_SIDES = (96, 64, 43, 28)  # bilinear sampling aliases when it shrinks by much more than these steps of 1.5
MIN_VISIBLE = 0.5  # of an object's pixels, after cutting by the edge and by objects above it
MIN_INSIDE = 0.8  # of an object's pixels, after cutting by the edge alone
MIN_PIXELS = 36  # of an object that can still be told
# COCO numbers its classes 1 to 90 but never released ten of them.
COCO_IDS = [i for i in range(1, 91) if i not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)]


@dataclass(frozen=True)
class Split:
    """How the sets differ. `sides`: range of an object's longest side, in pixels of an image of 128."""

    stream: int  # second word of the random seed: no two sets share a scene
    counts: tuple[float, ...]  # relative frequency of 1, 2, 3 ... objects
    sides: tuple[float, float] = (26, 80)
    held_out_sources: bool = False
    held_out_textures: bool = True
    crowding: float = 0.1  # chance that an object is put next to an earlier one


USUAL = (10, 20, 22, 18, 12, 8, 4, 2, 1, 1, 1, 1)
SPLITS = {
    "train": Split(0, USUAL, held_out_textures=False),
    "same": Split(1, USUAL),
    "vendor": Split(2, USUAL, held_out_sources=True),
    "crowded": Split(3, (0,) * 6 + (1,) * 6, sides=(18, 52), crowding=0.6),
}


@dataclass
class Scene:
    """`owner` says which object is seen at a pixel, -1 for none; boxes are tight around those pixels."""

    image: np.ndarray  # uint8 [H, W, 3]
    boxes: np.ndarray  # float32 [n, 4]: x0, y0, x1, y1 in pixels, x1 and y1 exclusive
    labels: np.ndarray  # int64 [n], 0..79
    owner: np.ndarray  # int8 [H, W]


# ---- sprites -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sprite:
    source: str
    label: int  # 0..79 or DISTRACTOR
    tint: bool  # a one-colour icon, painted in a colour of the scene's choice
    mips: tuple[Image.Image, ...]  # premultiplied ("RGBa"), largest first


@cache
def load_sprites(held_out=False, folder=SPRITES):
    """{label: [[sprites of one source], ...]} of the training sources or of the held-out ones."""
    pack = json.loads((folder / "sprites.json").read_text())
    sources = [name for name, facts in pack["sources"].items() if facts["held_out"] == held_out]
    sheets = {name: Image.open(folder / f"{name}.webp").convert("RGBA") for name in sources}
    pool = defaultdict(lambda: defaultdict(list))
    for entry in pack["sprites"]:
        if entry["source"] in sheets:
            label = DISTRACTOR if entry["class"] is None else pack["classes"].index(entry["class"])
            x, y, w, h = entry["box"]
            mips = make_mips(sheets[entry["source"]].crop((x, y, x + w, y + h)).convert("RGBa"))
            group = entry["source"] if label != DISTRACTOR else ""  # some sources have a single distractor
            pool[label][group].append(Sprite(entry["source"], label, entry["tint"], mips))
    return {label: list(pool[label].values()) for label in sorted(pool)}


def make_mips(picture):
    """The picture at every size, in a transparent border of one pixel that keeps turned edges soft."""
    mips = []
    for side in MIP_SIDES:
        scale = side / max(picture.size)
        w, h = (max(1, round(length * scale)) for length in picture.size)
        mips.append(Image.new("RGBa", (w + 2, h + 2)))
        mips[-1].paste(picture.resize((w, h), Image.Resampling.HAMMING), (1, 1))
    return tuple(mips)


def pick_sprite(rng, pool, label):
    """A source first, then a sprite of it: one with many drawings of a class must not drown the others."""
    return pick(rng, pick(rng, pool[label]))


def pose(rng, sprite, side):
    """Scale, flip, stretch and turn in one resampling. Returns premultiplied float32 [h, w, 4]."""
    # A mip too small for its job is a blurred sprite, for nothing.
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
    # PIL wants the way back, from pixels of the result to pixels of the mip, both seen from their centres.
    a, b, d, e = kx * cos, kx * sin, -ky * sin, ky * cos
    c, f = (mw - a * out_w - b * out_h) / 2, (mh - d * out_w - e * out_h) / 2
    affine, bilinear = Image.Transform.AFFINE, Image.Resampling.BILINEAR
    return np.asarray(mip.transform((out_w, out_h), affine, (a, b, c, d, e, f), bilinear)).astype(np.float32)


def colour_matrix(rng, sprite, below):
    """[4, 4] for premultiplied RGBA @ matrix: a tint, or changes of hue, saturation, contrast, brightness.
    below: mean colour [3] under the sprite, from which a tint keeps away."""
    matrix = np.diag(np.array([0, 0, 0, 1], np.float32))
    if sprite.tint:
        tints = vivid(rng, 3)
        matrix[3, :3] = tints[np.abs(tints - below).sum(1).argmax()] / 255
        return matrix
    hue, saturation = rng.normal(0, 0.12), 0.15 if rng.random() < 0.04 else rng.uniform(0.7, 1.25)
    contrast, brightness = rng.uniform(0.75, 1.2), rng.uniform(-0.12, 0.12)
    # A turn about the grey axis, shrunk towards it: identity, mean and cross product share the work.
    i, k = saturation * math.cos(hue), saturation * math.sin(hue) / math.sqrt(3)
    j = (1 - i) / 3
    turn = [[i + j, j - k, j + k], [j + k, i + j, j - k], [j - k, j + k, i + j]]
    matrix[:3, :3] = contrast * np.array(turn)
    matrix[3, :3] = (1 - contrast) / 2 + brightness
    return matrix


# ---- scenes ------------------------------------------------------------------------------------------------


def window(canvas, piece, x, y):
    """Where a piece at x, y falls on the canvas: the slices of the canvas and those of the piece."""
    (height, width), (h, w) = canvas.shape[:2], piece.shape[:2]
    x0, y0, x1, y1 = max(x, 0), max(y, 0), min(x + w, width), min(y + h, height)
    x1, y1 = max(x1, x0), max(y1, y0)  # empty when they do not meet
    return (slice(y0, y1), slice(x0, x1)), (slice(y0 - y, y1 - y), slice(x0 - x, x1 - x))


def paste(canvas, piece, x, y):
    on, of = window(canvas, piece, x, y)
    canvas[on] *= 1 - piece[of][..., 3:] / 255
    canvas[on] += piece[of][..., :3]


def paint(rng, canvas, sprite, piece, x, y):
    """Colour the piece and paste it, sometimes above its shadow."""
    below = canvas[window(canvas, piece, x, y)[0]].mean((0, 1)) if sprite.tint else None
    if rng.random() < 0.2:
        alpha = Image.fromarray(piece[..., 3].astype(np.uint8)).filter(ImageFilter.BoxBlur(2))
        shadow = np.zeros_like(piece)
        shadow[..., 3] = np.asarray(alpha) * rng.uniform(0.2, 0.6)
        paste(canvas, shadow, x + int(rng.integers(-4, 5)), y + int(rng.integers(1, 5)))
    coloured = piece @ colour_matrix(rng, sprite, below)
    paste(canvas, np.clip(coloured, 0, piece[..., 3:], out=coloured), x, y)


class Stack:
    """Which object is seen where. Keeps every object mostly visible by refusing those that would spoil it."""

    def __init__(self, size, room):
        self.owner = np.full((size, size), -1, np.int8)
        self.whole, self.visible = np.zeros(room, int), np.zeros(room, int)  # pixels of each object
        self.count = 0

    def add(self, piece, x, y):
        """Puts a piece on top of all others, or changes nothing and returns False."""
        k = self.count
        on, of = window(self.owner, piece, x, y)
        mask = piece[of][..., 3] > 127
        whole, seen = np.count_nonzero(piece[..., 3] > 127), np.count_nonzero(mask)
        if seen < max(MIN_PIXELS, MIN_INSIDE * whole):
            return False
        left = self.visible[:k] - np.bincount(self.owner[on][mask] + 1, minlength=k + 1)[1:]
        if (left < np.maximum(MIN_PIXELS, MIN_VISIBLE * self.whole[:k])).any():
            return False
        self.owner[on][mask] = k
        self.visible[:k], self.visible[k], self.whole[k] = left, seen, whole
        self.count += 1
        return True

    def boxes(self):
        """Tight around the pixels of each object, float32 [n, 4]."""
        boxes = np.zeros((self.count, 4), np.float32)
        for k in range(self.count):
            mine = self.owner == k
            x, y = np.flatnonzero(mine.any(0)), np.flatnonzero(mine.any(1))
            boxes[k] = x[0], y[0], x[-1] + 1, y[-1] + 1
        return boxes


def make_scene(seed, size=128, split="train", folder=SPRITES):
    """Scene number `seed` of this split. The same arguments give the same bytes.
    size: pixels a side; folder: a sprite pack, sprites.json and one sheet per source."""
    how = SPLITS[split]
    rng = np.random.default_rng([seed, how.stream])
    pool = load_sprites(how.held_out_sources, folder)
    classes = [label for label in pool if label != DISTRACTOR]
    count = 1 + int(np.searchsorted(np.cumsum(how.counts) / sum(how.counts), rng.random(), side="right"))
    low, high = how.sides[0], min(how.sides[1], 200 / math.sqrt(count))  # many objects must be small ones

    def cut_out(label):
        sprite = pick_sprite(rng, pool, label)
        return sprite, pose(rng, sprite, low * (high / low) ** rng.random() * size / 128)

    textures = HELD_OUT_TEXTURES if how.held_out_textures and rng.random() < 0.5 else TEXTURES
    canvas = background(rng, size, textures, lambda: pick_sprite(rng, pool, pick(rng, classes)).mips[-1])
    for _ in range(int(rng.integers(1, 4)) if DISTRACTOR in pool and rng.random() < 0.4 else 0):
        paint(rng, canvas, *cut_out(DISTRACTOR), *rng.integers(-8, size - 16, 2).tolist())

    stack, labels, centres = Stack(size, count), [], []
    tries = 4 * count  # a scene may be too full for all it was to have
    while stack.count < count and (tries := tries - 1):
        label = pick(rng, classes)
        sprite, piece = cut_out(label)
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
    return Scene(camera(rng, canvas), stack.boxes(), np.array(labels, np.int64), stack.owner)


# ---- as files ----------------------------------------------------------------------------------------------


def write_coco(out, count, split="same", size=128, seed=0, folder=SPRITES, more=None):
    """Writes out/images/*.png and out/instances.json, all of them or nothing. more(folder, image records)
    adds files. Raises ValueError if out is there and not empty, or there is nothing to draw."""
    if count < 1 or size < 32:
        raise ValueError(f"--count {count} --size {size}: must be at least 1 scene of 32 pixels a side")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ValueError(f"{out} exists and is not an empty folder: choose another --out or remove it")
    names = json.loads((folder / "sprites.json").read_text())["classes"]
    images, annotations = [], []
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as partial:
        work = Path(partial) / "set"
        (work / "images").mkdir(parents=True)
        for i in tqdm(range(count), desc=split, unit="scene"):
            scene = make_scene(seed + i, size, split, folder)
            images.append({"id": i, "file_name": f"{i:06d}.png", "width": size, "height": size})
            Image.fromarray(scene.image).save(work / "images" / images[-1]["file_name"])
            for k, (x0, y0, x1, y1) in enumerate(scene.boxes.tolist()):
                # Ids from 1: pycocotools takes 0 for "no match".
                ids = {"id": len(annotations) + 1, "image_id": i, "category_id": COCO_IDS[scene.labels[k]]}
                mask = scene.owner == k
                shape = {"area": int(mask.sum()), "segmentation": to_rle(mask), "iscrowd": 0}
                annotations.append(ids | {"bbox": [x0, y0, x1 - x0, y1 - y0]} | shape)
        data = {
            "info": {"description": "PaliGemma practice scenes", "split": split, "size": size, "seed": seed},
            "images": images,
            "annotations": annotations,
            "categories": [{"id": i, "name": name} for i, name in zip(COCO_IDS, names, strict=True)],
        }
        (work / "instances.json").write_text(json.dumps(data))
        if more:
            more(work, images)
        work.replace(out)


def main(argv=None):
    parser = argparse.ArgumentParser(description="Write practice scenes as PNG files and COCO annotations.")
    parser.add_argument("--out", type=Path, required=True, help="a new or empty folder")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--split", choices=SPLITS, default="same")
    parser.add_argument("--size", type=int, default=128, help="pixels a side")
    parser.add_argument("--seed", type=int, default=0, help="number of the first scene")
    args = parser.parse_args(argv)
    try:
        write_coco(args.out, args.count, args.split, args.size, args.seed)
    except (ValueError, OSError) as error:
        sys.exit(f"scenes.py: {error}")


if __name__ == "__main__":
    main()
