"""Write practice scenes to disk: pictures, COCO annotations and, on request, prompts with right answers.

    python train/practice/write.py --out practice/same --count 1000 --split same
    python train/practice/write.py --out practice/answers --count 1000 --split vendor --answers

OUT/images has the PNG files, OUT/instances.json their objects in COCO's format. --answers adds
OUT/answers.jsonl, whose lines train/fit.py and infer/evaluate_answers.py read.
"""

import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from model.config import COCO_CLASSES
from model.decoding.boxes import box_prompt
from model.decoding.masks import MaskCodec, to_rle
from model.io.hub import CODEC, NANO
from train.practice.scenes import SPLITS, Scene, make_scene
from train.practice.sentences import QUESTIONS, answer_prompt
from train.practice.tasks import caption, segment_answer, things_of
from train.run.program import not_negative, parser, positive, run

# COCO numbers its classes 1 to 90 but never released ten of them.
COCO_IDS = [i for i in range(1, 91) if i not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)]
HELD_OUT_SETS = {"same": "same drawings", "vendor": "unseen vendor", "crowded": "crowded scenes"}
MIN_SIZE = 32  # pixels a side
WORKERS_FROM = 200  # scenes: fewer are drawn before worker processes have started


def object_records(scene: Scene) -> Iterator[dict]:
    """What instances.json says about each object, apart from the ids of object and image."""
    for k, (x0, y0, x1, y1) in enumerate(scene.boxes.tolist()):
        mask, box = scene.owner == k, [x0, y0, x1 - x0, y1 - y0]
        shape = dict(area=int(mask.sum()), segmentation=to_rle(mask), iscrowd=0)
        yield dict(category_id=COCO_IDS[scene.labels[k]], bbox=box) | shape


def answer_lines(rng: np.random.Generator, scene: Scene, codec: MaskCodec) -> Iterator[dict]:
    """Prompts about a scene and their right answers: its caption, a question of each kind whose answer is
    clear, and the mask of an object that is the only one of its class."""
    prefix, suffix = caption(rng, scene)
    yield dict(kind="caption", prefix=prefix, suffix=suffix)
    things = things_of(scene)
    for kind, question in QUESTIONS.items():
        if asked := question(rng, things):
            yield dict(kind=kind, prefix=answer_prompt(asked[0]), suffix=asked[1])
    unique = [k for k, label in enumerate(scene.labels) if (scene.labels == label).sum() == 1]
    if unique:
        k = unique[rng.integers(len(unique))]
        prefix = box_prompt([COCO_CLASSES[scene.labels[k]]], masks=True)
        suffix = segment_answer(scene, np.array([k]), codec)
        yield dict(kind="segment", prefix=prefix, suffix=suffix, mask=to_rle(scene.owner == k))


class Drawn(Dataset):
    """Scenes that are drawn, and their pictures written, when they are asked for, by worker processes too. An
    item: the picture's name, the records of its objects and, with a codec, its lines (else none)."""

    def __init__(self, folder: Path, count: int, split: str, size: int, seed: int, codec: MaskCodec | None):
        self.folder, self.count, self.split, self.size = folder, count, split, size
        self.seed, self.codec = seed, codec

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> tuple[str, list[dict], list[dict]]:
        scene, name = make_scene(self.seed + i, self.size, self.split), f"{i:06d}.png"
        Image.fromarray(scene.image).save(self.folder / name)
        lines = []
        if self.codec:
            rng = np.random.default_rng([self.seed + i, 2])  # not the stream that drew the scene
            lines = [dict(image=name) | line for line in answer_lines(rng, scene, self.codec)]
        return name, list(object_records(scene)), lines


def write_coco(
    out: Path, count: int, split: str = "same", size: int = 128, seed: int = 0, codec: MaskCodec | None = None
) -> None:
    """Write OUT/images and OUT/instances.json, and with a codec OUT/answers.jsonl. Nothing is left behind if
    it fails. size: pixels a side; seed: the number of the first scene. OUT must be new or empty."""
    if count < 1 or size < MIN_SIZE:
        raise ValueError(f"--count {count} --size {size}: need at least 1 scene of {MIN_SIZE} pixels a side")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ValueError(f"{out} exists and is not an empty folder: choose another --out or remove it")
    images, annotations, lines = [], [], []
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as partial:
        work = Path(partial) / "set"
        (work / "images").mkdir(parents=True)
        scenes = Drawn(work / "images", count, split, size, seed, codec)
        workers = min(os.cpu_count() or 1, 8) if count >= WORKERS_FROM else 0
        drawn = DataLoader(scenes, batch_size=None, num_workers=workers)
        for i, (name, records, answers) in enumerate(tqdm(drawn, desc=split, unit="scene")):
            images.append(dict(id=i, file_name=name, width=size, height=size))
            for record in records:  # ids from 1: pycocotools takes 0 for "no match"
                annotations.append(dict(id=len(annotations) + 1, image_id=i) | record)
            lines += answers
        info = dict(description="PaliGemma practice scenes", split=split, size=size, seed=seed)
        categories = [dict(id=i, name=name) for i, name in zip(COCO_IDS, COCO_CLASSES, strict=True)]
        data = dict(info=info, images=images, annotations=annotations, categories=categories)
        (work / "instances.json").write_text(json.dumps(data), encoding="utf-8")
        if codec:
            text = "".join(json.dumps(line) + "\n" for line in lines)
            (work / "answers.jsonl").write_text(text, encoding="utf-8")
        work.replace(out)


def main(argv=None) -> None:
    options = parser(__doc__)
    add = options.add_argument
    add("--out", type=Path, required=True, help="a new or empty folder")
    add("--count", type=positive, default=1000, help="number of scenes")
    add("--split", choices=SPLITS, default="same")
    add("--size", type=int, default=128, help="pixels a side")
    add("--seed", type=not_negative, default=0, help="number of the first scene")
    add("--answers", action="store_true", help="write prompts and answers too")
    add("--codec", type=Path, help="mask codec of --answers (default: nano's)")
    args = options.parse_args(argv)
    if args.codec and not args.answers:
        raise ValueError("--codec is for --answers: only they hold masks as tokens")
    codec = MaskCodec.load(args.codec or NANO / CODEC) if args.answers else None
    write_coco(args.out, args.count, args.split, args.size, args.seed, codec)


if __name__ == "__main__":
    run(main, __file__)
