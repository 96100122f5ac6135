"""Repacked matrices: oneDNN's layout and int8, their errors, and the models that they make."""

import copy

import pytest
import torch
from reference import random_inputs, save, tiny_paligemma
from torch import nn

from model import PaliGemma
from model.decoding.packing import FEW, Int8Linear, PackedLinear, can_pack, pack, quantize
from model.lora import TARGETS, add_lora, lora_layers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, FEW, FEW + 1, 40])
def test_linear(rows, dtype):
    """Within the rounding of a weight to 1/254 of its row's largest, whatever the number of rows."""
    linear = nn.Linear(96, 160, bias=False).to(dtype)
    x = torch.randn(2, rows, 96).to(dtype)[:, :rows] if rows > FEW else torch.randn(rows, 96).to(dtype)
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
