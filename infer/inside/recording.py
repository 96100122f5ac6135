"""One pass through the decoder, recorded: attention, states and masks of its layers.

Axes: L layers, N heads, S positions of [image | text], T of them text, P image tokens, D width, C classes.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from infer.inside.page import pack, pack_probabilities
from infer.inside.reasons import REASONS, reasons
from model import PaliGemma
from model.io.names import shown

MAX_NUMBERS = 1 << 27  # of the attention maps in a page


@dataclass
class Recording:
    maps: dict[int, Tensor] = field(default_factory=dict)  # attention of each layer, [1, N, S, S]
    states: list[Tensor] = field(default_factory=list)  # [S, D] before the first layer and after each
    masks: list[Tensor] = field(default_factory=list)  # bool [S, S] of each layer: what it was given

    def text_maps(self, image_tokens: int) -> Tensor:
        """float32 [L, N, T, S]: what each text token reads."""
        return torch.stack([layer[0, :, image_tokens:].float() for layer in self.maps.values()]).cpu()


@contextlib.contextmanager
def recording(model: PaliGemma) -> Iterator[Recording]:
    """Inside, a pass of the decoder over one sequence, without a cache, fills the Recording."""
    seen = Recording()

    def keep(block, args, out):
        x, _, mask = args[:3]
        if not seen.states:
            seen.states.append(x[0])
        seen.states.append(out[0])
        seen.masks.append(mask[0])

    handles = [block.register_forward_hook(keep) for block in model.decoder.layers]
    try:
        with model.record_attention() as seen.maps:
            yield seen
    finally:
        for handle in handles:
            handle.remove()


def logit_lens(model: PaliGemma, states: list[Tensor], image_tokens: int, ids: Tensor | slice) -> Tensor:
    """The "logit lens": probabilities at the image tokens if the decoder ended after each layer, float32
    [L + 1, C, P]. The last norm and the head are applied to the states between the layers.

    ids: a slice of the vocabulary, whose probabilities add up to 1; or int64 [C], with their probabilities
    among all ids.
    """
    found = []
    for state in states:
        hidden = model.decoder.norm(state[:image_tokens])
        if isinstance(ids, slice):
            p = model.decoder.logits(hidden, ids.start, ids.stop).softmax(-1)
        else:
            p = model.decoder.logits(hidden).softmax(-1)[:, ids]
        found.append(p.T.cpu())
    return torch.stack(found)


def token_text(tokenizer, i: int) -> str:
    """A token as it is shown: a location or code by its name, a space as one."""
    if i == tokenizer.newline:
        return "\\n"
    if i >= tokenizer.size:
        return f"<{i}>"
    return tokenizer.decode([i]) if i >= tokenizer.loc0 else shown(tokenizer.piece(i).replace("\u2581", " "))


def text_data(
    model: PaliGemma, seen: Recording, prompt: list[int], answer: list[dict], depth: int | None = None
) -> dict:
    """The text's tokens, what they read, and the mask with its reasons.

    prompt: its ids; answer: {"text", "of": what it is} for each of its tokens that was read; depth: tokens of
    a branch of the answer, None if it does not branch.
    """
    P = model.config.vision.tokens
    prefix, number = P + len(prompt), np.arange(len(answer))
    branch = np.concatenate((np.full(prefix, -1), number // depth if depth else 0 * number))
    positions = np.concatenate((np.arange(prefix), prefix + (number % depth if depth else number)))
    # Layers 0, 2, 4, ... are local, the others global (model/gemma.py).
    windows = model.config.text.sliding_window, None
    masks = (mask.cpu().numpy() for mask in seen.masks[:2])
    cells = [reasons(mask, prefix, positions, branch, window) for mask, window in zip(masks, windows)]
    return {
        "prompt_tokens": len(prompt),
        "tokens": [dict(text=token_text(model.tokenizer, i), of="question") for i in prompt] + answer,
        "maps": pack_probabilities(seen.text_maps(P).numpy()),
        "mask": {"reasons": REASONS, "cells": pack(np.stack(cells))},
    }


def check_room(model: PaliGemma, text_tokens: int) -> None:
    """Refuse an answer whose attention would make a page that no browser can hold."""
    config, tokens = model.config.text, model.config.vision.tokens
    size = config.layers * config.heads * text_tokens * (tokens + text_tokens)
    if size > MAX_NUMBERS:
        how = "ask for fewer boxes (--branches, --groups), or for a smaller --image-size"
        raise ValueError(f"the attention has {size:,} weights, a page can hold {MAX_NUMBERS:,}: {how}")
