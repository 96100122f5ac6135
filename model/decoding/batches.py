"""Batches of images: what the network reads of them, and how many fit into memory.   B: batch, S: side."""

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from model.io.image import READERS, square, to_network
from model.paligemma import PaliGemma

MAX_BATCH = 64  # more images at a time gain nothing
MAX_ROWS_CPU = 1024  # tokens of a decoding step: more fall out of a CPU's caches
UNKNOWN_MEMORY = 2 << 30  # bytes assumed to be free where the system does not say


def network_images(model: PaliGemma, images: list[Image.Image]) -> Tensor:
    """Upright RGB images of any sizes -> float32 [B, 3, S, S] in [-1, 1], on the model's device."""
    size, device = model.config.vision.image_size, model.projector.weight.device
    with ThreadPoolExecutor(READERS) as pool:  # Pillow resizes without Python's lock
        squares = list(pool.map(lambda image: square(image, size), images))
    return to_network(np.stack(squares)).to(device)


def fitting_batch(model: PaliGemma, prompt: int, answer: int, rows: int = 1) -> int:
    """How many images to decode together, so that they fill at most half of the free memory.

    prompt, answer: their lengths in tokens. rows: tokens of an image that a step decodes.
    """
    weight, text, vision = model.projector.weight, model.config.text, model.config.vision
    T = vision.tokens + prompt
    # Memory is fullest in the prefill: the cache of all layers, and the largest activations of one layer, its
    # attention scores before, during and after the softmax or the three products of its MLP.
    cache = 2 * text.layers * text.kv_heads * text.head_dim * (T + answer)
    scores = 3 * max(text.heads * T**2, vision.heads * vision.tokens**2)
    mlp = 3 * max(text.mlp * T, vision.mlp * vision.tokens)
    pixels = 3 * vision.image_size**2  # in float32
    image_bytes = weight.element_size() * (cache + max(scores, mlp)) + 4 * pixels
    most = MAX_BATCH if weight.is_cuda else min(MAX_BATCH, MAX_ROWS_CPU // rows)
    return max(1, min(most, _free_memory(weight.device) // (2 * image_bytes)))


def _free_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError):  # Windows has no sysconf, macOS does not count free pages
        return UNKNOWN_MEMORY
