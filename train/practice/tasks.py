"""The tasks of the practice set in words: a prompt about a scene, and its right answer, as text.

Closed-set detection is not among them: its answer is not text (train/data/targets.py).
"""

from functools import partial

import numpy as np
import torch

from model.config import COCO_CLASSES
from model.decoding.boxes import box_prompt, format_answer
from model.decoding.masks import MaskCodec, crop
from train.practice import sentences
from train.practice.scenes import Scene
from train.practice.sentences import Thing

TASK_SHARES = {"caption": 0.18, "answer": 0.3, "detect": 0.22, "segment": 0.3}
MAX_ASKED = 10  # classes in an open-set prompt
MAX_BOXES = 7  # in an open-set answer
MAX_MASKS = 2  # in a segmentation answer
ABSENT_SHARE = 0.1  # of segmentation prompts: their class is not in the scene
MIN_COLOUR_SHARE = 0.55  # of an object's pixels: fewer do not give the object its colour


def colour_of(pixels: np.ndarray) -> str | None:
    """The name of the colour that most of these pixels, uint8 [n, 3], have; None if no colour prevails."""
    rgb = pixels.astype(np.float32) / 255
    value, low = rgb.max(1), rgb.min(1)
    chroma = value - low
    r, g, b = rgb.T
    safe = np.maximum(chroma, 1e-6)
    rises = (g - b) / safe % 6, (b - r) / safe + 2, (r - g) / safe + 4  # if red, green, blue is the largest
    hue = 60 * np.select([value == r, value == g], rises[:2], rises[2])  # degrees
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
    }  # the first that holds counts
    names = list(conditions)
    counts = np.bincount(np.select(list(conditions.values()), range(len(names))), minlength=len(names))
    return names[counts.argmax()] if counts.max() >= MIN_COLOUR_SHARE * len(pixels) else None


def things_of(scene: Scene, colours: bool = True) -> list[Thing]:
    """The facts of a scene, in the order of its objects. colours: whether to find them, which takes time."""
    boxes = (scene.boxes / scene.owner.shape[0]).tolist()
    return [
        Thing(COCO_CLASSES[label], tuple(box), colour_of(scene.image[scene.owner == k]) if colours else None)
        for k, (label, box) in enumerate(zip(scene.labels, boxes))
    ]


def caption(rng: np.random.Generator, scene: Scene) -> tuple[str, str]:
    return sentences.CAPTION, sentences.caption_of(things_of(scene, colours=False))


def answer(rng: np.random.Generator, scene: Scene) -> tuple[str, str]:
    _, question, right = sentences.ask(rng, things_of(scene))
    return sentences.answer_prompt(question), right


def detect(rng: np.random.Generator, scene: Scene) -> tuple[str, str]:
    """A prompt for some classes of the scene and some others, in random order. The answer's objects are in
    random order too."""
    present, absent = _classes(rng, scene)
    asked = present[: rng.integers(len(present) + 1)]
    while np.isin(scene.labels, asked).sum() > MAX_BOXES:
        asked = asked[:-1]
    asked = np.concatenate((asked, absent[: rng.integers(not len(asked), MAX_ASKED + 1 - len(asked))]))
    rows = rng.permutation(np.flatnonzero(np.isin(scene.labels, asked)))
    names = [COCO_CLASSES[label] for label in rng.permutation(asked)]
    size = scene.owner.shape[0]
    suffix = format_answer(scene.boxes[rows], [COCO_CLASSES[k] for k in scene.labels[rows]], size, size)
    return box_prompt(names), suffix


def segment(rng: np.random.Generator, scene: Scene, codec: MaskCodec) -> tuple[str, str]:
    """A prompt for a class of few objects, answered from left to right; sometimes for an absent class."""
    present, absent = _classes(rng, scene)
    few = [label for label in present if (scene.labels == label).sum() <= MAX_MASKS]
    label = few[0] if few and rng.random() > ABSENT_SHARE else absent[0]
    rows = np.flatnonzero(scene.labels == label)
    rows = rows[scene.boxes[rows, 0].argsort(kind="stable")]
    return box_prompt([COCO_CLASSES[label]], masks=True), segment_answer(scene, rows, codec)


def segment_answer(scene: Scene, rows: np.ndarray, codec: MaskCodec) -> str:
    """Boxes, mask codes and names of some objects of a scene, as text."""
    names, size = [COCO_CLASSES[label] for label in scene.labels[rows]], scene.owner.shape[0]
    masks = [crop(scene.owner == k, scene.boxes[k]) for k in rows]
    codes = codec.encode(torch.from_numpy(np.stack(masks))).numpy() if masks else None
    return format_answer(scene.boxes[rows], names, size, size, codes)


def make_tasks(codec: MaskCodec) -> dict:
    """{name: function (random generator, scene) -> (prompt, answer)}."""
    return dict(caption=caption, answer=answer, detect=detect, segment=partial(segment, codec=codec))


def _classes(rng: np.random.Generator, scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    """The labels that occur in the scene and those that do not, both in random order."""
    present = rng.permutation(np.unique(scene.labels))
    return present, rng.permutation(np.setdiff1d(np.arange(len(COCO_CLASSES)), present))
