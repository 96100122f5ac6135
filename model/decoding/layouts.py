"""Linears whose matrix is laid out for a library that multiplies few rows by it at the speed of reading it.

    PackedLinear    bfloat16, oneDNN's: for CPUs with instructions for bfloat16
    HalfLinear      float16, FBGEMM's: for x86 CPUs without them, where products in bfloat16 are slow
    PlanesLinear    int8, FBGEMM's: for x86 CPUs
    Int8Linear      int8, PyTorch's own: for all others, and for GPUs

FBGEMM comes with PyTorch for x86 and needs AVX2.
"""

import threading
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn

INT8_MATMUL_ROWS = 4  # rows of x up to which PyTorch's int8 matmul is the faster one
ENGINE = threading.Lock()  # PyTorch's choice of a library is one for all threads


def cpu_has_bfloat16() -> bool:
    """Whether oneDNN multiplies matrices in bfloat16 on this CPU."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def has_fbgemm() -> bool:
    return "fbgemm" in torch.backends.quantized.supported_engines


class PackedLinear(nn.Module):
    """A Linear with its weight in oneDNN's layout, which a plain Linear makes anew at every call."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), 1)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]"""
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


class HalfLinear(nn.Module):
    """A Linear with its weight in float16, which FBGEMM widens in registers: products and sums in float32.

    Of a weight in bfloat16 nothing is lost from 6e-5 to 65504; smaller ones are rounded by at most 3e-8, and
    larger ones do not fit.
    """

    @staticmethod
    def fits(linear: nn.Linear) -> bool:
        return bool(linear.weight.detach().abs().max() <= torch.finfo(torch.float16).max)

    def __init__(self, linear: nn.Linear):
        super().__init__()
        bias = None if linear.bias is None else linear.bias.detach().float()
        self.packed = torch.ops.quantized.linear_prepack_fp16(linear.weight.detach().float(), bias)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]"""
        return torch.ops.quantized.linear_dynamic_fp16(x.float(), self.packed).to(x.dtype)


def to_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Weight [out, in] -> int8 [out, in], and float32 [out] to multiply its rows by.

    A row becomes round(row / scale), with scale = max |row| / 127.
    """
    weight = weight.detach()
    scale = weight.abs().amax(-1).float().clamp(min=1e-12) / 127
    return (weight / scale[:, None]).round_().clamp_(-127, 127).to(torch.int8), scale


class Int8Linear(nn.Module):
    """A Linear without bias, its weight int8 with a scale for each row: x W^T = (x W8^T) * scale.

    A decoding step has few rows of x and goes through PyTorch's int8 matmul. The prefill would be slower
    there: it multiplies by the matrix widened to the dtype of x.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        weight, scale = to_int8(linear.weight)
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale.to(linear.weight.dtype))

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]"""
        rows = x.flatten(0, -2)
        if len(rows) <= INT8_MATMUL_ROWS:
            y = torch._weight_int8pack_mm(rows, self.weight, self.scale)
        else:
            y = F.linear(rows, self.weight.to(x.dtype)) * self.scale
        return y.unflatten(0, x.shape[:-1])


class PlanesLinear(nn.Module):
    """A Linear without bias, its weight int8 with a scale for each row, and x in two planes of 7 bits.

    A row of x becomes step * (BASE * high + low), integers of at most BASE / 2 each: nearly 14 bits, so that
    the error is that of the weights. Both planes of all rows are one product, which reads the matrix once.
    """

    BASE = 128

    def __init__(self, linear: nn.Linear):
        super().__init__()
        weight, scale = to_int8(linear.weight)
        self.register_buffer("scale", scale)
        self.packed = pack_int8(weight)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]"""
        rows = x.flatten(0, -2).float()
        most = (self.BASE / 2 - 1) * self.BASE
        step = rows.abs().amax(-1, keepdim=True).clamp(min=1e-30) / most
        low = (rows / step).round_()
        high = (low / self.BASE).round_()
        low.sub_(high, alpha=self.BASE)
        high, low = multiply_int8(torch.cat((high, low)), self.BASE // 2, self.packed).chunk(2)
        y = torch.add(low, high, alpha=self.BASE).mul_(step).mul_(self.scale)
        return y.to(x.dtype).unflatten(0, x.shape[:-1])


def pack_int8(weight: Tensor) -> torch.ScriptObject:
    """int8 [out, in] in FBGEMM's layout, whatever PyTorch would choose for this CPU."""
    with ENGINE, warnings.catch_warnings():
        # Such tensors are deprecated, but nothing else in PyTorch makes this layout.
        warnings.filterwarnings("ignore", "torch.quantize_per_tensor, ", UserWarning)
        before, torch.backends.quantized.engine = torch.backends.quantized.engine, "fbgemm"
        try:
            quantized = torch._make_per_tensor_quantized_tensor(weight, 1.0, 0)
            return torch.ops.quantized.linear_prepack(quantized, None)
        finally:
            torch.backends.quantized.engine = before


def multiply_int8(x: Tensor, zero: int, packed: torch.ScriptObject) -> Tensor:
    """Integers float32 [N, in] from -zero to zero, packed int8 [out, in] -> their product float32 [N, out].

    FBGEMM adds zero to x and multiplies bytes without a sign by bytes with one. A CPU without VNNI adds two
    such products in 16 bits, which hold 2 * 128 * 127: so zero is at most 64, and x + zero at most 128.
    """
    return torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(x, 1.0, zero, packed)
