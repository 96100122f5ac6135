"""Train a PaliGemma to detect, or on any prefixes and suffixes. One program for one process and for many:

    python train/fit.py --model nano --data instances.json --out runs/mine --steps 2000 --lora
    torchrun --nproc_per_node=8 train/fit.py ...                                     # one node, 8 GPUs
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_endpoint=HOST:29500 train/fit.py ...  # two nodes

--data is a COCO file or JSONL; without it every sample is a fresh practice scene. A run that was killed goes
on with --resume, to the same weights as if nothing had happened. OUT/metrics.jsonl has a line every
--log-every steps; OUT/final is the result: a checkpoint in bfloat16, or the adapter.
"""

import argparse
import contextlib
import functools
import math
import os
import signal

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from model import PaliGemma, lora
from model.decoding.closed_set import ClosedSet
from model.decoding.masks import MaskCodec
from model.io.hub import COMPANION_FILES, codec_file, resolve
from model.io.tokenizer import Tokenizer
from model.io.weights import load_config
from model.io.writing import read_json, write_json
from train.data.jsonl import is_jsonl
from train.data.samples import ROUND, PracticeScenes, StepSampler, classes_for, collate, open_data
from train.objective import Objective
from train.run.checkpoint import load_trainer_state, newest, save_checkpoint, save_model
from train.run.log import Log, stop_on_signals
from train.run.options import SAME_RUN, arguments, as_json, caps_of, noise_of
from train.run.plan import print_plan
from train.run.processes import gathered, join, leave
from train.validate import Validation


def make_optimizers(objective: nn.Module, args: argparse.Namespace) -> list[torch.optim.Optimizer]:
    """AdamW, without decay for vectors and embeddings; Muon for the matrices of the layers if asked for."""
    named = [(name, p) for name, p in objective.named_parameters() if p.requires_grad]
    matrices = [p for name, p in named if p.ndim == 2 and "embed" not in name]
    rest = [p for name, p in named if p.ndim != 2 or "embed" in name]
    groups = [dict(params=rest, weight_decay=0.0)]
    optimizers = []
    if args.muon_lr:
        options = dict(lr=args.muon_lr, weight_decay=args.weight_decay, adjust_lr_fn="match_rms_adamw")
        optimizers.append(torch.optim.Muon(matrices, **options))
    else:
        groups.append(dict(params=matrices, weight_decay=args.weight_decay))
    groups = [group for group in groups if group["params"]]
    betas = 0.9, args.beta2
    optimizers.append(torch.optim.AdamW(groups, lr=args.lr, betas=betas, fused=args.device != "cpu"))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def lr_factor(step: int, args: argparse.Namespace) -> float:
    """Linear warm-up, then half a cosine from 1 down to min_lr / lr."""
    if step < args.warmup:
        return (step + 1) / args.warmup
    progress = (step - args.warmup) / max(1, args.steps - args.warmup)
    floor = args.min_lr / args.lr
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def recomputed(forward, *args):
    """A block's forward that is run again for its gradient, instead of keeping what the gradient needs.

    Without a gradient it is the forward alone: checkpoint would read the GPU's random state first, which
    ends the capture of a CUDA graph, and validation decodes with one.
    """
    if not torch.is_grad_enabled():
        return forward(*args)
    return checkpoint(forward, *args, use_reentrant=False)


def distribute(objective: Objective, args: argparse.Namespace) -> nn.Module:
    """The objective as it is called: compiled, and its gradients shared between the processes."""
    model = objective.model
    blocks = [*model.vision.layers, *model.decoder.layers]
    if args.recompute:
        for block in blocks:
            block.forward = functools.partial(recomputed, block.forward)
    if args.compile:  # all but the loss, which picks a different number of positions in every batch
        model.encode = torch.compile(model.encode, dynamic=False)
        model.read = torch.compile(model.read, dynamic=False)
    if args.shard:
        compute = torch.bfloat16 if args.amp and args.dtype == "float32" else None
        policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32)
        for block in blocks:
            fully_shard(block, mp_policy=policy)
        return fully_shard(objective, mp_policy=policy)
    if dist.is_initialized():
        return DistributedDataParallel(objective, find_unused_parameters=args.patch_steps > 0)
    return objective


def train(args: argparse.Namespace) -> int:
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    cuda = args.device.startswith("cuda")
    device = torch.device(f"cuda:{os.environ['LOCAL_RANK']}" if cuda and world > 1 else args.device)
    if cuda:
        torch.cuda.set_device(device)
    if args.dry_run:
        return print_plan(args, world)
    if world > 1 or args.shard:
        join("nccl" if cuda else "gloo")

    # What to go on from.
    restarted = max(gathered(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)))) > 0  # nodes may differ
    found = newest(args.out)
    if found and not (args.resume or restarted):
        raise ValueError(f"{args.out} holds a run already: --resume goes on with it, or choose another --out")
    if found:
        before = read_json(args.out / "run.json")
        changed = [name for name in SAME_RUN if before.get(name) != as_json(args)[name]]
        if changed:
            told = ", ".join(f"--{name.replace('_', '-')} {before.get(name)}" for name in changed)
            raise ValueError(f"{args.out} is a run with {told}: it cannot go on with other values")

    # Model, data, optimizers.
    torch.manual_seed(args.seed)  # of adapters and the helper head
    base = found if found and not args.lora else resolve(args.model)
    tokenizer = Tokenizer(base)
    beside = {file.name: file.read_bytes() for name in COMPANION_FILES if (file := base / name).exists()}
    known = load_config(str(base)).classes
    overrides = dict(classes=classes_for(args.data, args.images, known)) if args.data else {}
    overrides |= dict(open_vocabulary=True) if args.data and is_jsonl(args.data) else {}
    overrides |= caps_of(args)
    options = dict(dtype=getattr(torch, args.dtype), device=device) | overrides
    model = PaliGemma.from_pretrained(str(base), adapter=found if args.lora else None, **options)
    if args.lora and not found:
        lora_options = dict(rank=args.lora_rank, alpha=args.lora_alpha, dropout=args.lora_dropout)
        lora.add_lora(model, args.lora_targets, rslora=args.rslora, **lora_options)
    elif args.freeze_vision and not args.lora:
        model.vision.requires_grad_(False)
    if tokenizer.size > model.config.text.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.size} ids, {args.model} {model.config.text.vocab_size}"
        )
    language = ClosedSet.of(model.config, tokenizer)
    if args.data:
        options = args.seed, args.augment, args.allow_outside, noise_of(args)
        data = open_data(args.data, args.images, model, tokenizer, *options)
    else:
        codec = MaskCodec.load(codec_file(base)) if args.tasks == "all" else None
        vision = model.config.vision
        scenes = args.first_scene, "train", tokenizer, codec, noise_of(args)
        data = PracticeScenes(language, vision.image_size, vision.patch_size, *scenes)
    closed_set = hasattr(data, "language") and args.tasks == "closed-set"
    if args.patch_weight and args.data:
        raise ValueError("--patch-weight is for practice scenes: only they know what each patch shows")
    allowed = language if closed_set and args.loss == "allowed" else None
    names = [tokenizer.encode(f" {name}") for name in model.config.classes]
    objective = Objective(model, allowed, args.patch_weight, args.accumulate, names).to(device).train()
    compute = distribute(objective, args)
    optimizers = make_optimizers(objective, args)
    trainer = load_trainer_state(found, objective, optimizers) if found else {"step": 0}
    trainable = sum(p.numel() for p in objective.parameters() if p.requires_grad)
    say = print if rank == 0 else lambda *_: None
    say(f"{trainable:,} trainable of {sum(p.numel() for p in model.parameters()):,} parameters")

    first_step, micro = trainer["step"], args.accumulate
    items = len(data) if args.data else None
    steps = range(first_step, max(first_step, args.steps))
    sampler = StepSampler(items, steps, args.batch_size, rank, world, micro, args.seed)
    multiple = ROUND if args.tasks == "all" else 1
    per_example = args.loss_mean == "example"
    padded = functools.partial(collate, pad=model.config.pad, multiple=multiple, per_example=per_example)
    prefetch = dict(prefetch_factor=4) if args.workers else {}
    loader = DataLoader(
        data, batch_sampler=sampler, collate_fn=padded, num_workers=args.workers, pin_memory=cuda, **prefetch
    )
    validation = Validation(args, model, objective, tokenizer, device) if args.val_every else None

    def save() -> None:
        save_checkpoint(args.out, trainer, model, objective, optimizers, args.model, beside, args.keep)

    args.out.mkdir(parents=True, exist_ok=True)
    if rank == 0:
        write_json(as_json(args), args.out / "run.json")
    log = Log(args, first_step, world, device) if rank == 0 else None
    stopping = stop_on_signals()
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.amp and args.dtype == "float32")
    keys, batches = iter(sampler), iter(loader)
    loss_sum = torch.zeros((), device=device)
    for step in steps:
        # Every step derives its random numbers (dropout) from its own number: there is no state to save.
        torch.manual_seed(hash((args.seed, step, rank)) % 2**63)
        factor = lr_factor(step, args)
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = group["peak_lr"] * factor
        parts = [next(batches) for _ in range(micro)]
        names = [data.name(item) for _ in parts for _, item in next(keys)]
        parts = [{name: x.to(device, non_blocking=True) for name, x in part.items()} for part in parts]
        sums = torch.stack(
            (sum(part["weights"].sum() for part in parts), loss_sum.new_tensor(stopping["now"]))
        )
        if world > 1:  # one message: what losses are divided by, and whether any process was told to stop
            dist.all_reduce(sums)
        total, stop = sums[0] / world, sums[1] > 0

        for i, part in enumerate(parts):
            last = i == micro - 1
            with autocast, exchange(compute, last, args):
                loss, logged = compute(part | {"total": total}, patch_only=step < args.patch_steps)
                loss.backward()
            loss_sum += logged
        norm = nn.utils.clip_grad_norm_(objective.parameters(), args.clip or math.inf)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        if not torch.isfinite(norm):
            save()
            raise ValueError(
                f"step {step + 1}: the loss or its gradient is not finite; the weights before it are saved. "
                f"Its samples on process {rank}: {', '.join(names)}"
            )
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        done = trainer["step"] = step + 1
        if done % args.log_every == 0:
            if world > 1:
                dist.all_reduce(loss_sum)
            if log:
                log.line(done, loss_sum.item() / world, lr=optimizers[-1].param_groups[0]["lr"])
            loss_sum.zero_()
        if log:
            log.bar.update()
        if validation and (done % args.val_every == 0 or done == args.steps):
            figures = validation.run()
            score = figures.get("val_mAP", -figures["val_loss"])
            if score > trainer.get("best", {}).get("score", -math.inf):
                trainer["best"] = dict(step=done, score=score)
            if log:
                log.write(dict(step=done, **figures))
        best_now = trainer.get("best", {}).get("step") == done
        if done % args.save_every == 0 or done == args.steps or best_now or stop:
            save()
        if stop and done < args.steps:
            say(f"\nstopped after step {done}; --resume goes on")
            return 128 + signal.SIGTERM
    if log:
        log.bar.close()
    save_model(model, args.out / "final", args.model, beside, torch.bfloat16)
    say(f"trained {'adapter' if args.lora else 'checkpoint'}: {args.out / 'final'}")
    return 0


def exchange(compute: nn.Module, last: bool, args: argparse.Namespace):
    """Gradients travel between processes once a step, with its last micro-batch."""
    if args.shard:
        compute.set_requires_gradient_sync(last)
    elif isinstance(compute, DistributedDataParallel) and not last:
        return compute.no_sync()
    return contextlib.nullcontext()


def main() -> None:
    try:
        status = train(arguments())
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        status = f"fit.py: {error}"
    leave(status)


if __name__ == "__main__":
    main()
