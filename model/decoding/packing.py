"""Matrices laid out for decoding, whose time is that of reading every matrix once per token.

    model = load_for_decoding("nano")    # dtype and layout that suit the machine
    pack(model)        # CPU, bfloat16: oneDNN's own layout; the same products, up to twice as fast
    quantize(model)    # int8: one byte per weight

pack and quantize replace Linears one after the other and free each old matrix at once: memory never holds two
copies of the model.
"""

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.decoding.compiled import compile_steps
from model.decoding.joined import fix_norms, join
from model.decoding.photographs import add_photograph_test
from model.io.hub import resolve, weight_files
from model.io.weights import release_pages
from model.lora import LoRALinear, fold
from model.paligemma import PaliGemma

INT8_MATMUL_ROWS = 4  # rows of x up to which PyTorch's int8 matmul is the faster one
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
    if adapter is None and config_overrides.get("image_size") is None:  # else it has been taught other things
        add_photograph_test(model)
    fix_norms(model)
    if int8:
        fold(model)
    if model.projector.weight.device.type != "cpu":  # where it gains nothing: joined.py
        join(model)
    if int8:
        quantize(model)
    elif can_pack(model) and not compiled:
        pack(model)
    if compiled:
        compile_steps(model)
    return model


class PackedLinear(nn.Module):
    """A Linear with its weight in oneDNN's layout, which a plain Linear makes anew at every call."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), 1)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]"""
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


class Int8Linear(nn.Module):
    """A Linear without bias, its weight int8 [out, in] with a scale for each row: x W^T = (x W8^T) * scale.

    A row of W becomes round(row / scale) with scale = max |row| / 127. A decoding step has few rows of x and
    goes through PyTorch's int8 matmul. The prefill would be slower there: it multiplies by the matrix widened
    to the dtype of x.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        weight = linear.weight.detach().float()
        scale = (weight.abs().amax(-1).clamp(min=1e-12) / 127).to(linear.weight.dtype)
        rounded = (weight / scale[:, None].float()).round_().clamp_(-127, 127)
        self.register_buffer("weight", rounded.to(torch.int8))
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]"""
        rows = x.flatten(0, -2)
        if len(rows) <= INT8_MATMUL_ROWS:
            y = torch._weight_int8pack_mm(rows, self.weight, self.scale)
        else:
            y = F.linear(rows, self.weight.to(x.dtype)) * self.scale
        return y.unflatten(0, x.shape[:-1])


def can_pack(model: PaliGemma) -> bool:
    """Whether these weights have a packed layout on this machine."""
    weight = model.projector.weight
    return weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and cpu_has_bfloat16()


def cpu_has_bfloat16() -> bool:
    """Whether oneDNN multiplies matrices in bfloat16 on this CPU."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def pack(model: PaliGemma) -> None:
    """Pack the Linears of the decoder and the vision tower, except those with an adapter."""
    for layers in (model.decoder.layers, model.vision.layers):
        _replace(layers, PackedLinear)


def quantize(model: PaliGemma) -> None:
    """Round the decoder's matrices to int8. Adapters must have been folded into them before."""
    if any(isinstance(module, LoRALinear) for module in model.modules()):
        raise ValueError("int8 needs plain matrices, the model has an adapter: lora.fold(model) merges it")
    _replace(model.decoder.layers, Int8Linear)


def _replace(layers: nn.ModuleList, make: Callable[[nn.Linear], nn.Module]) -> None:
    """Put make(linear) in the place of every plain Linear."""
    for path in [path for path, module in layers.named_modules() if type(module) is nn.Linear]:
        linear = layers.get_submodule(path)
        layers.set_submodule(path, make(linear))
        release_pages(linear.weight)
