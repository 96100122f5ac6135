"""Write small drawings for fine-tuning: pictures, and JSON lines to train and to test on.

    python train/practice/drawings.py crossings --out practice/crossings
    python train/practice/drawings.py creatures --out practice/creatures

crossings: how many times do two lines cross? creatures: their captions; and for segmentation OUT/masks, PNG
files named by OUT/train-masks.jsonl and test-masks.jsonl, which train/convert.py masks-to-jsonl reads.

OUT/images has the pictures, OUT/train.jsonl and test.jsonl their lines, as train/fit.py and
infer/evaluate_answers.py read them. No drawing is in both.
"""

import json
from pathlib import Path

import numpy as np
from tqdm import tqdm

from model.io.writing import write_lines
from train.data.folders import new_folder
from train.practice.creatures import LABEL, make_creature
from train.practice.crossings import make_crossing
from train.run.program import not_negative, parser, positive, run

KINDS = dict(crossings=make_crossing, creatures=make_creature)
PARTS = ("train", "test")
MIN_SIZE = 32  # pixels a side


def write_drawings(kind: str, out: Path, counts: tuple[int, int], size: int = 128, seed: int = 0) -> None:
    """Write OUT, a new or empty folder. counts: of PARTS; size: pixels a side; seed: number of the first
    drawing of each part."""
    if size < MIN_SIZE:
        raise ValueError(f"--size {size}: need at least {MIN_SIZE} pixels a side")
    out.parent.mkdir(parents=True, exist_ok=True)
    with new_folder(out) as folder:
        (folder / "images").mkdir()
        for stream, (part, count) in enumerate(zip(PARTS, counts, strict=True)):
            lines, masks = [], []
            for i in tqdm(range(seed, seed + count), desc=part, unit="drawing", leave=False, disable=None):
                name = f"{part}-{i:06d}.png"
                image, line = KINDS[kind](np.random.default_rng([i, stream]), size)
                image.save(folder / "images" / name)
                if mask := line.pop("mask", None):
                    (folder / "masks").mkdir(exist_ok=True)
                    mask.save(folder / "masks" / name)
                    masks.append(dict(image=name, label=LABEL, mask=f"masks/{name}"))
                lines.append(dict(image=name) | line)
            for file, records in ((f"{part}.jsonl", lines), (f"{part}-masks.jsonl", masks)):
                if records:
                    write_lines((json.dumps(record) + "\n" for record in records), folder / file)


def main(argv=None) -> None:
    options = parser(__doc__)
    add = options.add_argument
    add("kind", choices=KINDS)
    add("--out", type=Path, required=True, help="a new or empty folder")
    add("--train", type=positive, default=6000, help="drawings to train on")
    add("--test", type=positive, default=300, help="drawings to test on")
    add("--size", type=int, default=128, help="pixels a side")
    add("--seed", type=not_negative, default=0, help="number of the first drawing of each part")
    args = options.parse_args(argv)
    write_drawings(args.kind, args.out, (args.train, args.test), args.size, args.seed)


if __name__ == "__main__":
    run(main, __file__)
