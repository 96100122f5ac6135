"""Files that a model must not be made from: each is refused in one line that names what is wrong in it.

Weights that are no numbers, other dtypes, sizes that no memory holds, and JSON of other types than expected.
"""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from helpers import complaint, edit_json, load
from safetensors.torch import load_file, save_file

from model.config import VisionConfig
from model.decoding.masks import MaskCodec
from model.io.adapter import DETECTION
from model.io.hub import CODEC, NANO, replacement
from model.io.tensors import LARGEST, bound, check_bounds, largest
from model.io.weights import load_config
from model.io.writing import MAX_JSON_BYTES, read_json

EMBED = "language_model.model.embed_tokens.weight"
BIAS = "vision_tower.vision_model.encoder.layers.0.mlp.fc1.bias"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def checkpoint(model, tmp_path):
    """A copy that may be damaged."""
    return shutil.copytree(model, tmp_path / "checkpoint")


def edit_tensors(file, change) -> None:
    """Rewrite a safetensors file after change(tensors)."""
    tensors = load_file(file)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)


def put(file, section, key, value) -> None:
    """Set a value in a section of a JSON file."""
    edit_json(file, lambda raw: raw[section].update({key: value}))


# Numbers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_largest(dtype):
    """The greatest magnitude, whatever its sign and place; NaN and infinity are above all."""
    numbers = torch.randn(600_001, dtype=dtype)
    assert largest(numbers) == numbers.abs().max()
    assert largest(numbers[:0]) == 0 and largest(numbers[0]) == numbers[0].abs()
    for place, value in ((0, -9.0), (600_000, 9.5), (300_000, -torch.inf), (5, torch.nan)):
        numbers[place] = value
        assert str(largest(numbers).item()) == str(abs(value))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(), (7,), (0,), (0, 3), (40, 50), (8, 3, 4, 4)])
def test_bound(shape, dtype):
    """No magnitude is above it, it is not far above all of them, and what is no number shows."""
    numbers = torch.randn(shape, dtype=dtype)
    top, length = largest(numbers).item(), shape[-1] if shape else 1
    assert top * 0.99 <= bound(numbers) <= 1.01 * top * length**0.5
    for value in (-2.0 * LARGEST, 1e30, -torch.inf, torch.nan) if numbers.numel() else ():
        numbers.view(-1)[numbers.numel() // 2] = value
        assert not bound(numbers) <= LARGEST


def test_long_rows_of_small_numbers():
    """They are looked at again, and pass."""
    tensors = {"a": torch.full((2, 10_000), 60_000.0)}
    assert bound(tensors["a"]) > LARGEST
    check_bounds({"a": bound(tensors["a"])}, tensors, Path("here"))
    tensors["a"][1, 2] = -70_000
    message = complaint(check_bounds, {"a": bound(tensors["a"])}, tensors, Path("here"))
    assert "a (70000)" in message and "here" in message


@pytest.mark.parametrize("value", [math.nan, -math.inf, 1e30, -1e30])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_weights_that_are_no_numbers(value, dtype, checkpoint):
    """One such number among all is found, whatever dtype it is stored and loaded in."""

    def spoil(tensors):
        tensors |= {name: tensor.to(dtype) for name, tensor in tensors.items()}
        tensors[EMBED][-1, -1] = value
        tensors[BIAS][0] = value

    edit_tensors(checkpoint / "model.safetensors", spoil)
    for wanted in (torch.float32, torch.bfloat16):
        message = complaint(load, checkpoint, dtype=wanted)
        assert EMBED in message and BIAS in message and str(checkpoint) in message
        assert message.count("language_model") == 1 and "\n" not in message


def test_largest_weights_that_are_accepted(checkpoint):
    """A number just within the limit is a weight like any other."""
    edit_tensors(checkpoint / "model.safetensors", lambda tensors: tensors[BIAS].fill_(LARGEST))
    assert load(checkpoint).vision.layers[0].mlp.fc1.bias[0] == LARGEST


def test_many_bad_tensors(checkpoint):
    """The first few are named, the others counted."""
    edit_tensors(checkpoint / "model.safetensors", lambda ts: [t.fill_(math.nan) for t in ts.values()])
    message = complaint(load, checkpoint)
    assert message.count("weight") < 10 and "more" in message


@pytest.mark.parametrize("value", [math.nan, math.inf, -1e30])
def test_adapters_and_codecs_that_are_no_numbers(value, model, adapter, tmp_path):
    def spoil(tensors):
        name, tensor = sorted(tensors.items())[-1]
        tensor.view(-1)[-1] = value
        spoiled.append(name)

    spoiled = []
    edit_tensors(adapter / "adapter_model.safetensors", spoil)
    message = complaint(load, model, adapter)
    assert spoiled[-1] in message and "adapter_model.safetensors" in message
    shutil.copy(NANO / CODEC, tmp_path)
    edit_tensors(tmp_path / CODEC, spoil)
    message = complaint(MaskCodec.load, tmp_path / CODEC)
    assert spoiled[-1] in message and CODEC in message


OTHERS = "int8 uint8 int32 int64 bool float64 float8_e4m3fn complex64".split()


@pytest.mark.parametrize("dtype", [getattr(torch, name) for name in OTHERS], ids=OTHERS)
def test_other_dtypes(dtype, checkpoint, model, adapter, tmp_path):
    """Neither integers nor anything else is cast to weights."""
    files = checkpoint / "model.safetensors", adapter / "adapter_model.safetensors", tmp_path / CODEC
    shutil.copy(NANO / CODEC, tmp_path)
    names = []
    for file in files:

        def cast(tensors):
            name = sorted(tensors)[0]
            tensors[name] = tensors[name].to(dtype)
            names.append(name)

        edit_tensors(file, cast)
    calls = (load, checkpoint), (load, model, adapter), (MaskCodec.load, files[2])
    for (function, *arguments), file, name in zip(calls, files, names, strict=True):
        message = complaint(function, *arguments)
        assert name in message and file.name in message and "BF16, F16, F32" in message


def test_float16_is_read(checkpoint):
    file = checkpoint / "model.safetensors"
    edit_tensors(file, lambda tensors: tensors.update({name: t.half() for name, t in tensors.items()}))
    assert load(checkpoint, dtype=torch.bfloat16).decoder.embed.weight.dtype == torch.bfloat16


# Sizes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("section", "key"),
    [
        ("text_config", "num_hidden_layers"),
        ("text_config", "hidden_size"),
        ("text_config", "intermediate_size"),
        ("text_config", "head_dim"),
        ("text_config", "vocab_size"),
        ("text_config", "max_position_embeddings"),
        ("text_config", "sliding_window"),
        ("text_config", "rope_theta"),
        ("text_config", "query_pre_attn_scalar"),
        ("text_config", "attn_logit_softcapping"),
        ("text_config", "rms_norm_eps"),
        ("vision_config", "num_hidden_layers"),
        ("vision_config", "hidden_size"),
        ("vision_config", "intermediate_size"),
        ("vision_config", "image_size"),
        ("vision_config", "num_channels"),
        ("vision_config", "layer_norm_eps"),
        ("detection", "groups"),
    ],
)
def test_sizes_that_no_memory_holds(section, key, checkpoint):
    """Refused by the config, before a tensor is made or a file of weights is opened."""
    (checkpoint / "model.safetensors").unlink()
    for value in (2**70, 10**400, 10**13, math.inf):
        put(checkpoint / "config.json", section, key, value)
        message = complaint(load, checkpoint)
        assert "config.json" in message and len(message) < 500 and "no *.safetensors" not in message
    if "num" in key or key == "groups":
        put(checkpoint / "config.json", section, key, 10**5)
        assert "= 100000" in complaint(load, checkpoint)


def test_too_many_patches():
    assert "patches" in complaint(VisionConfig, image_size=4096, patch_size=1)


@pytest.mark.parametrize("text", ["[" * 100_000 + "]" * 100_000, '{"a":' * 100_000 + "1" + "}" * 100_000])
def test_nested_json(text, checkpoint, model, adapter):
    for file, arguments in (
        (checkpoint / "config.json", [checkpoint]),
        (adapter / DETECTION, [model, adapter]),
        (adapter / "adapter_config.json", [model, adapter]),
    ):
        good = file.read_text()
        file.write_text(text)
        assert str(file) in complaint(load, *arguments)
        file.write_text(good)


def test_json_of_gigabytes(tmp_path):
    """A file of zeros takes no room on the disk, but would in memory."""
    with open(tmp_path / "config.json", "wb") as file:
        file.truncate(1 << 40)
    assert f"{MAX_JSON_BYTES:,}" in complaint(read_json, tmp_path / "config.json")


def test_a_folder_instead_of_a_file(checkpoint):
    for name in ("model.safetensors", "config.json"):
        (checkpoint / name).unlink()
        (checkpoint / name).mkdir()
        assert name in complaint(load, checkpoint)


# Types ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value", [None, 3, "model.safetensors", [], [1], {"a": 1}, {"a": ["b"]}, {"a": None}]
)
def test_weight_map(value, checkpoint):
    (checkpoint / "model.safetensors").rename(checkpoint / "model-1.safetensors")
    (checkpoint / INDEX).write_text(json.dumps({"weight_map": value}))
    assert INDEX in complaint(load, checkpoint)


WRONG = [None, True, -1, 2**70, 1.5, "x", [], {}, [1], {"a": 1}, math.nan, math.inf]


@pytest.mark.parametrize(
    ("section", "key", "values"),
    [
        ("vision_config", "layer_norm_eps", [*WRONG[:2], *WRONG[5:]]),
        ("text_config", "rms_norm_eps", [*WRONG[:2], *WRONG[5:]]),
        ("text_config", "attn_logit_softcapping", [True, -1, "x", [], {}, [1], math.nan]),
        ("text_config", "final_logit_softcapping", [True, -1, "x", [], {}, [1], math.nan]),
        ("text_config", "sliding_window", [True, -1, "x", [], {}, [1], 1.5]),
        ("text_config", "rope_parameters", [True, 3, "x", [1]]),
        ("text_config", "layer_types", [True, 3, "x", {"a": 1}]),
        ("text_config", "hidden_activation", [[1], {"a": 1}, "x"]),
        ("vision_config", "hidden_act", [[], {}, "x"]),
        (
            "detection",
            "classes",
            ["abc", [1], {}, {"a": 1}, None, ["cat", ""], [" "], ["cat", "cat"], [["a"]]],
        ),
        ("detection", "groups", [*WRONG]),
        ("detection", "answers", [*WRONG]),
        ("detection", "branches", [*WRONG, 0, 1001, True, 2.5]),
    ],
)
def test_values_of_config_json(section, key, values, checkpoint):
    for value in values:
        put(checkpoint / "config.json", section, key, value)
        assert "config.json" in complaint(load_config, checkpoint)


# What to do about it ----------------------------------------------------------------------------------------


def test_damaged_files_in_the_hub_cache(tmp_path):
    """The file's bytes are named, not the link to them, which the next run would make again."""
    repo = tmp_path / "models--google--paligemma"
    blob, link = repo / "blobs" / "abc", repo / "snapshots" / "123" / "model.safetensors"
    for folder in (blob.parent, link.parent):
        folder.mkdir(parents=True)
    blob.write_bytes(b"no tensors")
    link.symlink_to(blob)
    shutil.copy(NANO / "config.json", link.parent)
    assert f"delete {blob}" in complaint(load, link.parent)
    assert replacement(link.parent) == f"; delete {repo}, and it is downloaded again"
    assert replacement(tmp_path / "config.json") == ""
