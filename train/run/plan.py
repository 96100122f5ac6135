"""What a run of fit.py will do, as a table before its first step, and warnings.

With --dry-run that is all: no weights are read, and with --pictures N no data either.
"""

import argparse
import math
import re

import numpy as np
from torch.utils.data import Dataset

from model import PaliGemma
from model.config import VARIANTS, PaliGemmaConfig
from model.io.hub import folder_of, resolve
from model.io.tokenizer import Tokenizer
from model.io.weights import load_config
from train.data.coco import CocoIndex
from train.data.open import branches_for, check_length, classes_for, open_data, read_coco_index
from train.data.samples import closed_set_lengths
from train.run.memory import GIB, memory_of, skeleton
from train.run.options import branches_of, noise_of, overrides_of

PROMPT_TOKENS = 8  # of "detect all classes", where there is no tokenizer to count them
LINE_TOKENS = 64  # of a prompt and its answer in words, where there are no lines to count
CLASSES_SHOWN = 5
FEW_OBJECTS = 10  # of a class: of fewer, the median says little
OFFICIAL = re.compile(r"google/(paligemma2?-\d+b)-[\w-]*?(224|448|896)(-jax)?")  # names on the hub


def print_dry_run(args: argparse.Namespace, world: int, program: int) -> None:
    """Print the plan of a run that is not started. program: bytes, see memory_of."""
    there = args.data is not None and args.data.exists()
    if args.data is not None and not there and args.pictures is None:
        raise ValueError(f"{args.data}: no such file; with --pictures N the plan is made without it")
    known = OFFICIAL.fullmatch(args.model)
    if known and not there:  # nothing is asked of the hub
        folder, config = None, VARIANTS[f"{known[1]}-{known[2]}"]
    else:
        source = resolve(args.model, weights=False)
        folder, config = folder_of(source), load_config(source)
    index = read_coco_index(args.data, args.images) if there else None
    branches = config.branches if index is None else branches_for(index)
    config = config.override(
        classes=classes_for(index, config.classes), branches=branches, **overrides_of(args)
    )
    model, data = skeleton(args, config)[0], None
    if there and (folder / "tokenizer.model").exists():
        data = training_data(args, model, Tokenizer(folder), index)
    check_length(text_lengths(args, config, data)[1], model)
    print_plan(args, config, world, data, program)


def training_data(
    args: argparse.Namespace, model: PaliGemma, tokenizer: Tokenizer, index: CocoIndex | None
) -> Dataset:
    """--data as it is trained on. index: of its boxes, if they are read already."""
    options = dict(allow_outside=args.allow_outside, flip_vertical=args.flip_vertical, noise=noise_of(args))
    options |= dict(index=index, branches=branches_of(args))
    return open_data(args.data, args.images, model, tokenizer, args.seed, args.augment, **options)


def print_plan(
    args: argparse.Namespace, config: PaliGemmaConfig, world: int, data: Dataset | None, program: int
) -> None:
    """Print the table and the warnings. data: None for practice scenes, or if it is not there yet."""
    model, adapters = skeleton(args, config)
    weights = list(model.parameters())
    trained = sum(p.numel() for p in weights if p.requires_grad)
    in_adapters = f" in {adapters} adapters" if args.lora else ""
    size = f"{sum(p.numel() for p in weights):,} parameters, {config.vision.image_size} px, {args.dtype}"
    items = len(data) if data else args.pictures
    text, _ = text_lengths(args, config, data)
    tokens = f"{config.vision.tokens} image tokens + {text} text tokens"
    micro, processes = args.batch_size // (world * args.accumulate), f"{world} process{'es' * (world > 1)}"
    epochs = f", {args.steps * args.batch_size / items:.2f} epochs" if items else ""
    every = validation_interval(args, items)
    memory = memory_of(args, config, model, world, text, program)
    rows = [
        ("model", f"{args.model}: {size}"),
        ("trained", f"{trained:,} parameters{in_adapters}"),
        *data_rows(args, config, data),
        ("a sample", f"{tokens} = {config.vision.tokens + text} tokens"),
        ("a step", f"{args.batch_size} samples = {processes} x {args.accumulate} x {micro}"),
        ("steps", f"{args.steps:,}{epochs}"),
        ("learning rate", f"{args.lr:g} to {args.min_lr:g}, {args.warmup} steps of warm-up"),
        ("validation", validation_words(args, every)),
        ("memory", f"about {sum(memory.values()) / GIB:.2f} GiB a process: {memory_words(memory)}"),
        ("results", results_words(args, every)),
    ]
    for name, words in rows:
        print(f"{name:<14}{words}")
    for warning in warnings_of(args, config, data):
        print(f"warning: {warning}")


# ---- the rows ----------------------------------------------------------------------------------------------


def text_lengths(args: argparse.Namespace, config: PaliGemmaConfig, data: Dataset | None) -> tuple[int, int]:
    """The most tokens of text of a sample, and their last position."""
    if data is not None:
        return data.text_tokens, data.text_positions
    if args.data is not None and args.data.suffix == ".jsonl":
        return LINE_TOKENS, LINE_TOKENS
    groups = config.groups
    return closed_set_lengths(PROMPT_TOKENS, groups, groups, branches_of(args), noise_of(args))


def data_rows(
    args: argparse.Namespace, config: PaliGemmaConfig, data: Dataset | None
) -> list[tuple[str, str]]:
    if args.data is None:
        return [("data", "practice scenes, each seen once")]
    if data is None:
        pictures = f"{args.pictures:,} samples, by --pictures" if args.pictures else "not counted"
        return [("data", f"{args.data}: {pictures}")]
    if not data.closed_set:
        pictures = len({data.same_picture(item) for item in range(len(data))})
        return [("data", f"{args.data}: JSON lines, {len(data):,} samples of {pictures:,} pictures")]
    counts, classes = object_counts(data), data.index.classes
    names = ", ".join(classes[:CLASSES_SHOWN]) + (", ..." if len(classes) > CLASSES_SHOWN else "")
    of_classes = f"{len(classes)} class{'es' * (len(classes) > 1)} ({names})"
    found = f"boxes, {len(data):,} samples, {counts.sum():,} objects of {of_classes}"
    left_out = {"crowds": data.index.skipped_crowd, "boxes without an area": data.index.skipped_degenerate}
    less = "".join(f"; left out: {what} {count:,}" for what, count in left_out.items() if count)
    objects = f"{counts.mean():.1f} a picture, at most {counts.max()}; an answer has"
    form = f"{config.groups} boxes"
    if args.answers == "parallel":
        form = f"a branch for each of {args.branches}, and {config.branches} when detecting"
    return [("data", f"{args.data}: {found}{less}"), ("objects", f"{objects} {form}")]


def object_counts(data: Dataset) -> np.ndarray:
    """The objects of each picture, int64 [N]."""
    return data.index.offsets.diff()[data.rows].numpy()


def validation_interval(args: argparse.Namespace, items: int | None) -> int:
    """Steps between validations, 0 for none: --val-every, or with --val an epoch. Practice scenes have no
    epochs, for them it is a tenth of the run. items: samples of an epoch, None if it has no end."""
    if args.val_every is not None:
        return args.val_every
    if args.val is None:
        return 0
    return max(1, math.ceil(items / args.batch_size) if items else args.steps // 10)


def validation_words(args: argparse.Namespace, every: int) -> str:
    if not every:
        return "none (--val FILE)"
    count = f"{args.val_count} {'pictures' if args.val else 'held-out practice scenes'}"
    of_file = f"up to {count} of {args.val}" if args.val else count
    return f"{of_file}: at the start, every {every:,} steps and at the end"


def memory_words(memory: dict[str, float]) -> str:
    return ", ".join(f"{name} {size / GIB:.2f}" for name, size in memory.items())


def results_words(args: argparse.Namespace, every: int) -> str:
    kept = f"the newest {args.keep} of step-..., one every {min(args.save_every, args.steps):,} steps"
    best = "best, of the best validation; " if every else ""
    return f"{args.out}: final, the {'adapter' if args.lora else 'checkpoint'}; {best}{kept}; metrics.jsonl"


# ---- the warnings ------------------------------------------------------------------------------------------


def warnings_of(args: argparse.Namespace, config: PaliGemmaConfig, data: Dataset | None) -> list[str]:
    """What will most likely make the result worse than it could be, each with a remedy."""
    found = []
    if args.warmup > args.steps:
        rate = f"{args.lr * args.steps / args.warmup:.2g}"
        found.append(
            f"--warmup {args.warmup} exceeds --steps {args.steps}: the rate ends at {rate}, not --lr"
        )
    if data is not None and data.closed_set:
        found += full_pictures(args, config, object_counts(data))
        found += small_objects(config, data)
    return found


def full_pictures(args: argparse.Namespace, config: PaliGemmaConfig, counts: np.ndarray) -> list[str]:
    """Warnings about pictures with more objects than are taught, or found unless one asks for more."""
    parallel, most = args.answers == "parallel", counts.max()
    taught = args.branches if parallel else config.groups

    def above(limit: int) -> str:
        return f"{(counts > limit).sum():,} pictures have more than {limit} objects (at most {most})"

    if most > taught:
        remedy = f"--branches {most}" if parallel else f"--answers parallel --branches {most}"
        return [f"{above(taught)}, the boxes of an answer; {remedy} teaches all of them"]
    if parallel and most > config.branches:
        return [f"{above(config.branches)}: detect and evaluate with --branches {most} or more"]
    return []


def small_objects(config: PaliGemmaConfig, data: Dataset) -> list[str]:
    """A warning if the median object, or that of a class, is smaller than a patch of the resized picture."""
    index, size, patch = data.index, config.vision.image_size, config.vision.patch_size
    owners = np.repeat(np.arange(len(index)), index.offsets.diff().numpy())
    boxes, labels = index.boxes.numpy(), index.labels.numpy()
    shares = (boxes[:, 2:] - boxes[:, :2]) / index.sizes.numpy()[owners]
    sides = size * np.sqrt(shares.prod(1))  # [A] in pixels of the resized picture
    if not len(sides):
        return []
    medians = {"the objects": float(np.median(sides))}
    if medians["the objects"] >= patch:
        classes = {name: sides[labels == c] for c, name in enumerate(index.classes)}
        classes = {name: of_class for name, of_class in classes.items() if len(of_class) >= FEW_OBJECTS}
        medians = {name: float(np.median(of_class)) for name, of_class in classes.items()}
    small = {name: side for name, side in medians.items() if side < patch}
    if not small:
        return []
    names = ", ".join(f"{name} {side:.0f}" for name, side in sorted(small.items(), key=lambda x: x[1])[:3])
    wanted = math.ceil(size / min(small.values())) * patch
    return [
        f"at {size} px a patch is {patch} pixels wide, and the median of some objects is smaller ({names}): "
        f"they may be missed; --image-size {wanted} would show them as large as a patch"
    ]
