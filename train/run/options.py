"""The options of fit.py, and which of them make a run what it is."""

import argparse
import functools
import re
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from model.config import FORMS
from model.decoding.layouts import cpu_has_bfloat16
from model.io.writing import explain
from model.lora import TARGETS
from train.data.samples import TEXT_MULTIPLE, collate
from train.data.targets import Noise
from train.run.program import add_seam_arguments, minutes, not_negative, parser, positive

# The machine and monitoring: a run may be resumed with other values of these. All others change the result.
MAY_CHANGE = set(
    "out allow_outside device accumulate recompute shard compile workers dry_run resume save_every keep "
    "pictures log_every val val_images val_every val_count check timeout".split()
)


def arguments(argv=None, settle: Callable | None = None) -> argparse.Namespace:
    """Parse the options, complete them, and refuse those that make no sense together. settle: returns the
    defaults that depend on other options (train/run/defaults.py)."""
    options = make_parser()
    args = options.parse_args(argv)
    if settle:
        given = {word.partition("=")[0] for word in (sys.argv[1:] if argv is None else argv)}
        options.set_defaults(**settle(args, given))
        args = options.parse_args(argv)
    complete(args)
    check(args, options)
    return args


def make_parser() -> argparse.ArgumentParser:
    """All options of fit.py."""
    options = parser(
        "Train a PaliGemma; the head of train/fit.py shows how. On at most 2,000 pictures with boxes some\n"
        "defaults are others (train/run/defaults.py): the table before the first step says which."
    )
    switch = argparse.BooleanOptionalAction

    add = options.add_argument_group("what").add_argument
    add("--model", required=True, help="what to start from: a folder, a hub id, or nano")
    add("--image-size", type=positive, help="pixels a side, a multiple of the patch size (default: its own)")
    add("--out", type=Path, required=True, help="folder of this run: checkpoints, metrics, result")
    add("--data", type=Path,
        help="a file or folder of COCO, JSONL, YOLO, Pascal VOC or LabelMe, told by what is there; of one in "
        "parts, train (default: practice scenes)")  # fmt: skip
    add("--images", type=Path, help="folder of its pictures (default: images/ beside the file, or its own)")
    add("--allow-outside", action=switch, default=False, help="pictures of JSONL may lie outside --images")
    add("--check", action=switch, default=True,
        help="open all pictures of --data and --val once before the first step")  # fmt: skip
    add("--skip-broken", action=switch, default=False,
        help="train without pictures that cannot be used (default: end before the first step)")  # fmt: skip
    add("--augment", action=switch, default=False, help="flip, scale, shift, colours (train/data/augment.py)")
    add("--flip-vertical", action=switch, default=False,
        help="with --augment: swap top and bottom too, for pictures without an up (cells)")  # fmt: skip
    tasks = ["closed-set", "all"]
    add("--tasks", choices=tasks, default=tasks[0], help="of practice scenes: all adds words and masks")
    add("--first-scene", type=not_negative, default=0, help="number of the first practice scene, its seed")
    add("--steps", type=positive, default=10_000, help="updates of the weights")
    add("--batch-size", type=positive, default=32, help="of all processes and micro-batches together")
    add("--accumulate", type=positive, default=1, help="micro-batches a step: less memory, the same result")
    add("--seed", type=not_negative, default=0, help="of all that is random but practice scenes")

    add = options.add_argument_group("which weights").add_argument
    add("--lora", action=switch, default=False, help="train an adapter instead of the weights")
    add("--lora-targets", default="published", help=f"{', '.join(TARGETS)}, or a regex for full module paths")
    add("--lora-rank", type=positive, default=16, help="columns of A, rows of B")
    add("--lora-alpha", type=float, default=16, help="B A is scaled by alpha / rank")
    add("--lora-dropout", type=float, default=0.05, help="of what A reads")
    add("--rslora", action=switch, default=False, help="scale by alpha / sqrt(rank)")
    add("--freeze-vision", action=switch, default=False, help="leave the vision tower as it is")

    add = options.add_argument_group("closed-set targets (defaults: nano's)").add_argument
    add("--answers", choices=FORMS, default=FORMS[0],
        help="objects one after the other in an answer, or each in a branch of its own")  # fmt: skip
    add("--branches", type=positive, default=64, help="parallel: objects of a picture that are taught")
    add("--noise", choices=["own", "made-up"],
        help="noise boxes: from the current weights, or made up (default: own in parallel)")  # fmt: skip
    add("--noise-boxes", type=not_negative, default=Noise.boxes, help="parallel: of a picture")
    add("--noise-copies", type=float, default=Noise.copies,
        help="share of made-up noise boxes that are jittered copies of real ones")  # fmt: skip
    add("--location-smoothing", type=float, default=0.0, metavar="SIGMA",
        help="teach locations as a Gaussian of so many bins (of 1,024) around the right one")  # fmt: skip
    add("--noise-weight", type=float, default=Noise.weight, help="of a noise box's class in the loss")
    add("--noise-disguise", type=float, default=Noise.disguise,
        help="share of the noise boxes whose class, as an input, is a random real one")  # fmt: skip
    add("--noise-near", type=float, default=Noise.near, help="share of the noise boxes near real ones")
    add("--noise-apart", action=switch, default=False, help="noise boxes keep away from each other as well")
    add("--skip-empty", action=switch, default=False, help="leave out pictures of --data without objects")

    add = options.add_argument_group("how").add_argument
    add("--lr", type=float, default=1e-5, help="highest learning rate, after the warm-up")
    add("--min-lr", type=float, help="where the cosine ends (default: 1e-6, or --lr if that is less)")
    add("--muon-lr", type=float, default=0, help="Muon at this rate for the layers' matrices; 0: AdamW")
    add("--warmup", type=not_negative, default=100, help="steps of linear warm-up")
    add("--weight-decay", type=float, default=0.0, help="of matrices; a step applies it times the rate")
    add("--beta2", type=float, default=0.98, help="AdamW's decay of squared gradients")
    add("--clip", type=float, default=1.0, help="largest gradient norm; 0: no limit")
    add("--loss", choices=["allowed", "vocabulary"], default="allowed",
        help="closed-set: over the ids allowed at each position, or over all (train/loss.py)")  # fmt: skip
    add("--loss-mean", choices=["token", "example"], default="token",
        help="mean of all tokens, or of each answer's mean: long ones weigh no more")  # fmt: skip
    add("--attn-cap", type=float, help="soft cap of the attention scores instead of the checkpoint's; 0: off")
    add("--final-cap", type=float, help="soft cap of the logits instead of the checkpoint's; 0: off")
    add_seam_arguments(add)
    add("--patch-weight", type=float, default=0.0, help="of the helper loss (train/nano/patch_head.py)")
    add("--patch-steps", type=not_negative, default=0, help="steps at the start with the helper loss alone")

    add = options.add_argument_group("machine").add_argument
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", choices=["auto", "float32", "bfloat16", "float16"], default="auto",
        help="of weights; auto: bfloat16 under adapters unless a CPU has none, else float32")  # fmt: skip
    add("--amp", action=switch,
        help="bfloat16 autocast over float32 weights (default: unless a CPU has none)")  # fmt: skip
    add("--recompute", action=switch, default=False, help="activation checkpointing: less memory, slower")
    add("--shard", action=switch, default=False, help="split the weights over the processes (FSDP2)")
    add("--compile", action=switch, default=False, help="torch.compile (needs a C++ compiler)")
    add("--workers", type=not_negative, default=2, help="data-loading processes of each training process")
    add("--timeout", type=minutes, default=10, metavar="MINUTES",
        help="of several processes: end when one has not been heard of for so long")  # fmt: skip
    add("--dry-run", action=switch, default=False, help="print sizes, memory and steps; load nothing")
    add("--pictures", type=positive, help="with --dry-run: samples of a --data that is not here yet")

    add = options.add_argument_group("monitoring and resuming").add_argument
    add("--resume", action=switch, default=False, help="continue from the newest checkpoint in --out, if any")
    add("--save-every", type=positive, default=500, help="steps between checkpoints")
    add("--keep", type=positive, default=2, help="checkpoints kept, the newest ones")
    add("--log-every", type=positive, default=20, help="steps between lines of metrics.jsonl")
    add("--val", type=Path, help="validation data, as --data; of one in parts, val "
        "(default, with --val-every: held-out practice scenes)")  # fmt: skip
    add("--val-images", type=Path, help="folder of its pictures (default: as --images)")
    add("--val-every", type=not_negative,
        help="steps between validations; 0: none (default, with --val: an epoch; on few pictures, "
        "at least an eighth of the run)")  # fmt: skip
    add("--val-count", type=positive, default=200, help="pictures of the validation data that are used")
    return options


def complete(args: argparse.Namespace) -> None:
    """Decide what was left open: options whose default depends on others."""
    quick = args.device != "cpu" or cpu_has_bfloat16()  # else a step in bfloat16 takes nine times as long
    if args.min_lr is None:
        args.min_lr = min(1e-6, args.lr)
    if args.amp is None:
        args.amp = quick
    if args.dtype == "auto":
        args.dtype = "bfloat16" if args.lora and quick else "float32"
    args.noise = args.noise or ("own" if args.answers == "parallel" else "made-up")
    args.lora_targets = TARGETS.get(args.lora_targets, args.lora_targets)
    if args.lora and args.freeze_vision:
        args.lora_targets = rf"(?!vision\.)({args.lora_targets})"


def check(args: argparse.Namespace, options: argparse.ArgumentParser) -> None:
    """Refuse values that are impossible, and options that make no sense together."""
    if not args.lr > 0:
        raise ValueError(f"--lr {args.lr:g}: must be above 0")
    if not 0 <= args.min_lr <= args.lr:
        raise ValueError(f"--min-lr {args.min_lr:g}: the rate falls from --lr {args.lr:g} to it, not below 0")
    for name in ("muon_lr", "weight_decay", "clip", "patch_weight"):
        value = getattr(args, name)
        if not value >= 0:  # a negative --clip would turn the gradient around
            raise ValueError(f"--{name.replace('_', '-')} {value:g}: must be at least 0")
    if args.dtype == "float16":
        raise ValueError("--dtype float16: its range is too small for Gemma's activations; use bfloat16")
    if args.dtype == "bfloat16" and not args.lora:
        raise ValueError(
            "--dtype bfloat16 rounds most steps of all weights away: it holds 8 bits of a weight, and a step "
            "changes less than that. Use --dtype float32 (--amp computes in bfloat16 all the same, --shard "
            "splits the memory over the GPUs), or --lora"
        )
    if args.shard and args.muon_lr:
        raise ValueError("--shard splits matrices that --muon-lr needs whole: use one of the two")
    if not args.location_smoothing >= 0:
        raise ValueError(f"--location-smoothing {args.location_smoothing:g}: must be at least 0")
    parallel = args.answers == "parallel"
    if parallel and args.loss_mean == "example":
        raise ValueError("--loss-mean example is for texts, and answers in parallel are none")
    if parallel and args.loss == "vocabulary":
        raise ValueError("--loss vocabulary is for --answers sequence; parallel always takes the allowed ids")
    if args.location_smoothing and args.loss == "vocabulary":
        raise ValueError("--location-smoothing needs --loss allowed")
    if not parallel:
        for name in ("branches", "noise_boxes"):
            if getattr(args, name) != options.get_default(name):
                raise ValueError(
                    f"--{name.replace('_', '-')} {getattr(args, name)} is for --answers parallel"
                )
        if args.noise == "own" and (args.tasks == "all" or args.loss == "vocabulary"):
            raise ValueError(
                "--noise own with --answers sequence needs --tasks closed-set and --loss allowed"
            )
    if args.noise == "own" and args.noise_copies:
        raise ValueError("--noise-copies is for noise that is made up: add --noise made-up")
    if args.images and not args.data:
        raise ValueError("--images belongs to --data, which is missing")
    if args.flip_vertical and not (args.augment and args.data):
        raise ValueError("--flip-vertical is a part of --augment, which is for --data: add both")
    if args.tasks == "all" and args.data:
        raise ValueError("--tasks all is of practice scenes: leave --data out; what lines ask for is in them")
    if args.val_every and args.data and not args.val:
        raise ValueError("--val-every needs --val FILE")
    if args.pictures and not args.dry_run:
        raise ValueError("--pictures is for --dry-run; other runs count those of --data")
    if args.patch_steps and not args.patch_weight:
        raise ValueError("--patch-steps trains the helper head alone, which needs a --patch-weight above 0")
    if args.skip_empty and not args.data:
        raise ValueError("--skip-empty is for --data: every practice scene has objects")
    if args.skip_broken and not (args.check or args.resume):
        raise ValueError("--skip-broken needs --check, which finds the broken pictures")
    if not 0 <= args.beta2 < 1:
        raise ValueError(f"--beta2 {args.beta2}: must be at least 0 and less than 1")
    noise_of(args)
    with explain(f"--lora-targets {args.lora_targets!r}: not a regular expression", re.error):
        re.compile(args.lora_targets)


def noise_of(args: argparse.Namespace) -> Noise:
    """The noise that the options ask for."""
    return Noise(
        weight=args.noise_weight,
        disguise=args.noise_disguise,
        near=args.noise_near,
        apart=args.noise_apart,
        skip_empty=args.skip_empty,
        copies=args.noise_copies,
        boxes=args.noise_boxes,
        own=args.noise == "own",
    )


def branches_of(args: argparse.Namespace) -> int | None:
    """How many objects of a picture are taught in branches; None: they are taught in sequence."""
    return args.branches if args.answers == "parallel" else None


def collate_of(args: argparse.Namespace, closed_set: bool, pad: int) -> Callable:
    """How samples become a batch. Lengths of texts are rounded up where they differ: closed-set answers in
    sequence all have the same."""
    multiple = TEXT_MULTIPLE if args.tasks == "all" or args.compile and not closed_set else 1
    return functools.partial(collate, pad=pad, multiple=multiple, per_example=args.loss_mean == "example")


def overrides_of(args: argparse.Namespace) -> dict[str, float]:
    """The config's fields that the options override."""
    fields = {name: getattr(args, name) for name in ("image_size", "attn_cap", "final_cap")}
    return {name: value for name, value in fields.items() if value is not None}


def changed_options(before: dict, args: argparse.Namespace) -> list[str]:
    """The options that change the result of a run and differ from those it had; with their values then.

    before: its run.json. An option that it does not have is newer than the run, which had its default.
    """
    defaults, now = as_json(arguments(["--model", "", "--out", ""])), as_json(args)
    old = {name: before.get(name, defaults[name]) for name in sorted(now.keys() - MAY_CHANGE)}
    return [f"--{name.replace('_', '-')} {value}" for name, value in old.items() if value != now[name]]


def as_json(args: argparse.Namespace) -> dict:
    """The options as run.json holds them."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
