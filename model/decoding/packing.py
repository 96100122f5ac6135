"""Matrices laid out for decoding, whose time is that of reading every matrix once per token.

    model = load_for_decoding("nano")    # dtype and layout that suit the machine
    pack(model)        # CPU, bfloat16: the layout of the library that is fastest there
    quantize(model)    # int8: one byte per weight

pack and quantize replace a few Linears at a time and free each old matrix at once: memory never holds two
copies of the model. The layouts themselves are in layouts.py.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor, nn

from model.decoding.compiled import compile_steps
from model.decoding.joined import fix_norms, join, join_block
from model.decoding.layouts import (
    HalfLinear,
    Int8Linear,
    PackedLinear,
    PlanesLinear,
    cpu_has_bfloat16,
    has_fbgemm,
)
from model.decoding.photographs import add_photograph_test
from model.io.hub import resolve, weight_files
from model.io.weights import release_pages, trim_memory
from model.lora import LoRALinear, fold
from model.paligemma import PaliGemma
from model.seam import attention_layers

SMALL_MODEL = 1 << 30  # bytes of weights up to which float32 is the faster dtype on a CPU


def load_for_decoding(
    source: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    adapter: str | Path | None = None,
    int8: bool = False,
    compiled: bool = False,
    **config_overrides,
) -> PaliGemma:
    """PaliGemma.from_pretrained, and then its matrices in the layout that decodes fastest.

    dtype: None for float32 if the model is small and runs on a CPU, else bfloat16. int8: quantize the decoder
    (an adapter is folded in before). compiled: torch.compile the steps, whose Linears are then not packed.
    """
    folder = resolve(source)
    if dtype is None:
        weights = sum(file.stat().st_size for file in weight_files(folder))
        small_on_cpu = torch.device(device).type == "cpu" and weights < SMALL_MODEL
        dtype = torch.float32 if small_on_cpu else torch.bfloat16
    model = PaliGemma.from_pretrained(folder, dtype=dtype, device=device, adapter=adapter, **config_overrides)
    # The test is for the image tokens of these very weights, at their own size.
    if adapter is None and config_overrides.get("image_size") is None:
        add_photograph_test(model)
    fix_norms(model)
    if int8:
        quantize(fold(model), traced=compiled)
    elif model.projector.weight.device.type != "cpu":  # on a CPU, joining these gains nothing
        join(model)
    if can_pack(model) and not compiled:
        pack(model)
    if compiled:
        compile_steps(model)
    return model


def can_pack(model: PaliGemma) -> bool:
    """Whether these weights have a packed layout on this machine."""
    weight = model.projector.weight
    on_cpu = weight.device.type == "cpu" and weight.dtype == torch.bfloat16
    return on_cpu and (cpu_has_bfloat16() or has_fbgemm())


def pack(model: PaliGemma) -> None:
    """Pack the Linears of the decoder and the vision tower, except those with an adapter.

    On a CPU without instructions for bfloat16, the decoder's attention then computes in float32.
    """

    def packed(linear: nn.Linear) -> nn.Module:
        if cpu_has_bfloat16():
            return PackedLinear(linear)
        return HalfLinear(linear) if HalfLinear.fits(linear) else linear

    for block in (*model.decoder.layers, *model.vision.layers):
        _replace(block, packed)
    if not cpu_has_bfloat16():
        for layer in attention_layers(model):
            layer.attend = in_float32(layer.attend)


def in_float32(attention: Callable) -> Callable:
    """The attention function (model/seam.py), computing in float32; the output has the dtype of q."""

    def widened(q: Tensor, k: Tensor, v: Tensor, *others) -> Tensor:
        return attention(q.float(), k.float(), v.float(), *others).to(q.dtype)

    return widened


def quantize(model: PaliGemma, traced: bool = False) -> None:
    """Join the decoder's matrices (joined.py) and round them to int8. Adapters must have been folded before.

    traced: in the form that torch.compile can trace.
    """
    if any(isinstance(module, LoRALinear) for module in model.modules()):
        raise ValueError("int8 needs plain matrices, the model has an adapter: lora.fold(model) merges it")
    planes = model.projector.weight.device.type == "cpu" and has_fbgemm() and not traced
    for block in model.decoder.layers:  # joined one by one: wide matrices of all would be a second copy
        join_block(block)
        _replace(block, PlanesLinear if planes else Int8Linear)


def _replace(block: nn.Module, make: Callable[[nn.Linear], nn.Module]) -> None:
    """Replace every plain Linear by make(linear), two at a time, as that takes one core long."""

    def replace(path: str) -> None:
        linear = block.get_submodule(path)
        block.set_submodule(path, made := make(linear))
        if made is not linear:
            release_pages(linear.weight)

    paths = [path for path, module in block.named_modules() if type(module) is nn.Linear]
    with ThreadPoolExecutor(2) as pool:  # each takes memory for a copy in float32
        list(pool.map(replace, paths))
    trim_memory()
