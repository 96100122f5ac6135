"""Train a PaliGemma to detect. One program for one process and for many:

    python train/train.py --model runs/nano-init --out runs/nano --steps 10000
    torchrun --nproc_per_node=8 train/train.py ...                                     # one node, 8 GPUs
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_endpoint=HOST:29500 train/train.py ...  # two nodes

Every sample is a fresh practice scene. A run that was killed goes on from its last checkpoint with --resume.
OUT/metrics.jsonl has a line every --log-every steps; OUT/final is the trained checkpoint in bfloat16.
"""

import argparse
import json
import math
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

from model import PaliGemma
from model.groups import ClosedSet
from model.tokenizer import Tokenizer
from model.weights import resolve
from train.checkpoint import load_trainer_state, newest, save_checkpoint
from train.data import PracticeScenes, StepSampler, network_input
from train.loss import closed_set_loss
from train.patch_head import PatchHead


def arguments(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--model", required=True, help="what to start from: a folder, a hub id, or nano")
    add("--out", type=Path, required=True, help="folder of this run: checkpoints, metrics, result")
    add("--steps", type=int, default=10_000)
    add("--batch-size", type=int, default=32, help="of all processes together")
    add("--lr", type=float, default=1e-5)
    add("--min-lr", type=float, default=1e-6, help="where the cosine ends")
    add(
        "--muon-lr",
        type=float,
        default=0,
        help="train the hidden matrices with Muon at this rate; 0: AdamW for all",
    )
    add("--warmup", type=int, default=100, help="steps of linear warm-up")
    add("--weight-decay", type=float, default=0.0)
    add("--clip", type=float, default=1.0, help="largest gradient norm")
    add(
        "--patch-weight",
        type=float,
        default=0.0,
        help="weight of the helper loss on image tokens (patch_head.py)",
    )
    add("--patch-steps", type=int, default=0, help="steps at the start with the helper loss alone")
    add("--first-scene", type=int, default=0, help="number of the first practice scene")
    add("--seed", type=int, default=0)
    add("--resume", action="store_true", help="go on from the newest checkpoint in --out")
    add("--save-every", type=int, default=500)
    add("--keep", type=int, default=2, help="checkpoints kept")
    add("--log-every", type=int, default=20)
    add("--workers", type=int, default=2, help="processes that draw scenes, for each training process")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add(
        "--amp",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="bfloat16 autocast over float32 weights",
    )
    add(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="torch.compile (needs a C++ compiler)",
    )
    return parser.parse_args(argv)


class Objective(nn.Module):
    """The loss of a batch: the model's, and that of the helper head on its image tokens."""

    def __init__(self, model: PaliGemma, language: ClosedSet, patch_weight: float):
        super().__init__()
        self.model, self.language, self.patch_weight = model, language, patch_weight
        config = model.config
        self.patch_head = (
            PatchHead(config.text.width, len(config.classes), config.vision.tokens) if patch_weight else None
        )
        self.register_buffer("prompt", torch.tensor(language.prompt), persistent=False)

    def forward(self, images: Tensor, batch: dict[str, Tensor], patch_only: bool) -> tuple[Tensor, Tensor]:
        """images [B, 3, S, S] -> (what to minimise, the closed-set loss for the log)."""
        image_tokens = self.model.encode(images)
        patch_loss = image_tokens.new_zeros(())
        if self.patch_head is not None:
            patch_loss = self.patch_head(image_tokens, batch["patch_labels"], batch["patch_boxes"])
        if patch_only:
            return patch_loss, patch_loss.detach()
        prompt = self.prompt.expand(len(images), -1)
        text = torch.cat((prompt, batch["inputs"][:, :-1]), dim=1)
        hidden = self.model.read(image_tokens, text, prompt.shape[1])[:, prompt.shape[1] - 1 :]
        loss = closed_set_loss(self.model.decoder, hidden, batch["tokens"], batch["weights"], self.language)
        loss = loss / batch["total"]
        return loss + self.patch_weight * patch_loss, loss.detach()


def make_optimizers(objective: nn.Module, args: argparse.Namespace) -> list[torch.optim.Optimizer]:
    """AdamW, without decay for vectors and embeddings; Muon for the matrices of the layers if asked for."""
    named = [(name, p) for name, p in objective.named_parameters() if p.requires_grad]
    matrices = [p for name, p in named if p.ndim == 2 and "embed" not in name]
    rest = [p for name, p in named if p.ndim != 2 or "embed" in name]
    fused = dict(fused=True) if args.device != "cpu" else {}
    groups = [dict(params=rest, weight_decay=0.0)]
    optimizers = []
    if args.muon_lr:
        muon = torch.optim.Muon(
            matrices, lr=args.muon_lr, weight_decay=args.weight_decay, adjust_lr_fn="match_rms_adamw"
        )
        optimizers.append(muon)
    else:
        groups.append(dict(params=matrices, weight_decay=args.weight_decay))
    optimizers.append(torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98), **fused))
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


def train(args: argparse.Namespace) -> None:
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    cuda = args.device.startswith("cuda")
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if cuda else args.device)
    if world > 1:
        dist.init_process_group("nccl" if cuda else "gloo")
    if args.batch_size % world:
        raise ValueError(f"--batch-size {args.batch_size} is not a multiple of the {world} processes")
    torch.manual_seed(args.seed)

    checkpoint = newest(args.out)
    if checkpoint and not args.resume:
        raise ValueError(f"{args.out} holds a run already: --resume goes on with it, or choose another --out")
    source = str(checkpoint or args.model)
    model = PaliGemma.from_pretrained(source, dtype=torch.float32, device=device).train()
    language = ClosedSet.of(model.config, Tokenizer(resolve(source)))
    tokenizer = (resolve(source) / "tokenizer.model").read_bytes()  # now: a checkpoint is deleted some day
    objective = Objective(model, language, args.patch_weight).to(device)
    optimizers = make_optimizers(objective, args)
    first_step = load_trainer_state(checkpoint, objective, optimizers) if checkpoint else 0

    vision = model.config.vision
    length = args.steps * args.batch_size
    data = PracticeScenes(language, vision.image_size, vision.patch_size, args.first_scene, length)
    sampler = StepSampler(first_step, args.steps, args.batch_size, rank, world)
    loader = DataLoader(
        data,
        batch_sampler=sampler,
        num_workers=args.workers,
        pin_memory=cuda,
        prefetch_factor=4 if args.workers else None,
    )
    compute = objective
    if args.compile:
        compute = torch.compile(compute, dynamic=False)
    if world > 1:
        compute = DistributedDataParallel(compute, find_unused_parameters=args.patch_steps > 0)

    args.out.mkdir(parents=True, exist_ok=True)
    metrics = (args.out / "metrics.jsonl").open("a") if rank == 0 else None  # noqa: SIM115
    bar = tqdm(total=args.steps, initial=first_step, unit="step", disable=rank > 0, mininterval=2)
    total, logged_step, started = torch.zeros((), device=device), first_step, time.monotonic()
    for step, batch in enumerate(loader, start=first_step):
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * lr_factor(step, args)
        batch = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
        batch["total"] = batch["weights"][:, :-1].sum() / world  # of the whole batch, so that ranks' means
        if world > 1:  # add up to what one process would have
            dist.all_reduce(batch["total"])
        with torch.autocast(device.type, torch.bfloat16, enabled=args.amp):
            loss, logged = compute(network_input(batch["image"]), batch, patch_only=step < args.patch_steps)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(objective.parameters(), args.clip, error_if_nonfinite=True)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        total += logged
        bar.update()
        done = step + 1
        if rank == 0 and done % args.log_every == 0:
            now = time.monotonic()
            rate = (done - logged_step) * args.batch_size / (now - started)
            line = dict(
                step=done,
                loss=round(total.item() / (done - logged_step), 4),
                lr=optimizers[-1].param_groups[0]["lr"],
            )
            metrics.write(json.dumps(line | dict(samples_per_s=round(rate, 1))) + "\n")
            metrics.flush()
            bar.set_postfix(loss=line["loss"], samples_s=round(rate))
            logged_step, started = done, now
            total.zero_()
        if rank == 0 and (done % args.save_every == 0 or done == args.steps):
            save_checkpoint(args.out, done, model, objective, optimizers, tokenizer, args.keep)
    bar.close()
    if rank == 0:
        model.save_pretrained(args.out / "final", torch.bfloat16)
        (args.out / "final" / "tokenizer.model").write_bytes(tokenizer)
        print(f"trained checkpoint: {args.out / 'final'}")
    if world > 1:
        dist.destroy_process_group()


def main() -> None:
    try:
        train(arguments())
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"train.py: {error}")


if __name__ == "__main__":
    main()
