"""The same answer without one head of the decoder, or without one layer of either tower."""

from collections.abc import Callable, Iterator
from typing import TypeVar

from infer.lib.knock_out import without_head, without_layer
from model import PaliGemma

Found = TypeVar("Found")
CHEAP = 1 << 28  # weights: with more, an answer is not repeated for every head and layer


def is_cheap(model: PaliGemma) -> bool:
    return sum(weight.numel() for weight in model.parameters()) <= CHEAP


def what_if(model: PaliGemma, answer: Callable[[], Found]) -> Iterator[tuple[dict, Found]]:
    """For each head and layer: where it is, {"tower", "layer", "head"} (head None: the whole layer), and the
    answer without it."""
    for tower, blocks in (("vision", model.vision.layers), ("decoder", model.decoder.layers)):
        for layer in range(len(blocks)):
            heads = range(model.config.text.heads) if tower == "decoder" else ()
            for head in (None, *heads):
                missing = (
                    without_layer(model, tower, layer) if head is None else without_head(model, layer, head)
                )
                with missing:
                    found = answer()
                yield {"tower": tower, "layer": layer, "head": head}, found
