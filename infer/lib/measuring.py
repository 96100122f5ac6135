"""Checkpoints of the official sizes with random weights, for benchmarks: no hub is asked."""

from pathlib import Path

import torch

from model import PaliGemma
from model.config import VARIANTS


def build(variant: str, folder: Path) -> None:
    """Write a random checkpoint of an official size: activations of about 1, norms near the identity."""
    with torch.device("meta"):
        model = PaliGemma(VARIANTS[variant]).to(torch.bfloat16)
    generator, state = torch.Generator().manual_seed(0), {}
    for name, weight in model.state_dict().items():
        noise = torch.empty(weight.shape, dtype=torch.bfloat16).normal_(generator=generator)
        centre = 1.0 if "norm" in name and name.startswith("vision") and name.endswith("weight") else 0.0
        size = 0.1 if "norm" in name or name.endswith("bias") else weight[0].numel() ** -0.5
        state[name] = noise.mul_(size).add_(centre)
    model.save_pretrained(folder, torch.bfloat16, state=state)
