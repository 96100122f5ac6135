"""The tasks of the practice set: what is asked about a scene, and the right answer, as text.

    python train/practice/tasks.py --out practice/answers --count 1000 --split same

writes pictures, instances.json and answers.jsonl, whose lines fit.py and evaluate_answers.py read.
Closed-set detection is not among the functions: its answer is no text (train/data/targets.py).
"""

import argparse
import json
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch

from model.config import COCO_CLASSES
from model.decoding.boxes import box_prompt, format_answer
from model.decoding.masks import MaskCodec, crop, to_rle
from model.io.hub import CODEC, NANO
from train.practice import sentences
from train.practice.scenes import SPLITS, Scene, make_scene, write_coco
from train.practice.sentences import Thing

SHARES = {"caption": 0.18, "answer": 0.3, "detect": 0.22, "segment": 0.3}  # of the prompts in words
MOST_ASKED = 10  # classes of an open-set prompt
MOST_BOXES = 7  # of an open-set answer
MOST_MASKS = 2
ABSENT = 0.1  # share of segmentation prompts whose class is not there
PREVAILS = 0.55  # share of an object's pixels that have its colour


def colour_of(pixels: np.ndarray) -> str | None:
    """The colour's name of most of some pixels uint8 [n, 3]; None if none prevails."""
    rgb = pixels.astype(np.float32) / 255
    value, low = rgb.max(1), rgb.min(1)
    chroma = value - low
    r, g, b = rgb.T
    safe = np.maximum(chroma, 1e-6)
    hue = (
        np.select([value == r, value == g], [(g - b) / safe % 6, (b - r) / safe + 2], (r - g) / safe + 4) * 60
    )
    saturation = chroma / np.maximum(value, 1e-6)
    pale = saturation < 0.2
    conditions = {
        "black": value < 0.22,
        "white": pale & (value > 0.8),
        "grey": pale,
        "brown": (hue > 8) & (hue < 45) & (value < 0.62),
        "pink": ((hue < 15) | (hue > 345)) & (saturation < 0.5) | (hue > 295) & (hue <= 345),
        "red": (hue <= 15) | (hue > 345),
        "orange": hue <= 40,
        "yellow": hue <= 68,
        "green": hue <= 165,
        "blue": hue <= 255,
        "purple": hue <= 295,
    }  # the first that holds
    names = list(conditions)
    counts = np.bincount(np.select(list(conditions.values()), range(len(names))), minlength=len(names))
    return names[counts.argmax()] if counts.max() >= PREVAILS * len(pixels) else None


def things_of(scene: Scene, colours: bool = True) -> list[Thing]:
    """The facts of a scene, in the order of its objects; their colours take some time."""
    boxes = (scene.boxes / scene.owner.shape[0]).tolist()
    return [
        Thing(COCO_CLASSES[label], tuple(box), colour_of(scene.image[scene.owner == k]) if colours else None)
        for k, (label, box) in enumerate(zip(scene.labels, boxes))
    ]


def caption(rng: np.random.Generator, scene: Scene) -> tuple[str, str]:
    return sentences.CAPTION, sentences.caption(things_of(scene, colours=False))


def answer(rng: np.random.Generator, scene: Scene) -> tuple[str, str]:
    _, question, right = sentences.ask(rng, things_of(scene))
    return sentences.answer_prompt(question), right


def detect(rng: np.random.Generator, scene: Scene) -> tuple[str, str]:
    """Some classes of the scene and some others, in random order; so are the objects of the answer."""
    present, absent = _classes(rng, scene)
    asked = present[: rng.integers(len(present) + 1)]
    while np.isin(scene.labels, asked).sum() > MOST_BOXES:
        asked = asked[:-1]
    asked = np.concatenate((asked, absent[: rng.integers(not len(asked), MOST_ASKED + 1 - len(asked))]))
    rows = rng.permutation(np.flatnonzero(np.isin(scene.labels, asked)))
    names = [COCO_CLASSES[label] for label in rng.permutation(asked)]
    size = scene.owner.shape[0]
    said = format_answer(scene.boxes[rows], [COCO_CLASSES[k] for k in scene.labels[rows]], size, size)
    return box_prompt(names), said


def segment(rng: np.random.Generator, scene: Scene, codec: MaskCodec) -> tuple[str, str]:
    """A class of the scene with few objects, from left to right; now and then one that is not there."""
    present, absent = _classes(rng, scene)
    few = [label for label in present if (scene.labels == label).sum() <= MOST_MASKS]
    label = few[0] if few and rng.random() > ABSENT else absent[0]
    rows = np.flatnonzero(scene.labels == label)
    rows = rows[scene.boxes[rows, 0].argsort(kind="stable")]
    return box_prompt([COCO_CLASSES[label]], masks=True), cut_out(scene, rows, codec)


def cut_out(scene: Scene, rows: np.ndarray, codec: MaskCodec) -> str:
    """The answer that has the boxes, masks and names of some objects of a scene."""
    names, size = [COCO_CLASSES[label] for label in scene.labels[rows]], scene.owner.shape[0]
    masks = [crop(scene.owner == k, scene.boxes[k]) for k in rows]
    codes = codec.encode(torch.from_numpy(np.stack(masks))).numpy() if masks else None
    return format_answer(scene.boxes[rows], names, size, size, codes)


def tasks(codec: MaskCodec) -> dict:
    """{name: function of a random generator and a scene that gives prompt and answer}."""
    return dict(caption=caption, answer=answer, detect=detect, segment=partial(segment, codec=codec))


def _classes(rng: np.random.Generator, scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    """The labels that are in the scene and those that are not, both in random order."""
    present = rng.permutation(np.unique(scene.labels))
    return present, rng.permutation(np.setdiff1d(np.arange(len(COCO_CLASSES)), present))


# ---- as files ----------------------------------------------------------------------------------------------


def lines(rng: np.random.Generator, scene: Scene, codec: MaskCodec) -> Iterator[dict]:
    """What a held-out scene is good for: its caption, a question of each kind that it decides, and an object
    that its class alone points out, with its whole mask."""
    prefix, suffix = caption(rng, scene)
    yield dict(kind="caption", prefix=prefix, suffix=suffix)
    things = things_of(scene)
    for kind, question in sentences.QUESTIONS.items():
        if asked := question(rng, things):
            yield dict(kind=kind, prefix=sentences.answer_prompt(asked[0]), suffix=asked[1])
    alone = [k for k, label in enumerate(scene.labels) if (scene.labels == label).sum() == 1]
    if alone:
        k = alone[rng.integers(len(alone))]
        prefix = box_prompt([COCO_CLASSES[scene.labels[k]]], masks=True)
        said = cut_out(scene, np.array([k]), codec)
        yield dict(kind="segment", prefix=prefix, suffix=said, mask=to_rle(scene.owner == k))


def write_answers(out: Path, count: int, split: str, size: int, codec: MaskCodec) -> None:
    """Writes out/images/*.png, out/instances.json and out/answers.jsonl, all of them or nothing.
    size: pixels a side of the scenes 0 to count - 1."""

    def more(work: Path, records: list[dict]) -> None:
        with open(work / "answers.jsonl", "w", encoding="utf-8") as file:
            for seed, record in enumerate(records):
                rng, scene = np.random.default_rng([seed, 2]), make_scene(seed, size, split)
                for line in lines(rng, scene, codec):
                    print(json.dumps(dict(image=record["file_name"]) | line), file=file)

    write_coco(out, count, split, size, more=more)


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--out", type=Path, required=True, help="a new or empty folder")
    parser.add_argument("--count", type=int, default=1000, help="scenes")
    parser.add_argument("--split", choices=SPLITS, default="same")
    parser.add_argument("--size", type=int, default=128, help="pixels a side")
    parser.add_argument("--codec", type=Path, default=NANO / CODEC, help="of the masks (default: nano's)")
    args = parser.parse_args(argv)
    try:
        write_answers(args.out, args.count, args.split, args.size, MaskCodec.load(args.codec))
    except (ValueError, OSError) as error:
        sys.exit(f"tasks.py: {error}")


if __name__ == "__main__":
    main()
