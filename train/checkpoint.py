"""Training state on disk: safetensors and JSON only, complete or not there at all.

A checkpoint is a folder OUT/step-000500 that holds an ordinary PaliGemma checkpoint in float32 (so every
program can load it) and `optimizer.safetensors`, `trainer.json` beside it.
"""

import os
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim import Optimizer

from model import PaliGemma
from model.weights import read_json, write_json


def _names(optimizer: Optimizer, trained: nn.Module) -> list[str]:
    """The names of an optimizer's parameters, in its own order."""
    names = {parameter: name for name, parameter in trained.named_parameters()}
    return [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]


def _flat_state(optimizers: list[Optimizer], trained: nn.Module) -> dict[str, torch.Tensor]:
    """{"parameter name/state name": tensor} of all optimizers."""
    flat = {}
    for optimizer in optimizers:
        names = _names(optimizer, trained)
        for index, state in optimizer.state_dict()["state"].items():
            flat |= {f"{names[index]}/{key}": torch.as_tensor(value) for key, value in state.items()}
    return flat


def save_checkpoint(
    out: Path,
    step: int,
    model: PaliGemma,
    trained: nn.Module,
    optimizers: list[Optimizer],
    tokenizer: bytes,
    keep: int,
) -> None:
    """Write OUT/step-..., then delete all but the newest `keep`. trained: all that is optimized."""
    final, partial = out / f"step-{step:07d}", out / f".step-{step:07d}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    model.save_pretrained(partial, torch.float32)
    (partial / "tokenizer.model").write_bytes(tokenizer)
    own = set(model.parameters())
    extra = {f"module/{name}": p.detach() for name, p in trained.named_parameters() if p not in own}
    save_file({**_flat_state(optimizers, trained), **extra}, partial / "optimizer.safetensors")
    write_json({"step": step}, partial / "trainer.json")
    for file in partial.iterdir():
        with open(file, "rb") as handle:
            os.fsync(handle.fileno())
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)
    for old in sorted(out.glob("step-*"))[:-keep]:
        shutil.rmtree(old)


def newest(out: Path) -> Path | None:
    """The newest checkpoint of a run, or None."""
    return max(out.glob("step-*"), default=None)


def load_trainer_state(folder: Path, trained: nn.Module, optimizers: list[Optimizer]) -> int:
    """Restore optimizers and the parameters that are not the model's; returns the steps done."""
    stored = load_file(folder / "optimizer.safetensors")
    for name, parameter in trained.named_parameters():
        if f"module/{name}" in stored:
            parameter.data.copy_(stored.pop(f"module/{name}"))
    for optimizer in optimizers:
        state = {}
        for index, name in enumerate(_names(optimizer, trained)):
            keys = [key for key in stored if key.rpartition("/")[0] == name]
            state[index] = {key.rpartition("/")[2]: stored[key] for key in keys}
        optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
    return read_json(folder / "trainer.json")["step"]
