"""Training state on disk: safetensors and JSON only, complete or absent.

A checkpoint is a folder OUT/step-0000500 that holds a PaliGemma checkpoint as every program loads it (or, of
a LoRA run, the adapter), and beside it `optimizer.safetensors` and `trainer.json`. There is no state of
random generators or data: each step derives its own from the seed and its number.
"""

import contextlib
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from model import PaliGemma
from model.io.adapter import adapter_tensors, save_adapter
from model.io.hub import COMPANION_FILES
from model.io.tensors import FINITE, read_tensors
from model.io.weights import as_shard, own_rows, save_weights
from model.io.writing import named, read_json, replace_folder, save_tensors, write_json
from model.lora import lora_layers
from train.run.processes import is_first


def whole(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors on the CPU of the first process, {} on the others. All processes must call it together: sharded
    tensors are put together one after the other, so a GPU never holds more than one whole tensor."""
    found = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach()
        tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if is_first():
            found[name] = tensor.cpu()
    return found


def _names(optimizer: Optimizer, trained: nn.Module) -> list[str]:
    """The names of an optimizer's parameters, in its own order."""
    names = {parameter: name for name, parameter in trained.named_parameters()}
    return [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]


def _flat_state(optimizers: list[Optimizer], trained: nn.Module) -> dict[str, Tensor]:
    """{"parameter name/state name": tensor} of all optimizers, sharded as they are."""
    flat = {}
    for optimizer in optimizers:
        names = _names(optimizer, trained)
        for index, state in optimizer.state_dict()["state"].items():
            flat |= {f"{names[index]}/{key}": torch.as_tensor(value) for key, value in state.items()}
    return flat


@dataclass(frozen=True)
class Run:
    """Where a run writes its checkpoints, and what every one of them needs besides what was trained."""

    out: Path
    base: str  # what an adapter belongs to, a folder or a hub id
    companions: dict[str, bytes]  # tokenizer and codec: read at once, as their folder may be deleted later
    keep: int  # checkpoints

    @classmethod
    def of(cls, out: Path, base: str, files: Path, keep: int) -> "Run":
        """files: the folder whose tokenizer and codec travel with the run."""
        found = (files / name for name in COMPANION_FILES)
        return cls(out, base, {file.name: file.read_bytes() for file in found if file.is_file()}, keep)


def save_model(model: PaliGemma, folder: Path, run: Run, dtype: torch.dtype | None = None) -> None:
    """Write what was trained: the adapter if there is one, or else all weights and the files that travel with
    them. Every process calls it; only the first writes."""
    if lora_layers(model):
        tensors = whole(adapter_tensors(model))
        if is_first():
            save_adapter(model, folder, run.base, tensors)
        return
    state = whole(model.state_dict())
    if is_first():
        save_weights(model, folder, dtype, state=state)
        for name, content in run.companions.items():
            with named(folder / name):
                (folder / name).write_bytes(content)


@contextlib.contextmanager
def replacing(final: Path) -> Iterator[Path]:
    """A folder for the first process to write to, which takes its name when everything is on the disk."""
    partial = final.with_name(f".{final.name}.partial")
    try:
        if is_first():
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        yield partial
        if is_first():
            for file in partial.iterdir():  # on the disk before the name says that it is complete
                with named(file), open(file, "rb") as handle:
                    os.fsync(handle.fileno())
            replace_folder(partial, final)
    finally:
        if is_first():
            shutil.rmtree(partial, ignore_errors=True)


def save_checkpoint(
    run: Run, trainer: dict, model: PaliGemma, trained: nn.Module, optimizers: list[Optimizer]
) -> None:
    """Write OUT/step-..., then delete all but the newest checkpoints.

    trainer: "step", and what is known of validations (train/run/best.py); trained: all that is optimized. A
    full disk is an OSError that leaves the older checkpoints intact.
    """
    own = set(model.parameters())
    extra = {f"module/{name}": p for name, p in trained.named_parameters() if p not in own}
    with replacing(run.out / f"step-{trainer['step']:07d}") as folder:
        save_model(model, folder, run)
        state = whole(_flat_state(optimizers, trained) | extra)  # once the weights are written, and let go
        if is_first():
            save_tensors(state, folder / "optimizer.safetensors")
            write_json(trainer, folder / "trainer.json")
    if is_first():
        for old in checkpoints(run.out)[: -run.keep]:
            shutil.rmtree(old)


class Saver(contextlib.AbstractContextManager):
    """Saves the checkpoints of a run; in a `with` statement also when an error ends the run.

    save: writes one (save_checkpoint). options: what run.json holds. sharded: all processes must save
    together, which they cannot after an error of one of them.
    """

    def __init__(self, save: Callable[[], None], run: Run, trainer: dict, options: dict, sharded: bool):
        self._save, self.run, self.trainer = save, run, trainer
        self.options, self.sharded = options, sharded
        self.saved = trainer["step"]  # the last step on the disk; step 0 need not be there
        self.whole = True  # the weights are those after trainer["step"], and saving them has not failed

    def save(self) -> None:
        """Write OUT/step-..., or if it is there, what has become known about it since."""
        self.whole = False
        if is_first() and not (self.run.out / "run.json").exists():  # removed meanwhile; --resume needs it
            self.run.out.mkdir(parents=True, exist_ok=True)
            write_json(self.options, self.run.out / "run.json")
        step = self.trainer["step"]
        if self.saved != step or step == 0:
            self._save()
        elif is_first():
            write_json(self.trainer, self.run.out / f"step-{step:07d}" / "trainer.json")
        self.saved, self.whole = step, True

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Around the update of the weights that makes a step. After an error in it they are of no step."""
        self.whole = False
        yield
        self.trainer["step"] += 1
        self.whole = True

    def __exit__(self, kind, error, traceback) -> None:
        unsaved = self.whole and self.saved != self.trainer["step"]
        if isinstance(error, Exception) and unsaved and not self.sharded:
            try:
                self.save()
            except (OSError, RuntimeError) as failure:  # the first error is the one to report
                print(f"fit.py: step {self.trainer['step']} is not saved: {failure}", file=sys.stderr)


def checkpoints(out: Path) -> list[Path]:
    """The checkpoints of a run, oldest first. What a person calls step-0000500-good is none, and is kept."""
    folders = [folder for folder in out.glob("step-*") if re.fullmatch("step-[0-9]{7,}", folder.name)]
    return sorted(folders, key=lambda folder: int(folder.name[5:]))


def newest(out: Path) -> Path | None:
    """The newest checkpoint that can be read, or None. A damaged one is skipped with a warning."""
    for folder in reversed(checkpoints(out)):
        try:
            read_json(folder / "trainer.json")
            for file in folder.glob("*.safetensors"):
                with safe_open(file, framework="pt"):  # compares the file's length with what it should hold
                    pass
            return folder
        except (OSError, ValueError, SafetensorError) as error:
            print(f"fit.py: {folder} is damaged ({error}); trying the one before", file=sys.stderr)
    return None


def load_trainer_state(folder: Path, trained: nn.Module, optimizers: list[Optimizer]) -> dict:
    """Restore optimizers and the parameters that are not the model's; returns what trainer.json holds.
    Numbers that are not finite are refused: one step later all weights would be NaN."""
    remedy = f"; remove {folder}, and --resume goes on from the checkpoint before it"
    stored = read_tensors(folder / "optimizer.safetensors", FINITE, remedy)
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            if f"module/{name}" in stored:
                parameter.copy_(_like(parameter, stored.pop(f"module/{name}")))
    parameters = dict(trained.named_parameters())
    for optimizer in optimizers:
        state = {}
        for index, name in enumerate(_names(optimizer, trained)):
            keys = [key for key in stored if key.rpartition("/")[0] == name]
            state[index] = {key.rpartition("/")[2]: _like(parameters[name], stored[key]) for key in keys}
        optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
    return read_json(folder / "trainer.json")


def _like(parameter: Tensor, value: Tensor) -> Tensor:
    """A whole tensor, sharded as the parameter is; single numbers (step counters) stay as they are."""
    if isinstance(parameter, DTensor) and value.shape == parameter.shape:
        return as_shard(own_rows(value, parameter).to(parameter.device), parameter)
    return value
