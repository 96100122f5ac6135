"""A model that computes NaN is an error in every way of decoding, not an answer in which nothing is found."""

import math

import pytest
import torch
from helpers import complaint, load
from PIL import Image

from model import Detector
from model.decoding.closed_set import ClosedSet
from model.decoding.generate import Sampling, generate

IMAGES = [Image.new("RGB", (40, 30), color) for color in ("red", "blue")]


def spoil(model, where: str, value: float):
    """Put a value where only some logits, or only those after some token, are not finite."""
    language = ClosedSet.of(model.config, model.tokenizer)
    weight = model.decoder.embed.weight.data
    if where == "everywhere":
        model.decoder.norm.weight.data[3] = value
    elif where == "a late layer":
        model.decoder.layers[-1].mlp.down_proj.weight.data[0, 0] = value
    elif where == "the image":
        model.vision.norm.bias.data[0] = value
    elif where == "locations":
        weight[language.loc0 : language.loc0 + 1024, 0] = value
    elif where == "a location":
        weight[language.loc0 + 7, 0] = value
    else:
        weight[language.noise, 0] = value
    return model


ANYWHERE = [(where, math.nan) for where in ("everywhere", "a late layer", "the image", "a location", "noise")]
# What is infinite in a layer is NaN after the next norm. (A soft cap would make infinite logits finite.)
ANYWHERE += [("a late layer", math.inf), ("the image", -math.inf)]


@pytest.mark.parametrize("decode", ["sequence", "parallel"])
@pytest.mark.parametrize(("where", "value"), [*ANYWHERE, ("locations", math.nan)])
def test_closed_set(where, value, decode, model):
    detector = Detector(spoil(load(model), where, value), decode=decode)
    message = complaint(detector, IMAGES)
    assert "NaN" in message and "weights" in message


def test_closed_set_after_a_good_batch(model):
    """NaN that only a later batch meets, in buffers that served a good one, and the other way round."""
    broken = load(model)
    detector, bias = Detector(broken), broken.vision.norm.bias.data
    detector(IMAGES)
    good = bias.clone()
    bias[0] = math.nan
    complaint(detector, IMAGES)
    bias.copy_(good)
    assert len(detector(IMAGES)) == 2


@pytest.mark.parametrize(("where", "value"), ANYWHERE)
def test_open_set_and_text(where, value, model):
    """Text may be any token, so one bad row of the embedding spoils all probabilities."""
    broken = spoil(load(model), where, value)
    assert "NaN" in complaint(Detector(broken), IMAGES, classes=["cat", "dog"])
    for sampling in (None, Sampling(temperature=1.0, top_p=0.9)):
        assert "NaN" in complaint(broken.generate, IMAGES[0], "caption en", sampling=sampling)


def test_the_other_answers_of_a_batch(model):
    """Tokens come until all answers have ended; then one that was broken is an error."""
    broken = load(model)
    tokens = broken.encode(torch.zeros(2, 3, 64, 64))
    tokens[1] = math.nan
    prompt = broken.tokenizer.encode_prompt("caption en")
    steps = generate(broken, tokens, [prompt, prompt], 5, Sampling(eos_offset=1000))
    for _ in range(5):
        _, log_p = next(steps)
        assert log_p[0].isfinite()
    assert "NaN" in complaint(next, steps)
