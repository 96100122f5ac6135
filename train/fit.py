"""Train a PaliGemma to detect, or on any prefixes and suffixes. One program for one process and for many:

    python train/fit.py --model nano --data instances.json --out runs/mine --steps 2000 --lora
    torchrun --nproc_per_node=8 train/fit.py ...                                     # one node, 8 GPUs
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_endpoint=HOST:29500 train/fit.py ...  # two nodes

--data is a COCO, JSONL, YOLO, Pascal VOC or LabelMe set (train/data/forms.py); without it every sample is a
fresh practice scene. On at most 2,000 pictures, options that are not given follow from the data and the
model; the table before the first step says what they are. A killed run continues with --resume, and ends with
the weights that it would have had anyway. OUT/metrics.jsonl has a line every --log-every steps; OUT/final is
the result: a checkpoint in bfloat16, or the adapter. With --val, OUT/best is the same of the best validation.
"""

import argparse
import contextlib
import functools
import math
import os
import signal
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from model.decoding.closed_set import ClosedSet
from model.io.hub import folder_of, resolve
from model.io.writing import write_json
from train.data.forms import find_data
from train.data.open import read_coco_index
from train.data.samples import StepSampler, weight_of
from train.loss import Objective
from train.run.best import Best, forget_other_scores, verdict
from train.run.checkpoint import Run, Saver, load_trainer_state, save_checkpoint, save_model
from train.run.defaults import defaults_for
from train.run.distribute import distribute, exchange
from train.run.log import Log, stop_on_signals
from train.run.optimizers import make_optimizers, set_learning_rate
from train.run.options import arguments, as_json
from train.run.plan import print_dry_run, print_plan, validation_interval
from train.run.processes import join_processes, own_device, resident_memory, use_gpu
from train.run.program import run as run_program
from train.setup import (
    checkpoint_to_resume,
    leave_out_broken,
    load_data,
    load_model,
    load_shards,
    make_loader,
)
from train.validate import Validation

# ---- one step ----------------------------------------------------------------------------------------------


def agree(parts: list[dict[str, Tensor]], stopping: bool, world: int) -> tuple[Tensor, Tensor]:
    """What all processes must know before a step: the weights of the whole batch, by which losses are
    divided, and whether any process was asked to stop. One message carries both numbers: its cost is that of
    sending it, not of its length."""
    weights = sum(map(weight_of, parts)).clamp(min=1e-6)  # pictures without anything to teach have none
    sums = torch.stack((weights, weights.new_tensor(stopping)))  # [2]
    if world > 1:
        dist.all_reduce(sums)
    # DDP and FSDP average gradients over the processes; dividing the total by their number makes that a sum.
    return sums[0] / world, sums[1] > 0


def compute_gradient(
    compute: nn.Module,
    objective: Objective,
    parts: list[dict[str, Tensor]],
    total: Tensor,
    step: int,
    args: argparse.Namespace,
) -> Tensor | None:
    """Forward and backward through all micro-batches. Returns the loss, or None where the gradient is not
    finite."""
    loss_sum = torch.zeros((), device=total.device)
    amp = args.amp and args.dtype == "float32"
    for i, part in enumerate(parts):
        last = i == len(parts) - 1
        with torch.autocast(total.device.type, torch.bfloat16, enabled=amp), exchange(compute, last, args):
            loss, logged = compute(part | {"total": total}, patch_only=step < args.patch_steps)
            loss.backward()  # adds to the gradients of the micro-batches before
        loss_sum += logged
    norm = nn.utils.clip_grad_norm_(objective.parameters(), args.clip or math.inf)
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    # A GPU sync: so far the CPU has only queued the step's work, now it waits for the result.
    return loss_sum if torch.isfinite(norm) else None


def update(optimizers: list[Optimizer]) -> None:
    """One step of the weights along their gradients."""
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


# ---- the run -----------------------------------------------------------------------------------------------


def train(args: argparse.Namespace) -> int:
    """One run, from the options to OUT/final. Returns the exit code."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = own_device(args.device, world)
    program = resident_memory() if device.type == "cpu" else 0
    if args.dry_run:
        print_dry_run(args, world, program)
        return 0
    if device.type == "cuda":
        use_gpu(device)
    if world > 1 or args.shard:
        join_processes("nccl" if device.type == "cuda" else "gloo", timedelta(minutes=args.timeout))
    say = print if rank == 0 else lambda *_: None

    # The model, from a checkpoint of this run or from --model, and the data.
    val = find_data(args.val, args.val_images, ["val"]) if args.val and args.val_every != 0 else None
    for data_set in (args.data and find_data(args.data, args.images, ["train"]), val):
        if data_set:
            say(data_set)
    saved, before = checkpoint_to_resume(args)
    torch.manual_seed(args.seed)  # new adapters and the helper head start from random numbers
    base = saved if saved and not args.lora else resolve(args.model)  # with --lora, only the adapter is saved
    run = Run.of(args.out, base=args.model, files=folder_of(base), keep=args.keep)
    index = read_coco_index(args.data, args.images) if args.data else None
    model = load_model(args, base, saved if args.lora else None, index, device)
    tokenizer = model.tokenizer
    language = ClosedSet.of(model.config, tokenizer)
    data = load_data(args, model, language, index)
    every = validation_interval(args, len(data) if args.data else None)
    if every and val and args.tasks == "closed-set" and (val.form == "JSONL") == data.closed_set:
        kind = "lines of text" if data.closed_set else "COCO instances"
        raise ValueError(f"--val {args.val} holds {kind}, another kind of data than what is trained on")
    skipped = leave_out_broken(args, data, before if saved else None)

    # What is minimised, how it is computed, and what updates the weights.
    allowed = language if data.closed_set and args.loss == "allowed" else None
    class_names = [tokenizer.encode(f" {name}") for name in model.config.classes]
    objective = Objective(
        model,
        allowed,
        args.patch_weight,
        args.accumulate,
        class_names,
        branches=language,
        location_smoothing=args.location_smoothing,
    )
    objective.train()
    if not args.shard:
        objective.to(device)
    compute = distribute(objective, args)
    if args.shard:
        load_shards(args, model, base, device)
    optimizers = make_optimizers(objective, args)
    trainer = load_trainer_state(saved, objective, optimizers) if saved else {"step": 0}

    # The samples of each step, and what happens at intervals.
    steps = range(trainer["step"], max(trainer["step"], args.steps))
    items = len(data) if args.data else None  # practice scenes never end
    sampler = StepSampler(
        items, steps, args.batch_size, rank=rank, world=world, accumulate=args.accumulate, seed=args.seed
    )
    batches = iter(make_loader(args, data, sampler, model.config.pad, device))
    validation = Validation(args, model, objective, tokenizer, device) if every else None
    if rank == 0:
        print_plan(args, model.config, world, data if args.data else None, program)

    # What the run writes: run.json, the log and the checkpoints.
    options = as_json(args) | dict(skipped=skipped, skipped_val=validation.skipped if validation else {})
    options |= dict(samples=items + len(skipped)) if items else {}
    if saved:
        forget_other_scores(trainer, before, options)
    args.out.mkdir(parents=True, exist_ok=True)
    if rank == 0:
        write_json(options, args.out / "run.json")
    log = Log(args, steps.start, device) if rank == 0 else None
    save = functools.partial(save_checkpoint, run, trainer, model, objective, optimizers)
    stopping = stop_on_signals()

    loss_sum = torch.zeros((), device=device)  # since the last line of the log
    # The saver saves what is not, if an error ends the run.
    with Saver(save, run, trainer, options, args.shard) as saver, log or contextlib.nullcontext():
        best = Best(validation.run, every, args, model, run, saver, log) if validation else None
        if best:
            best.look()
        for step in steps:
            # Every step derives its random numbers (dropout) from its own number: there is no state to save.
            torch.manual_seed(hash((args.seed, step, rank)) % 2**63)
            set_learning_rate(optimizers, step, args)
            parts = [next(batches) for _ in range(args.accumulate)]
            parts = [{name: x.to(device, non_blocking=True) for name, x in part.items()} for part in parts]
            total, stop = agree(parts, stopping["now"] > 0, world)
            loss = compute_gradient(compute, objective, parts, total, step, args)
            if loss is None:
                saver.save()
                names = ", ".join(data.name(item) for keys in sampler.keys(step) for _, item in keys)
                raise ValueError(
                    f"step {step + 1}: the loss or its gradient is not finite; the weights before it are "
                    f"saved. Its samples on process {rank}: {names}"
                )
            with saver.step():
                update(optimizers)
            loss_sum += loss
            done = trainer["step"]

            # At intervals: a line of the log, validation, a checkpoint.
            if log:
                log.bar.update()
            if done % args.log_every == 0:
                if world > 1:
                    dist.all_reduce(loss_sum)
                if log:
                    log.line(done, loss_sum.item() / world, lr=optimizers[-1].param_groups[0]["lr"])
                loss_sum.zero_()
            if best:
                best.look()
            if done % args.save_every == 0 or done == args.steps or stop:
                saver.save()
            if stop and done < args.steps:
                say(f"\nstopped after step {done}; --resume continues")
                return 128 + (stopping["now"] or signal.SIGTERM)  # no number: another process was asked
    save_model(model, args.out / "final", run, torch.bfloat16)
    if log:
        log.check()
    say(f"trained {'adapter' if args.lora else 'checkpoint'}: {verdict(args, trainer, data.closed_set)}")
    return 0


def main() -> int:
    return train(arguments(settle=defaults_for))


if __name__ == "__main__":
    run_program(main, __file__)
