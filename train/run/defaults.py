"""Defaults of fit.py's options for a run on few pictures, which depend on the data and the model.

Measured with nano on three sets of 130 to 205 photographs (train/README.md, "Your own pictures"). More
pictures, lines of text and practice scenes keep the parser's defaults.
"""

import argparse
import math
import os
from itertools import islice

from model.io.hub import resolve
from model.io.weights import load_config
from model.io.writing import read_json
from train.data.forms import Found, find_data
from train.data.open import read_coco_index
from train.run.checkpoint import checkpoints

FEW = 2000  # pictures: at most so many have these defaults
LARGE = 64 << 20, 10 * FEW  # bytes of a file, files in a folder: of more, pictures are not even counted
BATCH = 8  # more steps teach more than larger ones, in equal time
EPOCHS = 50  # looks at every picture, each time augmented in another way
STEPS = 300, 900  # at least, at most: a quarter of an hour of nano on two cores
VALIDATIONS = 8  # a run, where an epoch is shorter
NANO_WIDTH = 512  # of text: a model that is not wider learns at NANO_LR
NANO_LR, NANO_LORA_LR = 5e-4, 3e-3
CHOSEN = "batch_size steps answers augment warmup weight_decay location_smoothing lr min_lr".split()


def defaults_for(args: argparse.Namespace, given: set[str]) -> dict:
    """Values for the parser's set_defaults. args: as parsed so far; given: the options that the user gave."""
    if args.data is None or not args.data.exists():
        return {}
    # A run goes on as it began, on any number of processes; one that has no checkpoint begins anew.
    if checkpoints(args.out) and (args.out / "run.json").exists():
        before, names = read_json(args.out / "run.json"), CHOSEN + ["val_every"] * (args.val is not None)
        return {name: before[name] for name in names if name in before}
    if is_large(find_data(args.data, args.images, ["train"])):
        return {}
    index = read_coco_index(args.data, args.images)
    if index is None or not 0 < len(index) <= FEW:
        return {}
    config = load_config(resolve(args.model, weights=False))
    share = int(os.environ.get("WORLD_SIZE", 1)) * args.accumulate
    batch = args.batch_size if "--batch-size" in given else share * max(1, BATCH // share)
    epoch, (least, most) = math.ceil(len(index) / batch), STEPS
    steps = args.steps if "--steps" in given else min(max(EPOCHS * epoch, least), most)
    answers = args.answers if "--answers" in given else config.answers
    chosen = dict(batch_size=batch, steps=steps, answers=answers, augment=True, warmup=10, weight_decay=0.01)
    if args.val:
        chosen["val_every"] = max(epoch, math.ceil(steps / VALIDATIONS))
    if answers == "parallel":
        chosen["location_smoothing"] = 6.0
    if config.text.width <= NANO_WIDTH:
        lr = args.lr if "--lr" in given else NANO_LORA_LR if args.lora else NANO_LR
        chosen |= dict(lr=lr, min_lr=lr / 50)
    return chosen


def is_large(found: Found) -> bool:
    """Whether reading a set twice would take long."""
    most_bytes, most_files = LARGE
    if found.read is None:  # one file with all that there is
        return found.path.stat().st_size > most_bytes
    return next(islice(found.images.rglob("*"), most_files, None), None) is not None
