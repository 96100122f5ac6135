"""Checks of the network's inputs: what it would misread without an error is refused with words."""

import torch
from torch import Tensor

from model.config import PaliGemmaConfig


def check_images(images: Tensor, config: PaliGemmaConfig) -> None:
    """Refuse images that are not float [B, channels, S, S] with the config's S."""
    if not images.is_floating_point():
        raise ValueError(f"images are {_form(images)}, the model takes floats in [-1, 1]: pixels / 127.5 - 1")
    shape = [config.vision.channels, config.vision.image_size, config.vision.image_size]
    if list(images.shape[1:]) != shape:
        wanted = ", ".join(map(str, shape))
        raise ValueError(f"images have the shape {list(images.shape)}, the model takes [B, {wanted}]")


def check_text(tokens: Tensor, prefix_len: int | Tensor, batch: int) -> None:
    """Refuse tokens that are not int64 [B, T], and a prefix that is not 1 to T of them."""
    if tokens.dtype != torch.int64 or tokens.dim() != 2 or len(tokens) != batch:
        raise ValueError(f"tokens are {_form(tokens)}, the model takes int64 [{batch}, T], one row per image")
    shortest = longest = prefix_len
    if not isinstance(prefix_len, int):
        lengths = torch.as_tensor(prefix_len)
        if lengths.dtype != torch.int64 or lengths.shape not in ((), (batch,)):
            raise ValueError(f"prefix_len is {_form(lengths)}, the model takes an int or int64 [{batch}]")
        # A GPU sync if the lengths are on a GPU. Training and decoding call `read`, which does without.
        shortest, longest = lengths.min().item(), lengths.max().item()
    if not 1 <= shortest <= longest <= tokens.shape[1]:
        wrong = shortest if shortest < 1 else longest
        raise ValueError(f"prefix_len {wrong} is outside the text: it must be 1 to {tokens.shape[1]} tokens")


def _form(tensor: Tensor) -> str:
    """A tensor's dtype and shape in words: "int64 [2, 6]"."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
