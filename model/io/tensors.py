"""Tensors of safetensors files, and what is refused: other dtypes, and numbers that no training leaves.

Nothing later would complain: integers would be taken for weights, and a single NaN would become an answer in
which nothing is found.
"""

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from model.io.hub import replacement
from model.io.writing import explain

READABLE = ("BF16", "F16", "F32")  # dtypes that weights are read from, as safetensors spells them
LARGEST = 1 << 16  # float16, in which checkpoints are published too, ends just below; weights are below 1,000
FINITE = torch.finfo(torch.float32).max  # the limit for what may be any number: an optimizer's state
_PIECE = 1 << 18  # numbers compared at a time on a CPU: they stay in its cache between two operations
AGAIN = "; download it again"
_NAMED = 5  # tensors in a complaint; a damaged file may hold hundreds


def open_tensors(file: Path) -> safe_open:
    """A safetensors file. Only its header is read; `get_tensor` maps a tensor, all of them in READABLE."""
    what = f"{file} cannot be read as safetensors{replacement(file, AGAIN)}"
    if not file.is_file():
        raise ValueError(f"{file} is missing, or is no file")
    with explain(what, OSError, SafetensorError):
        opened = safe_open(file, framework="pt")
        kinds = {name: opened.get_slice(name).get_dtype() for name in opened.keys()}  # noqa: SIM118
    if wrong := [f"{name} ({kind})" for name, kind in kinds.items() if kind not in READABLE]:
        raise ValueError(f"{file}: weights must be {', '.join(READABLE)}, but not {_some(wrong)}")
    return opened


def read_tensors(file: Path, limit: float = LARGEST, remedy: str = AGAIN) -> dict[str, Tensor]:
    """All tensors of a safetensors file. limit, remedy: see check_numbers."""
    opened = open_tensors(file)
    tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - it is no dict
    check_numbers(tensors, file, limit, remedy)
    return tensors


def check_numbers(
    tensors: dict[str, Tensor], source: Path, limit: float = LARGEST, remedy: str = AGAIN
) -> None:
    """Refuse tensors that hold NaN, infinity or numbers above the limit, LARGEST or FINITE.

    remedy: what to do about a file that is not in the hub's cache.
    """
    found = [largest(tensor).float() for tensor in tensors.values()]
    numbers = torch.stack(found).tolist() if found else []  # all are fetched from their device at once
    wrong = [f"{name} ({number:g})" for name, number in zip(tensors, numbers) if not number <= limit]
    if wrong:
        large = "NaN or infinity" if limit == FINITE else f"NaN, infinity or numbers above {limit:,}"
        what = f"{large}, which no training leaves{replacement(source, remedy)}"
        raise ValueError(f"{source} holds {what}: {_some(wrong)}")


def largest(tensor: Tensor) -> Tensor:
    """The greatest magnitude in a float tensor, a number on its device; NaN or infinity if there is one.

    Without their sign, the bits of floats are ordered as the floats are, infinity after all numbers and NaN
    after infinity. Comparing them as integers reads memory once and is several times as fast as abs().max().
    """
    bits, magnitude = (torch.int16, 0x7FFF) if tensor.element_size() == 2 else (torch.int32, 0x7FFFFFFF)
    numbers = tensor.detach().flatten().view(bits)
    pieces = numbers.split(_PIECE if numbers.device.type == "cpu" else max(1, numbers.numel()))
    tops = [(piece & magnitude).amax() for piece in pieces if piece.numel()]
    return (torch.stack(tops).amax() if tops else numbers.new_zeros(())).view(tensor.dtype)


def bound(tensor: Tensor) -> Tensor:
    """A number, on the tensor's device, that no magnitude in it exceeds; NaN or infinity if there is one.

    It is the largest Euclidean norm of a row. That takes at most two thirds of the time of `largest`, and is
    enough for weights: the norms of their rows are far below LARGEST.
    """
    rows = tensor.detach().flatten(0, -2) if tensor.ndim > 1 else tensor.detach().view(1, -1)
    return torch.linalg.vector_norm(rows, dim=-1).amax() if rows.numel() else rows.new_zeros(())


def check_bounds(bounds: dict[str, Tensor], tensors: dict[str, Tensor], source: Path) -> None:
    """check_numbers, given `bound` of every tensor: only tensors that may be too large are read again."""
    bounds = {name: number for name, number in bounds.items() if not number.is_meta}  # those have no numbers
    tops = torch.stack([number.float() for number in bounds.values()]).tolist() if bounds else []
    # Half of the limit, as a norm is rounded to the tensor's own dtype.
    check_numbers({name: tensors[name] for name, top in zip(bounds, tops) if not top < LARGEST / 2}, source)


def _some(names: list[str]) -> str:
    """The first few of many names."""
    shown, more = names[:_NAMED], len(names) - _NAMED
    return ", ".join(shown) + (f" and {more:,} more" if more > 0 else "")
