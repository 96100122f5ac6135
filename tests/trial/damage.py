"""Damage done at random to files of any kind: bytes, tensors of safetensors files, values in JSON.

Each function changes a file, and returns what it did and whether that must be "refused" or may be "either".
"""

import copy
import json
import math
import os
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

VALUES = (
    None,
    True,
    False,
    0,
    -1,
    1,
    3,
    2**31,
    2**63,
    2**70,
    1.5,
    1e30,
    math.nan,
    math.inf,
    -math.inf,
    "",
    "x",
)
VALUES += ([], {}, [1], ["a"], [[]], [None], {"a": 1}, "../../etc/passwd", "\x1b[2J\n", "\ud800", "9" * 5000)
NOT_NUMBERS = (math.nan, math.inf, -math.inf, 1e30, -1e30)
DTYPES = (torch.int8, torch.uint8, torch.int32, torch.int64, torch.bool, torch.float64, torch.float8_e4m3fn)


def damage_bytes(rng: np.random.Generator, file: Path, header: int = 400) -> tuple[str, str]:
    """Flips, a cut, more bytes, other content, or no regular file. header: bytes that are hit more often."""
    whole = file.read_bytes()
    way = str(
        rng.choice(
            ["flip", "flip header", "cut", "longer", "other", "no file"], p=[0.2, 0.4, 0.1, 0.1, 0.1, 0.1]
        )
    )
    if way.startswith("flip"):
        damaged = bytearray(whole)
        reach = min(header, len(whole)) if "header" in way else len(whole)
        for at in rng.integers(0, reach, int(rng.integers(1, 5))):
            damaged[at] ^= int(rng.integers(1, 256))
        file.write_bytes(damaged)
        return f"{file.name}, {way}", "either"
    if way == "cut":
        length = int(rng.integers(len(whole)))
        file.write_bytes(whole[:length])
        return f"{file.name}, {length} of {len(whole)} bytes", "either"
    if way == "longer":
        file.write_bytes(whole + rng.bytes(int(rng.integers(1, 999))))
        return f"{file.name} and more bytes", "either"
    if way == "other":
        contents = [
            b"",
            bytes(8),
            bytes(9999),
            b"\xff" * 99,
            rng.bytes(500),
            b"<html></html>",
            b"[" * 100_000,
        ]
        contents += [
            (2**62).to_bytes(8, "little") + whole[8:],
            (2).to_bytes(8, "little") + b"{}",
            b"version https",
        ]
        content = contents[rng.integers(len(contents))]
        file.write_bytes(content)
        return f"{file.name} is {content[:20]}", "either"
    file.unlink()
    kind = ("missing", "folder", "FIFO", "loop of links", "/dev/zero", "1 TB")[rng.integers(6)]
    if kind == "folder":
        file.mkdir()
    elif kind == "FIFO":
        os.mkfifo(file)
    elif kind == "1 TB":
        file.touch()
        os.truncate(file, 1 << 40)
    elif kind != "missing":
        file.symlink_to(file.name if kind == "loop of links" else kind)
    return f"{file.name}: {kind}", "refused"


def damage_tensors(rng: np.random.Generator, file: Path) -> tuple[str, str]:
    """One tensor of a safetensors file is no number, of another dtype or shape, missing, or one too many."""
    tensors = load_file(file)
    name = sorted(tensors)[rng.integers(len(tensors))]
    tensor, must = tensors[name], "refused"
    way = str(
        rng.choice(
            ["number", "dtype", "shape", "missing", "extra", "large"], p=[0.4, 0.2, 0.1, 0.1, 0.1, 0.1]
        )
    )
    if way == "number":
        value = NOT_NUMBERS[rng.integers(len(NOT_NUMBERS))]
        tensor.view(-1)[rng.integers(tensor.numel())] = value
        way = f"{value} in {name}"
    elif way == "dtype":
        dtype = DTYPES[rng.integers(len(DTYPES))]
        tensors[name] = tensor.to(dtype)
        way = f"{name} is {dtype}"
    elif way == "shape":
        tensors[name] = torch.cat((tensor, tensor)) if rng.integers(2) else tensor[None]
        way = f"{name} of shape {list(tensors[name].shape)}"
    elif way == "missing":
        del tensors[name]
        way = f"no {name}"
    elif way == "extra":
        tensors[f"{name}.more"] = tensor.clone()
        way = f"{name}.more"
    else:  # large, but numbers: what comes out may be none
        tensors[name] = (tensor.float().clamp(-1, 1) * 30_000).to(tensor.dtype)
        way, must = f"{name} times 30,000", "either"
    save_file({key: value.contiguous() for key, value in tensors.items()}, file)
    return f"{file.name}: {way}", must


def places(value, path: tuple = ()) -> list[tuple]:
    """The paths of all values in a JSON document but itself."""
    found = [path] if path else []
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return found + [place for key, part in pairs for place in places(part, (*path, key))]


def damage_value(rng: np.random.Generator, document) -> tuple[object, str]:
    """A copy of a JSON document with one value changed, taken away or doubled."""
    document = copy.deepcopy(document)
    *way, last = path = places(document)[rng.integers(len(places(document)))]
    holder = document
    for key in way:
        holder = holder[key]
    if rng.random() < 0.15:
        del holder[last]
        return document, f"without {path}"
    if isinstance(holder, list) and rng.random() < 0.15:
        holder.append(copy.deepcopy(holder[last]))
        return document, f"{path} twice"
    value = VALUES[rng.integers(len(VALUES))]
    holder[last] = value
    return document, f"{path} = {value!a:.40}"


def damage_json(rng: np.random.Generator, file: Path) -> tuple[str, str]:
    """Values of a JSON file."""
    document, what = damage_value(rng, json.loads(file.read_text()))
    file.write_text(json.dumps(document))
    return f"{file.name}: {what}", "either"
