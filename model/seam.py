"""The seam: look into a model's attention, or put another one in its place.

    model = PaliGemma.from_pretrained("nano", attention="mine:sigmoid_attention")    # a file mine.py here
    with model.record_attention() as maps:
        model(images, tokens, prefix_len)
    maps[0]    # of the first layer: float [B, N, T, S]

Every layer calls the function in its attribute `attend` (by default attention.attend), and the decoder's mask
comes from the function in the model's attribute `mask` (by default attention.prefix_lm_mask). The docstrings
of these two say what a replacement must do. The decoder's layers also hold their rotation (`rotate`);
infer/ablate.py replaces all three.

Axes: B batch, N query heads, T query, S key.
"""

import contextlib
import importlib
import os
import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from model.attention import attend

TOWERS = ("text", "vision", "both")


def find_function(name: str | Callable) -> Callable:
    """The function named "package.module:function"; a function is returned as it is. Modules of the working
    folder are found, too. ValueError if there is no such function."""
    if callable(name):
        return name
    module, colon, function = name.partition(":")
    if not (module and colon and function):
        raise ValueError(f"{name!r} names no function: write package.module:function")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # last: it must not hide what is installed
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, SyntaxError, ValueError, AttributeError) as error:
        raise ValueError(f"{name!r} cannot be used: {error}") from None
    if not callable(found):
        raise ValueError(f"{name!r} is no function")
    return found


def attention_layers(model: nn.Module, tower: str = "text") -> list[nn.Module]:
    """The attention of each layer of a PaliGemma, in order: of "text", of "vision", or of "both"."""
    if tower not in TOWERS:
        raise ValueError(f"tower {tower!r} is none of {', '.join(TOWERS)}")
    towers = {"text": [model.decoder], "vision": [model.vision], "both": [model.vision, model.decoder]}
    return [block.attn for part in towers[tower] for block in part.layers]


def replace_attention(model: nn.Module, attention: str | Callable, tower: str = "text") -> None:
    """Let every layer of a tower call another attention function, given by itself or by name."""
    function = find_function(attention)
    for layer in attention_layers(model, tower):
        layer.attend = function


@contextlib.contextmanager
def attention_restored(layers: list[nn.Module]) -> Iterator[None]:
    """Inside, layers may be given other attention functions; afterwards they have their own again."""
    before = [layer.attend for layer in layers]
    try:
        yield
    finally:
        for layer, function in zip(layers, before):
            layer.attend = function


@contextlib.contextmanager
def record_attention(model: nn.Module, tower: str = "text") -> Iterator[dict[int, Tensor]]:
    """Inside, each pass through the model leaves its attention weights in the dict: {layer: [B, N, T, S]}.

    A decoding step is a pass too; with a cache, S counts the slots that it reads. The weights are what the
    attention function returns for an identity matrix as values, however it computes them.
    """
    layers, maps = attention_layers(model, tower), {}

    def recorder(i: int, function: Callable) -> Callable:
        def recorded(q, k, v, mask, scale, cap=None):
            every_key = torch.eye(k.shape[2], dtype=v.dtype, device=v.device).expand(*k.shape[:2], -1, -1)
            maps[i] = function(q, k, every_key, mask, scale, cap).detach().transpose(1, 2)
            return function(q, k, v, mask, scale, cap)

        return recorded

    with attention_restored(layers):
        for i, layer in enumerate(layers):
            layer.attend = recorder(i, layer.attend)
        yield maps


def is_own(model: nn.Module) -> bool:
    """Whether all layers of the decoder call this project's own `attend`, the only one with a fused form."""
    return all(layer.attend is attend for layer in attention_layers(model))
