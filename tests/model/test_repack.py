"""Repacked matrices: oneDNN's layout and int8, their errors, and the models that they make."""

import copy

import pytest
import torch
from reference import random_inputs, save, tiny_paligemma
from torch import nn

from model import PaliGemma
from model.decoding import packing
from model.decoding.packing import (
    INT8_MATMUL_ROWS,
    Int8Linear,
    PackedLinear,
    can_pack,
    load_for_decoding,
    pack,
    quantize,
)
from model.io.adapter import save_adapter
from model.lora import TARGETS, add_lora, lora_layers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, INT8_MATMUL_ROWS, INT8_MATMUL_ROWS + 1, 40])
def test_linear(rows, dtype):
    """Within the rounding of a weight to 1/254 of its row's largest, whatever the number of rows."""
    linear = nn.Linear(96, 160, bias=False).to(dtype)
    shape = (2, rows, 96) if rows > INT8_MATMUL_ROWS else (rows, 96)
    x = torch.randn(shape).to(dtype)
    exact, found = x.float() @ linear.weight.float().T, Int8Linear(linear)(x).float()
    step = linear.weight.float().abs().amax(-1) / 127
    bound = x.float().abs().sum(-1, keepdim=True) * step * 0.5
    slack = 1e-5 if dtype == torch.float32 else 0.02 * exact.abs().max() + bound  # of bfloat16 itself
    assert found.shape == exact.shape and ((found - exact).abs() <= bound + slack).all()
    assert (found - exact).abs().max() > 0


def test_weights_that_fit_are_exact():
    """Multiples of the scale come back as they were; a row of zeros too."""
    linear = nn.Linear(64, 32, bias=False)
    whole = torch.randint(-127, 128, (32, 64)).float()
    whole[:, 0], whole[5] = 127, 0
    linear.weight = nn.Parameter(whole * 0.25)
    x = torch.randn(3, 64)
    assert torch.allclose(Int8Linear(linear)(x), linear(x), atol=1e-4)


def test_model(tmp_path):
    """Nearly the same distributions, in one byte a weight; logits of a forward and of steps agree."""
    exact = PaliGemma.from_pretrained(str(save(tiny_paligemma(0), tmp_path)), dtype=torch.float32)
    small = copy.deepcopy(exact)
    quantize(small)
    layer = small.decoder.layers[0].mlp.up_proj
    assert layer.weight.dtype == torch.int8 and not list(layer.parameters())
    images, tokens = random_inputs(tiny_paligemma(0), batch=1, length=6)
    p, q = (model(images, tokens, 6).log_softmax(-1) for model in (exact, small))
    kl = (p.exp() * (p - q)).sum(-1)
    assert 0 < kl.max() < 0.01
    cache = small.new_cache(1, 6)
    small.prefill(small.encode(images), tokens[:, :3], cache)
    for token in tokens[0, 3:]:
        hidden = small.step(token[None], cache)
    full = small(images, tokens, 3)[:, -1]
    assert torch.allclose(small.decoder.logits(hidden), full, atol=1e-4)


def test_adapters_must_be_folded(tmp_path):
    model = PaliGemma.from_pretrained(str(save(tiny_paligemma(0), tmp_path)), dtype=torch.float32)
    add_lora(model, TARGETS["decoder"])
    with pytest.raises(ValueError, match="fold"):
        quantize(model)


def test_dtype_that_suits_the_machine(tmp_path, monkeypatch):
    """float32 for a small model on a CPU, bfloat16 for a large one; the caller's own choice goes first."""
    folder = save(tiny_paligemma(0), tmp_path)

    def dtype_of(**options):
        return load_for_decoding(folder, **options).projector.weight.dtype

    assert dtype_of() == torch.float32 and dtype_of(dtype=torch.bfloat16) == torch.bfloat16
    assert dtype_of(device="meta") == torch.bfloat16, "any other device"
    monkeypatch.setattr(packing, "SMALL_MODEL", 1)
    assert dtype_of() == torch.bfloat16 and dtype_of(dtype=torch.float32) == torch.float32


def test_layouts_to_load(tmp_path, monkeypatch):
    """Packed where it can be, and not compiled; int8 takes an adapter in; fields of the config too."""
    folder = save(tiny_paligemma(0), tmp_path / "base")
    monkeypatch.setattr(packing, "can_pack", lambda model: True)
    packed = []
    monkeypatch.setattr(packing, "pack", packed.append)
    model = load_for_decoding(folder, attn_cap=7.0)
    assert packed == [model] and model.config.text.attn_cap == 7.0
    load_for_decoding(folder, compiled=True)
    add_lora(model, TARGETS["decoder"])
    save_adapter(model, tmp_path / "adapter")
    small = load_for_decoding(folder, adapter=tmp_path / "adapter", int8=True)
    assert packed == [model] and not lora_layers(small)
    assert isinstance(small.decoder.layers[0].mlp.up_proj, Int8Linear)


packs = pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="this CPU has no bfloat16 in oneDNN"
)


@packs
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 96), (2, 1, 96), (1, 37, 96), (3, 50, 96)])
def test_packed_linear(shape, bias):
    """The plain Linear's products, whatever the shape."""
    linear, x = nn.Linear(96, 160, bias=bias).bfloat16(), torch.randn(shape).bfloat16()
    with torch.inference_mode():
        assert torch.allclose(PackedLinear(linear)(x), linear(x), atol=1e-2, rtol=1e-2)


@packs
def test_packed_model(tmp_path):
    """The logits stay; matrices with an adapter are left alone."""
    folder = str(save(tiny_paligemma(0), tmp_path))
    plain, packed = (PaliGemma.from_pretrained(folder) for _ in range(2))
    assert can_pack(packed) and not can_pack(packed.float())
    packed.bfloat16()
    add_lora(packed, r"decoder\.layers\.0\.attn\.q_proj")
    pack(packed)
    images, tokens = random_inputs(tiny_paligemma(0), batch=2, length=6)
    with torch.inference_mode():
        p, q = (model(images, tokens, 6).log_softmax(-1) for model in (plain, packed))
    assert (p.exp() * (p - q)).sum(-1).max() < 1e-3
    assert not [module for module in packed.decoder.layers.modules() if type(module) is nn.Linear]
    assert len(lora_layers(packed)) == 1
