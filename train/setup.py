"""What a run of fit.py starts from: its newest checkpoint, the model, the data and the loader of batches."""

import argparse
import os
import signal
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset

from model import PaliGemma, lora
from model.decoding.closed_set import ClosedSet
from model.decoding.masks import MaskCodec
from model.io.hub import codec_file
from model.io.weights import DTYPES, load_config, load_weights
from model.io.writing import check_writable, read_json
from train.data.coco import CocoIndex
from train.data.open import branches_for, check_length, classes_for
from train.data.samples import StepSampler, closed_set_lengths
from train.practice.dataset import PracticeScenes
from train.run.checkpoint import checkpoints, newest
from train.run.log import STOPPING, logged_lines
from train.run.options import branches_of, changed_options, collate_of, noise_of, overrides_of
from train.run.pictures import pictures_to_skip
from train.run.plan import training_data
from train.run.processes import all_gather


def checkpoint_to_resume(args: argparse.Namespace) -> tuple[Path | None, dict]:
    """The newest checkpoint in --out, or None for a new run, and the options that it ran with. Refuses to
    continue with others."""
    check_writable(args.out)
    restarts = all_gather(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)))  # each node counts its own
    restarted = max(restarts) > 0
    found = newest(args.out)
    goes_on = args.resume or restarted
    if found and not goes_on:
        raise ValueError(f"{args.out} holds a run already: --resume continues it, or choose another --out")
    # best/ may be that of a run which ended before its first checkpoint.
    results = [args.out / name for name in ["final"] + ["best"] * (not goes_on)] + checkpoints(args.out)
    if not found and any(place.exists() for place in results):
        raise ValueError(f"{args.out} holds a run without a checkpoint: empty it, or choose another --out")
    before = dict(skipped={}, skipped_val={}) | read_json(args.out / "run.json") if found else {}
    logged_lines(args.out / "metrics.jsonl")  # complains now, not after the model is loaded
    if found and (changed := changed_options(before, args)):
        was = ", ".join(changed)
        raise ValueError(f"{args.out} is a run with {was}: it cannot go on with other values")
    return found, before


def load_model(
    args: argparse.Namespace, base: Path, adapter: Path | None, index: CocoIndex | None, device: torch.device
) -> PaliGemma:
    """The model that is trained: a checkpoint, with an adapter if --lora.

    adapter: the folder of one to train further; None: a new one. index: of --data, None for lines of text.
    With --shard the checkpoint is only looked through: load_shards gives the model its weights, once it is
    known which process has which."""
    overrides = overrides_of(args)
    closed_set = index is not None or not args.data
    overrides["closed_set_only"] = closed_set and args.tasks == "closed-set"
    if closed_set:
        overrides["answers"] = args.answers
        if index is not None:
            overrides["branches"] = branches_for(index)
    if args.data:
        overrides["classes"] = classes_for(index, load_config(base).classes)
        if index is None:  # lines of text: any class can be asked for
            overrides["open_vocabulary"] = True
    model = PaliGemma.from_pretrained(
        base,
        dtype=DTYPES[args.dtype],
        device="meta" if args.shard else device,
        adapter=adapter,
        attention=args.attention,
        attention_in=args.attention_in,
        mask=args.mask,
        **overrides,
    )
    if args.lora and not adapter:
        lora.add_lora(
            model,
            args.lora_targets,
            rank=args.lora_rank,
            alpha=args.lora_alpha,
            dropout=args.lora_dropout,
            rslora=args.rslora,
        )
    elif args.freeze_vision and not args.lora:
        model.vision.requires_grad_(False)
    return model


def load_shards(args: argparse.Namespace, model: PaliGemma, base: Path, device: torch.device) -> None:
    """Give a model that was sharded before it had memory its weights: each process reads its own part.

    So --shard starts wherever a step fits. The 28B has 27.7e9 weights, in float32 111 GB: whole, they are
    more than a GPU of 80 GB holds, their eighth is 13.8 GB. Eight such GPUs train all of them in 16 bytes
    each (weight, gradient, two moments), 55 GB a GPU; besides these, the layer that is computed is whole in
    bfloat16 (1.1 GB, and the next one), as are embedding and head while there is a use for them (2.4 GB, and
    their gradient in float32 4.7 GB). What is left is for activations (--recompute).
    """
    load_weights(model, base, load_config(base).vision.tokens, DTYPES[args.dtype], device)


def load_data(
    args: argparse.Namespace, model: PaliGemma, language: ClosedSet, index: CocoIndex | None
) -> Dataset:
    """The training data: --data, or practice scenes. index: of --data, None for lines of text."""
    if not args.data:
        prompt, branches, noise = len(language.prompt), branches_of(args), noise_of(args)
        check_length(closed_set_lengths(prompt, language.groups, 0, branches, noise)[1], model)
        codec = MaskCodec.load(codec_file(model.folder)) if args.tasks == "all" else None
        vision = model.config.vision
        return PracticeScenes(
            language,
            vision.image_size,
            vision.patch_size,
            first=args.first_scene,
            tokenizer=model.tokenizer,
            codec=codec,
            noise=noise,
            branches=branches,
        )
    if args.patch_weight:
        raise ValueError("--patch-weight is for practice scenes: only they know what each patch shows")
    return training_data(args, model, model.tokenizer, index)


def leave_out_broken(args: argparse.Namespace, data: Dataset, before: dict | None) -> dict[str, str]:
    """Open all pictures of --data, and leave out those that cannot be used: {item: what is wrong with it}.
    before: run.json of a run that is resumed, which leaves out the same as before."""
    known = None if before is None else before["skipped"]
    if args.data and known is not None and len(data) != (began := before.get("samples", len(data))):
        raise ValueError(
            f"{args.data} has {len(data)} samples, and had {began} when this run began; it cannot go on with "
            "others: begin a new one from its newest checkpoint (--model)"
        )
    if args.data and args.check:
        known = pictures_to_skip(data, range(len(data)), args.data, args.workers, args.skip_broken, known)
    if known:
        data.keep([item for item in range(len(data)) if str(item) not in known])
    return known or {}


def make_loader(
    args: argparse.Namespace, data: Dataset, sampler: StepSampler, pad: int, device: torch.device
) -> DataLoader:
    """Micro-batches in the order of the run, prepared by worker processes."""
    return DataLoader(
        data,
        batch_sampler=sampler,
        collate_fn=collate_of(args, data.closed_set, pad),
        num_workers=args.workers,
        prefetch_factor=4 if args.workers else None,
        pin_memory=device.type == "cuda",
        worker_init_fn=leave_signals_to_the_run,
    )


def leave_signals_to_the_run(_worker: int) -> None:
    """SIGTERM, with which torchrun and SLURM stop a run, a terminal's SIGHUP and Ctrl-C reach its workers as
    well: they have to go on while the run finishes its step, and end with it."""
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)
