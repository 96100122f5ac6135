"""What the benchmark programs share: random checkpoints, a clock, the machine's limits, processes, tables."""

import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from itertools import accumulate
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from model import PaliGemma
from model.config import VARIANTS, PaliGemmaConfig
from model.decoding.closed_set import ClosedSet
from model.decoding.layouts import has_fbgemm, multiply_int8, pack_int8
from model.io.tokenizer import Tokenizer
from model.io.weights import load_config, save_weights

# "<bos>detect all classes\n" and the rest of the grammar in the official vocabulary: random checkpoints have
# no tokenizer.
OFFICIAL_IDS = dict(prompt=(2, 8557, 832, 7695, 108), loc0=256_000, class0=7, eos=1)

# ---- checkpoints -------------------------------------------------------------------------------------------


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


def language_of(folder: Path) -> ClosedSet:
    """The closed-set language of a checkpoint; of a random one, which has no tokenizer, by OFFICIAL_IDS."""
    config = load_config(folder)
    if (folder / "tokenizer.model").exists():
        return ClosedSet.of(config, Tokenizer(folder))
    return ClosedSet(**OFFICIAL_IDS, classes=config.classes, groups=config.groups)


def weights_read(config: PaliGemmaConfig) -> tuple[int, int]:
    """What a token reads: the numbers of weights of the decoder's layers, and of the whole tied head."""
    with torch.device("meta"):
        decoder = PaliGemma(config).decoder
    return sum(p.numel() for p in decoder.layers.parameters()), decoder.embed.weight.numel()


def prefill_flops(config: PaliGemmaConfig, prompt: int, vision: bool = True) -> int:
    """Floating-point operations that reading an image and `prompt` tokens needs: 2 per weight and token. Of
    the last layer only keys and values count, as one position is read; attention scores are left out."""
    with torch.device("meta"):
        model = PaliGemma(config)
    *layers, last = ([p.numel() for p in layer.parameters()] for layer in model.decoder.layers)
    attention = model.decoder.layers[-1].attn
    read = sum(map(sum, layers)) + attention.k_proj.weight.numel() + attention.v_proj.weight.numel()
    seen = sum(p.numel() for p in model.vision.parameters()) if vision else 0
    return 2 * (read * (config.vision.tokens + prompt) + seen * config.vision.tokens)


# ---- the clock and the machine -----------------------------------------------------------------------------


def now(device: str) -> float:
    """The clock's seconds. A call that uses a GPU returns when its work is queued, so wait for that."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    return time.perf_counter()


def seconds(function: Callable[[], object], device: str) -> float:
    """How long a call takes."""
    start = now(device)
    function()
    return now(device) - start


def read_bandwidth(device: str) -> float:
    """Bytes a second, read as a decoding step reads its weights: a float32 matrix too large for any cache,
    times a vector. The best of seven."""
    rows = 1 << (15 if device.startswith("cuda") else 13)
    matrix, vector = torch.ones(rows, 1 << 13, device=device), torch.ones(1 << 13, device=device)
    return 4 * matrix.numel() / min(seconds(lambda: matrix @ vector, device) for _ in range(7))


def gemm_rates(device: str, longest: float) -> dict[str, float]:
    """{dtype of the weights: the best rate of a product of square matrices, in operations a second}. longest:
    sizes grow until a product takes this many seconds.

    A product counts for narrower weights too if it is computed in a wider dtype: without instructions for
    bfloat16, a CPU multiplies far faster in float32.
    """
    rate = partial(_best_rate, device, longest)
    found = {"float32": [rate(torch.float32, F.linear)], "bfloat16": [rate(torch.bfloat16, F.linear)]}
    if device == "cpu" and has_fbgemm():
        half, pack_half = torch.ops.quantized.linear_dynamic_fp16, torch.ops.quantized.linear_prepack_fp16
        found["bfloat16"].append(rate(torch.float32, half, lambda weight: pack_half(weight, None)))
        int8 = lambda x, packed: multiply_int8(x, 64, packed)  # noqa: E731
        found["int8"] = [rate(torch.float32, int8, lambda weight: pack_int8(weight.to(torch.int8)))]
    else:
        found["int8"] = [rate(torch.int8, torch._int_mm, Tensor.t)]
    best = accumulate((max(rates) for rates in found.values()), max)  # from the widest dtype to the narrowest
    return dict(zip(found, best))


def _best_rate(
    device: str, longest: float, dtype: torch.dtype, product: Callable, pack: Callable = lambda weight: weight
) -> float:
    rates, took, size = [], 0.0, 256
    while not rates or (took < longest and size <= 1 << 13):
        x, weight = (torch.ones(size, size, device=device).to(dtype) for _ in range(2))
        weight = pack(weight)
        took = min(seconds(partial(product, x, weight), device) for _ in range(3))
        rates.append(2 * size**3 / took)
        size *= 2
    return max(rates)


# ---- processes and tables ----------------------------------------------------------------------------------


def run_child(program: str, *options, limit: float | None = None) -> list[dict]:
    """The lines of JSON that a program prints, run in a process of its own.

    Peak memory needs this, as it is the highest of a process's whole life. limit: seconds after which the
    process is killed; the lines that it has printed by then are returned.
    """
    try:
        command = [sys.executable, program, *map(str, options)]
        done = subprocess.run(command, stdout=subprocess.PIPE, timeout=limit)
        status, out = done.returncode, done.stdout
    except subprocess.TimeoutExpired as killed:
        status, out = 0, killed.stdout or b""
    if status:
        raise ChildProcessError(f"{options[-1]}: exit code {status} (-9: killed, out of memory)")
    return [json.loads(line) for line in out.splitlines(keepends=True) if line[:1] + line[-2:] == b"{}\n"]


def installed(package: str) -> bool:
    try:
        return bool(version(package))
    except PackageNotFoundError:
        return False


def print_table(rows: list[dict[str, str]], left: tuple[str, ...] = ()) -> None:
    """Print rows of cells, {column: text}. The first column and those in `left` are aligned to the left, the
    others to the right."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    table = [columns, *([row.get(name, "") for name in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*table)]
    for row in table:
        aligned = [
            cell.ljust(width) if name in (columns[0], *left) else cell.rjust(width)
            for name, cell, width in zip(columns, row, widths)
        ]
        print("  ".join(aligned).rstrip())
