"""Cached decoding against the full forward."""

import pytest
import torch
from helpers import load
from reference import (
    ARCHITECTURES,
    difference,
    pad_right,
    random_inputs,
    reference_logits,
    save,
    tiny_paligemma,
)


def both(folder, seed=0, **architecture):
    """A transformers model and ours with the same weights."""
    hf = tiny_paligemma(seed, **architecture)
    return hf, load(save(hf, folder))


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_step_by_step_equals_at_once(name, whole, tmp_path):
    """Prompts of 4 and 7 tokens, then 8 more one by one: every position as in a forward of the whole text,
    whether steps read all slots of a cache, as on a GPU, or those in use."""
    hf, ours = both(tmp_path, **ARCHITECTURES[name])
    images, tokens = random_inputs(hf, batch=2, length=7)
    _, answers = random_inputs(hf, batch=2, length=8, seed=1)
    lengths = [4, 7]

    cache = ours.new_cache(batch=2, text_tokens=7 + 8 + 3)
    cache.whole = whole
    hidden = ours.prefill(ours.encode(images), pad_right(tokens, lengths), cache)
    cached = [ours.decoder.logits(hidden)]
    for answer in answers.T:
        cached.append(ours.decoder.logits(ours.step(answer, cache)))
    empty = 3 if whole else 0
    assert cache.valid.shape[1] == cache.positions.shape[1] == ours.config.vision.tokens + 7 + 8 + empty
    cached = torch.stack(cached, dim=1)  # [B, 9, vocab]: after the prompt, and after each token of the answer

    for i, length in enumerate(lengths):
        image, text = images[i : i + 1], torch.cat((tokens[i, :length], answers[i]))[None]
        at_once, theirs = ours(image, text, length), reference_logits(hf, image, text, length)
        last = slice(length - 1, None)
        assert difference(cached[i : i + 1], at_once[:, last], text[:, last]) <= 1e-4
        assert difference(cached[i : i + 1], theirs[:, last], text[:, last]) <= 2e-4


@torch.no_grad()
def test_padding_id_can_be_fed_back(tmp_path):
    """Padding is what stands right of a prompt; a generated 0 is a token like any other."""
    hf, ours = both(tmp_path)
    images, tokens = random_inputs(hf, batch=1, length=5)
    cache = ours.new_cache(1, 5 + 2)
    hidden = ours.prefill(ours.encode(images), tokens, cache)
    after = [ours.decoder.logits(ours.step(torch.tensor([id]), cache)) for id in (0, 700)][-1]
    other = ours.prefill(ours.encode(images), tokens, cache)  # which forgets what was there
    after_another = [ours.decoder.logits(ours.step(torch.tensor([id]), cache)) for id in (400, 700)][-1]
    assert torch.equal(hidden, other)
    assert (after - after_another).abs().max() > 1e-3


@torch.no_grad()
def test_full_cache(tmp_path):
    hf, ours = both(tmp_path)
    images, tokens = random_inputs(hf, batch=1, length=5)
    cache = ours.new_cache(1, 5 + 1)
    ours.prefill(ours.encode(images), tokens, cache)
    ours.step(tokens[:, 0], cache)
    with pytest.raises(ValueError, match="cache has 22 slots"):
        ours.step(tokens[:, 0], cache)
