"""Fewer products and operations in a step: matrices that read the same input become one.

    join(model)         # q, k and v of a layer in one matrix, gate and up in another
    fix_norms(model)    # 1 + weight computed once; the same bits

A step on a GPU is a row of small kernels, and joining leaves fewer of them. On a CPU it only gains in int8,
where x is prepared anew for every product: packing.quantize joins, too.
"""

import torch
from torch import nn

from model.gemma import Block, RMSNorm
from model.io.weights import release_pages
from model.paligemma import PaliGemma


def join(model: PaliGemma) -> None:
    """Join the decoder's matrices, one after the other, each old one freed at once: memory never holds two
    copies of the model."""
    for block in model.decoder.layers:
        join_block(block)
    # What was freed in pieces is too small for PyTorch to use again, and the size of a batch is decided by
    # what the GPU says is free.
    torch.cuda.empty_cache()


def join_block(block: Block) -> None:
    """Join the matrices of a block; those with an adapter stay, and so do the others of the same input."""
    _join(block.attn, "qkv_proj", ("q_proj", "k_proj", "v_proj"))
    _join(block.mlp, "gate_up_proj", ("gate_proj", "up_proj"))


def _join(module: nn.Module, name: str, parts: tuple[str, ...]) -> None:
    """Put the Linears `parts` of a module in one of that name, their rows one below the other."""
    linears = [getattr(module, part) for part in parts]  # None where they were joined before
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
