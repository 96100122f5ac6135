"""What the benchmark programs share: random checkpoints, a clock, processes of their own, tables."""

import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from model import PaliGemma
from model.config import VARIANTS
from model.io.weights import save_weights


@contextlib.contextmanager
def random_checkpoint(variant: str, folder: Path | None) -> Iterator[Path]:
    """A folder with a random checkpoint of an official size, so that no hub is asked. folder: None for a
    temporary one; else it is built there, or found there and used again."""
    with tempfile.TemporaryDirectory(prefix="paligemma-") as temporary:
        folder = folder or Path(temporary)
        if not (folder / "config.json").exists():
            folder.mkdir(parents=True, exist_ok=True)
            build_checkpoint(variant, folder)
        yield folder


def build_checkpoint(variant: str, folder: Path) -> None:
    """Write random weights in bfloat16: activations of about 1, attention scores and logits of about +-4."""
    with torch.device("meta"):
        model = PaliGemma(VARIANTS[variant]).to(torch.bfloat16)
    generator, state = torch.Generator().manual_seed(0), {}
    for name, weight in model.state_dict().items():
        noise = torch.empty(weight.shape, dtype=torch.bfloat16).normal_(generator=generator)
        centre, size = 0.0, weight[0].numel() ** -0.5
        if "norm" in name or name.endswith("bias"):
            # SigLIP's norms multiply by their weight, Gemma's by 1 + weight.
            scales = "norm" in name and name.startswith("vision") and name.endswith("weight")
            centre, size = float(scales), 0.1
        if name == "decoder.norm.weight":
            centre, size = 7.0, 0.3
        elif "q_proj.weight" in name or "k_proj.weight" in name:
            size *= 2
        elif name == "decoder.embed.weight":
            size /= 2  # with more, the tied head would only repeat its input
        state[name] = noise.mul_(size).add_(centre)
    save_weights(model, folder, torch.bfloat16, state=state)


def seconds(function: Callable[[], object], device: str) -> float:
    """How long a call takes."""
    # A call that uses a GPU returns when its work is queued: wait for what was queued before, and for this.
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    function()
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def run_child(program: str, *options) -> dict:
    """What a program prints as JSON on its last line, run in a process of its own.

    Peak memory needs this, as it is the highest of a process so far, whatever it did before.
    """
    done = subprocess.run([sys.executable, program, *map(str, options)], stdout=subprocess.PIPE)
    if done.returncode:
        raise ChildProcessError(f"{options[-1]}: exit code {done.returncode} (-9: killed, out of memory)")
    return json.loads(done.stdout.splitlines()[-1])


def installed(package: str) -> bool:
    try:
        return bool(version(package))
    except PackageNotFoundError:
        return False


def print_table(rows: list[dict[str, str]], left: tuple[str, ...] = ()) -> None:
    """Rows of texts by column, aligned: the first column and those of `left` to the left, others to the
    right."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    table = [columns, *([row.get(name, "") for name in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*table)]
    for row in table:
        aligned = [
            cell.ljust(width) if name in (columns[0], *left) else cell.rjust(width)
            for name, cell, width in zip(columns, row, widths)
        ]
        print("  ".join(aligned).rstrip())
