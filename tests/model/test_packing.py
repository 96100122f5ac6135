"""Repacked matrices: oneDNN's layout and int8, their errors, and whose memory they give back."""

import copy
import mmap
from pathlib import Path

import numpy as np
import pytest
import torch
from reference import random_inputs, save, tiny_paligemma
from safetensors.torch import save_file
from torch import nn

from model import PaliGemma
from model.decoding import packing
from model.decoding.layouts import (
    INT8_MATMUL_ROWS,
    HalfLinear,
    Int8Linear,
    PackedLinear,
    PlanesLinear,
    has_fbgemm,
    multiply_int8,
    pack_int8,
)
from model.decoding.packing import _replace, can_pack, load_for_decoding, pack, quantize
from model.io.adapter import save_adapter
from model.io.weights import is_mapped, release_pages
from model.lora import TARGETS, add_lora, lora_layers

fbgemm = pytest.mark.skipif(not has_fbgemm(), reason="this CPU has no FBGEMM")
INT8 = [Int8Linear, pytest.param(PlanesLinear, marks=fbgemm)]


@pytest.mark.parametrize("layout", INT8)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, INT8_MATMUL_ROWS, INT8_MATMUL_ROWS + 1, 40])
def test_linear(rows, dtype, layout):
    """Within the rounding of a weight to 1/254 of its row's largest, whatever the number of rows."""
    linear = nn.Linear(96, 160, bias=False).to(dtype)
    shape = (2, rows, 96) if rows > INT8_MATMUL_ROWS else (rows, 96)
    x = torch.randn(shape).to(dtype)
    exact, found = x.float() @ linear.weight.float().T, layout(linear)(x).float()
    step = linear.weight.float().abs().amax(-1) / 127
    bound = x.float().abs().sum(-1, keepdim=True) * step * 0.5
    if layout is PlanesLinear:  # and half a step of x
        bound += x.float().abs().amax(-1, keepdim=True) / 8064 / 2 * linear.weight.float().abs().sum(-1)
    slack = 1e-5 if dtype == torch.float32 else 0.02 * exact.abs().max() + bound  # of bfloat16 itself
    assert found.shape == exact.shape and ((found - exact).abs() <= bound + slack).all()
    assert (found - exact).abs().max() > 0


@pytest.mark.parametrize("layout", INT8)
def test_weights_that_fit_are_exact(layout):
    """Multiples of the scale come back as they were; a row of zeros too."""
    linear = nn.Linear(64, 32, bias=False)
    whole = torch.randint(-127, 128, (32, 64)).float()
    whole[:, 0], whole[5] = 127, 0
    linear.weight = nn.Parameter(whole * 0.25)
    x = torch.randint(-8064, 8065, (3, 64)) / 256  # and what 14 bits of x hold
    x[:, 0], x[2] = 8064 / 256, 0
    assert torch.allclose(layout(linear)(x), linear(x), atol=1e-4)


@fbgemm
def test_products_of_integers_are_exact():
    """At both ends of what is allowed, where a sum of two products just fits into 16 bits."""
    weight = torch.randint(-127, 128, (40, 300), dtype=torch.int8)
    weight[0], weight[1] = 127, -127
    x = torch.randint(-64, 65, (9, 300)).float()
    x[0], x[1] = 64, -64
    exact = (x.double() @ weight.double().T).float()
    assert torch.equal(multiply_int8(x, 64, pack_int8(weight)), exact)


@fbgemm
def test_channels_that_stand_out():
    """Four channels of x that are 50 times the others, as in large models: the error stays"""
    linear = nn.Linear(512, 256, bias=False)
    x = torch.randn(20, 512)
    x[:, [3, 77, 200, 411]] *= 50
    exact = linear(x)
    errors = [(layout(linear)(x) - exact).norm() / exact.norm() for layout in (Int8Linear, PlanesLinear)]
    assert errors[1] < 1.1 * errors[0] < 0.01


@fbgemm
def test_what_is_not_finite_shows():
    layer = PlanesLinear(nn.Linear(64, 32, bias=False))
    x = torch.ones(3, 64)
    x[0, 5], x[1, 5] = torch.nan, torch.inf
    assert [bool(row.isfinite().any()) for row in layer(x)] == [False, False, True]


@fbgemm
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 96), (2, 1, 96), (3, 50, 96)])
def test_half_linear(shape, bias):
    """Nothing is lost of weights that come in bfloat16, whatever the shape; sums are in float32."""
    linear, x = nn.Linear(96, 160, bias=bias).bfloat16(), torch.randn(shape).bfloat16()
    exact = copy.deepcopy(linear).double()(x.double())
    found = HalfLinear(linear)(x)
    assert found.dtype == torch.bfloat16 and found.shape == exact.shape
    assert torch.allclose(found.double(), exact, rtol=2**-8, atol=1e-6)


@fbgemm
def test_weights_beyond_float16(tmp_path, monkeypatch):
    """Such a matrix stays as it was."""
    monkeypatch.setattr(packing, "cpu_has_bfloat16", lambda: False)
    model = PaliGemma.from_pretrained(str(save(tiny_paligemma(0), tmp_path)))
    mlp = model.decoder.layers[0].mlp
    mlp.up_proj.weight.data[0, 0] = 1e5
    pack(model)
    assert type(mlp.up_proj) is nn.Linear and type(mlp.gate_proj) is HalfLinear


def test_model(tmp_path):
    """Nearly the same distributions, in one byte a weight; logits of a forward and of steps agree."""
    exact = PaliGemma.from_pretrained(str(save(tiny_paligemma(0), tmp_path)), dtype=torch.float32)
    small = copy.deepcopy(exact)
    quantize(small)
    layer = small.decoder.layers[0].mlp.up_proj
    assert type(layer) is (PlanesLinear if has_fbgemm() else Int8Linear) and not list(layer.parameters())
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
    assert packed == [model, small] and not lora_layers(small), "its vision tower"
    assert type(small.decoder.layers[0].mlp.up_proj) is (PlanesLinear if has_fbgemm() else Int8Linear)


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


@pytest.mark.parametrize(
    "layout", [pytest.param(PackedLinear, marks=packs), pytest.param(HalfLinear, marks=fbgemm)]
)
def test_packed_model(layout, tmp_path, monkeypatch):
    """The logits stay; matrices with an adapter are left alone."""
    monkeypatch.setattr(packing, "cpu_has_bfloat16", lambda: layout is PackedLinear)
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
    assert type(packed.vision.layers[0].mlp.fc1) is layout
    assert len(lora_layers(packed)) == 1


# Whose memory is given back ---------------------------------------------------------------------------------


MARK = 7.0  # written over weights in memory: what is read from the file again is not MARK


gives_back = pytest.mark.skipif(not hasattr(mmap, "MADV_DONTNEED"), reason="this system has no madvise")


def wide_model(folder: Path, dtype=torch.bfloat16) -> PaliGemma:
    """Loaded from the folder; its matrices are of several pages each, and begin and end inside a page."""
    hf = tiny_paligemma(0, width=96, layers=1)
    raw = {name: x.bfloat16() for name, x in hf.state_dict().items() if "lm_head" not in name}
    save(hf, folder, names="C")
    save_file(raw, folder / "model.safetensors", metadata={"format": "pt"})
    return PaliGemma.from_pretrained(str(folder), dtype=dtype)


def inner_pages(weight: torch.Tensor) -> slice:
    """The elements in the pages that hold nothing but the weight."""
    first, end = -weight.data_ptr() % mmap.PAGESIZE, (weight.data_ptr() + weight.nbytes) % mmap.PAGESIZE
    return slice(first // weight.element_size(), weight.numel() - end // weight.element_size())


@gives_back
@pytest.mark.parametrize("change", [quantize, pack])
def test_mapped_weights_are_given_back(change, tmp_path):
    """All pages of a mapped matrix that hold nothing else: they are the file's again."""
    model = wide_model(tmp_path)
    if change is pack and not can_pack(model):
        pytest.skip("this CPU has neither bfloat16 in oneDNN nor FBGEMM")
    weight = model.decoder.layers[0].mlp.up_proj.weight.data.flatten()
    stored = weight.clone()
    assert is_mapped(weight) and len(stored[inner_pages(weight)]) * 2 >= 2 * mmap.PAGESIZE
    weight.fill_(MARK)
    change(model)
    assert torch.equal(weight[inner_pages(weight)], stored[inner_pages(weight)])


@gives_back
def test_neighbours_in_the_file_keep_their_pages(tmp_path):
    """A page that a weight shares with another tensor of the file stays, at both of its ends."""
    model = wide_model(tmp_path)
    tensors = [x.data.flatten() for x in model.state_dict().values()]
    weight = model.decoder.layers[0].mlp.up_proj.weight
    start, end = weight.data_ptr(), weight.data_ptr() + weight.nbytes
    assert start % mmap.PAGESIZE and end % mmap.PAGESIZE, "both ends must lie inside a page"
    assert {end, start} <= {x.data_ptr() + offset for x in tensors for offset in (0, x.nbytes)}
    for x in tensors:
        x.fill_(MARK)
    release_pages(weight)
    for x in tensors:
        assert x.data_ptr() == start or (x == MARK).all()


@gives_back
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_of_others_stays(dtype, tmp_path):
    """A NumPy array behind a weight, a copy in another dtype, and a weight replaced after loading."""
    array = np.full((512, 256), MARK, np.float32)
    layers = nn.ModuleList([nn.Linear(256, 512, bias=False)])
    layers[0].weight = nn.Parameter(torch.from_numpy(array))
    _replace(layers, Int8Linear)
    assert (array == MARK).all()

    model = wide_model(tmp_path, dtype)
    layer = model.decoder.layers[0].mlp.up_proj
    assert is_mapped(layer.weight) == (dtype == torch.bfloat16)
    copy = layer.weight.detach().to(torch.float64)
    assert not is_mapped(copy)
    layer.weight.data = torch.from_numpy(array)[:192, :96]
    quantize(model)
    assert (array == MARK).all()
