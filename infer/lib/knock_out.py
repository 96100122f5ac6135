"""A model without some of its heads or one of its layers."""

import contextlib
from collections.abc import Callable, Iterator

from model import PaliGemma
from model.gemma import at
from model.seam import attention_layers, attention_restored


def knock_out(model: PaliGemma, heads: list[tuple[int, int]]) -> None:
    """Let some of the decoder's heads, (layer, head), read nothing."""
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


@contextlib.contextmanager
def without_layer(model: PaliGemma, tower: str, layer: int) -> Iterator[None]:
    """Inside, a layer of the "vision" tower or of the "decoder" adds nothing to what it is given."""

    def skip(block, args, out):
        x = args[0]
        return x if len(args) < 5 or args[4] is None else at(x, args[4])  # the last block of the prefill

    handle = getattr(model, tower).layers[layer].register_forward_hook(skip)
    try:
        yield
    finally:
        handle.remove()
