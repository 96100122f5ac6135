"""Matrices laid out for decoding, where each is read once a token and the time is that of reading it.

    pack(model)        # CPU, bfloat16: oneDNN's own layout; the same products, up to twice as fast
    quantize(model)    # int8: one byte a weight

Both replace Linears in place, one after the other, and give the memory of the old matrix back at once.
"""

import ctypes
import mmap
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.io.weights import is_mapped
from model.lora import LoRALinear
from model.paligemma import PaliGemma

FEW = 4  # rows of x up to which the int8 matmul is the faster one


class PackedLinear(nn.Module):
    """A Linear whose weight oneDNN has laid out. What a plain Linear does, too, but anew at every call."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), 1)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]"""
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


class Int8Linear(nn.Module):
    """A Linear without bias, its weight int8 [out, in] with a scale for each row: x W^T = (x W8^T) * scale.

    A row of W becomes round(W / scale) with scale = max |row| / 127. A decoding step, one or a few rows of x,
    goes through PyTorch's packed int8 matmul. The prefill would be slower there: it multiplies with the
    widened matrix.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        weight = linear.weight.detach().float()
        scale = (weight.abs().amax(-1).clamp(min=1e-12) / 127).to(linear.weight.dtype)
        whole = (weight / scale[:, None].float()).round_().clamp_(-127, 127)
        self.register_buffer("weight", whole.to(torch.int8))
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]"""
        rows = x.flatten(0, -2)
        if len(rows) <= FEW:
            y = torch._weight_int8pack_mm(rows, self.weight, self.scale)
        else:
            y = F.linear(rows, self.weight.to(x.dtype)) * self.scale
        return y.unflatten(0, x.shape[:-1])


def can_pack(model: PaliGemma) -> bool:
    """On this machine, these weights."""
    weight = model.projector.weight
    here = weight.device.type == "cpu" and weight.dtype == torch.bfloat16
    return here and torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def pack(model: PaliGemma) -> None:
    """Pack the Linears of the decoder and the vision tower, but for those with an adapter."""
    for layers in (model.decoder.layers, model.vision.layers):
        _replace(layers, PackedLinear)


def quantize(model: PaliGemma) -> None:
    """Round the decoder's matrices to int8. Raises ValueError if there are adapters: fold them first."""
    if any(isinstance(module, LoRALinear) for module in model.modules()):
        raise ValueError("int8 needs plain matrices, the model has an adapter: lora.fold(model) merges it")
    _replace(model.decoder.layers, Int8Linear)


def _replace(layers: nn.ModuleList, make: Callable[[nn.Linear], nn.Module]) -> None:
    for path in [path for path, module in layers.named_modules() if type(module) is nn.Linear]:
        linear = layers.get_submodule(path)
        layers.set_submodule(path, make(linear))
        _forget(linear.weight)


def _forget(weight: Tensor) -> None:
    """Give back the memory of a weight that the loader mapped from a file: its pages would stay as long as
    the file is mapped. Whole pages inside the weight only; who reads them again finds what is in the file.
    Any other memory (a NumPy array's, say) would read as zeros afterwards, and is not ours to give back."""
    if not is_mapped(weight) or not hasattr(mmap, "MADV_DONTNEED"):
        return
    start = -(-weight.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    size = (weight.data_ptr() + weight.nbytes - start) // mmap.PAGESIZE * mmap.PAGESIZE
    if size > 0:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), mmap.MADV_DONTNEED)
