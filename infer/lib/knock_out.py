"""A model without some of its heads or one of its layers."""

import contextlib
from collections.abc import Callable, Iterator

from torch.utils.hooks import RemovableHandle

from model import PaliGemma
from model.gemma import at
from model.seam import attention_layers, attention_restored


def knock_out(model: PaliGemma, heads: list[tuple[int, int]]) -> None:
    """Let these heads of the decoder, each (layer, head), read nothing: their output is 0."""
    layers = attention_layers(model)

    def without(function: Callable, gone: list[int]) -> Callable:
        def attend(q, k, v, mask, scale, cap=None):
            out = function(q, k, v, mask, scale, cap).clone()
            out[:, :, gone] = 0
            return out

        return attend

    for i, layer in enumerate(layers):
        if gone := [head for of_layer, head in heads if of_layer == i]:
            layer.attend = without(layer.attend, gone)


@contextlib.contextmanager
def without_head(model: PaliGemma, layer: int, head: int) -> Iterator[None]:
    """Inside, one of the decoder's heads reads nothing."""
    with attention_restored(attention_layers(model)):
        knock_out(model, [(layer, head)])
        yield


def skip_layer(model: PaliGemma, tower: str, layer: int) -> RemovableHandle:
    """Let a layer of the "vision" tower or of the "decoder" add nothing to its input. Remove the handle to
    undo it."""

    def skip(block, args, out):
        x = args[0]
        return x if len(args) < 5 or args[4] is None else at(x, args[4])  # the last block of the prefill

    return getattr(model, tower).layers[layer].register_forward_hook(skip)


@contextlib.contextmanager
def without_layer(model: PaliGemma, tower: str, layer: int) -> Iterator[None]:
    """Inside, one layer adds nothing, see skip_layer."""
    handle = skip_layer(model, tower, layer)
    try:
        yield
    finally:
        handle.remove()
