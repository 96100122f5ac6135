"""Fewer products and operations in a step: matrices that read the same input become one.

    join(model)         # q, k and v of a layer in one matrix, gate and up in another
    fix_norms(model)    # 1 + weight computed once; the same bits

A step on a GPU is a row of small kernels. Join comes before pack and quantize of packing.py: these lay out
plain Linears, of which there are then fewer.
"""

import torch
from torch import nn

from model.gemma import RMSNorm
from model.io.weights import release_pages
from model.paligemma import PaliGemma


def join(model: PaliGemma) -> None:
    """Join the decoder's matrices, one layer after the other, each old one freed at once: memory never holds
    two copies of the model. Those with an adapter stay, and the others that read the same input with them."""
    for block in model.decoder.layers:
        _join(block.attn, "qkv_proj", ("q_proj", "k_proj", "v_proj"))
        _join(block.mlp, "gate_up_proj", ("gate_proj", "up_proj"))


def _join(module: nn.Module, name: str, parts: tuple[str, ...]) -> None:
    """Put the Linears `parts` of a module in one of that name, their rows one below the other."""
    linears = [module.get_submodule(part) for part in parts]
    if any(type(linear) is not nn.Linear for linear in linears):
        return
    weight = torch.cat([linear.weight.detach() for linear in linears])
    joined = nn.Linear(*reversed(weight.shape), bias=False, device="meta")
    joined.weight = nn.Parameter(weight, requires_grad=False)
    setattr(module, name, joined)
    for part, linear in zip(parts, linears):
        setattr(module, part, None)
        release_pages(linear.weight)


def fix_norms(model: PaliGemma) -> None:
    """Let the decoder's norms keep 1 + weight, in float32. Their weights must not change afterwards."""
    for module in model.decoder.modules():
        if isinstance(module, RMSNorm):
            module.scale = 1 + module.weight.detach().float()
