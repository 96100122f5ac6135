"""Collect what the page shows of one answer to one picture: a dict of numbers, texts and packed arrays.

    data = look_inside(model, image, "photo.jpg")                         # closed-set, as it was taught
    data = look_inside(model, image, "photo.jpg", prompt="caption en")    # in words

The answer is decoded as always. Then one pass over [image | prompt | answer] is recorded: its attention, its
states between the layers, and the probabilities that led to each token. page.py makes a page of it.
"""

import math

import torch
from PIL import Image

from infer.inside.closed_set import closed_set
from infer.inside.page import picture
from infer.inside.words import words
from model import PaliGemma
from model.decoding.batches import network_images
from model.decoding.closed_set import PROMPT
from model.decoding.detections import Selection
from model.io.names import shown

SELECTION = Selection(score_threshold=0.6, nms_iou=0.5)


@torch.inference_mode()
def look_inside(
    model: PaliGemma,
    image: Image.Image,
    name: str,
    *,
    prompt: str = PROMPT,
    selection: Selection = SELECTION,
    decode: str | None = None,
    branches: int | None = None,
    groups: int | None = None,
    max_tokens: int = 100,
) -> dict:
    """image: upright RGB; name: what the page calls it. selection, decode, branches, groups: for closed-set
    answers, see closed_set_decoder; max_tokens: of answers in words."""
    text, vision, pixels = model.config.text, model.config.vision, network_images(model, [image])
    if prompt == PROMPT:
        answer = closed_set(model, pixels, selection, decode, branches, groups)
    else:
        answer = words(model, pixels, prompt, max_tokens)
    return {
        "picture": picture(image) | {"name": shown(name), "side": math.isqrt(vision.tokens)},
        "model": {"layers": text.layers, "heads": text.heads, "window": text.sliding_window},
        "prompt": shown(prompt),
        **answer,
    }
