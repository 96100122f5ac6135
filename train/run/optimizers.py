"""The optimizers of a run, and their learning rate."""

import argparse
import math

import torch
from torch import nn
from torch.optim import Optimizer


def make_optimizers(objective: nn.Module, args: argparse.Namespace) -> list[Optimizer]:
    """AdamW, without decay for vectors and embeddings; Muon for the matrices of the layers if asked for."""
    named = [(name, p) for name, p in objective.named_parameters() if p.requires_grad]
    matrices = [p for name, p in named if p.ndim == 2 and "embed" not in name]
    rest = [p for name, p in named if p.ndim != 2 or "embed" in name]
    groups = [dict(params=rest, weight_decay=0.0)]
    optimizers: list[Optimizer] = []
    if args.muon_lr:
        # match_rms_adamw: updates are of the size of AdamW's, whatever the shape of the matrix.
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


def set_learning_rate(optimizers: list[Optimizer], step: int, args: argparse.Namespace) -> None:
    """Every group's rate for a step: its own peak times the schedule's factor."""
    factor = lr_factor(step, args)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
