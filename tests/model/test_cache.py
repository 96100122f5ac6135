"""Cached decoding against the full forward, and closed-set decoding against transformers' generate."""

import pytest
import torch
from helpers import load
from reference import (
    EOS,
    LANGUAGE,
    LOC0,
    NOISE,
    UNUSED0,
    VOCAB,
    difference,
    noisy,
    pad_right,
    random_inputs,
    reference_inputs,
    reference_logits,
    save,
    tiny_paligemma,
)
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LogitsProcessor

from model.decoding.closed_set import GroupDecoder

ARCHITECTURES = {
    "gemma1": dict(family="gemma"),
    "gemma2": dict(),
    "window shorter than the image": dict(window=10, layers=4),
    "window shorter than the answer": dict(window=3, layers=4),
    "one kv head, no caps": dict(kv_heads=1, attn_cap=None, final_cap=None),
    "window of one": dict(window=1),
}
GROUPS = LANGUAGE.groups


def both(folder, seed=0, **architecture):
    """A transformers model and ours with the same weights."""
    hf = tiny_paligemma(seed, **architecture)
    return hf, load(save(hf, folder))


# Any text ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_step_by_step_equals_at_once(name, tmp_path):
    """Prompts of 4 and 7 tokens, then 8 more one by one: every position as in a forward of the whole text."""
    hf, ours = both(tmp_path, **ARCHITECTURES[name])
    images, tokens = random_inputs(hf, batch=2, length=7)
    _, answers = random_inputs(hf, batch=2, length=8, seed=1)
    lengths = [4, 7]

    cache = ours.new_cache(batch=2, text_tokens=7 + 8)
    hidden = ours.prefill(ours.encode(images), pad_right(tokens, lengths), cache)
    cached = [ours.decoder.logits(hidden)]
    for answer in answers.T:
        cached.append(ours.decoder.logits(ours.step(answer, cache)))
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


GROUPS = LANGUAGE.groups


# The closed-set language ------------------------------------------------------------------------------------


class OnlyGroups(LogitsProcessor):
    """The closed-set language for transformers: four locations, then a class or noise. Notes the answers."""

    def __init__(self, prompt_length: int, noise_feedback: bool):
        self.prompt_length, self.noise_feedback = prompt_length, noise_feedback
        self.labels, self.scores, self.noise = [], [], []

    def __call__(self, input_ids, scores):
        position = (input_ids.shape[1] - self.prompt_length) % 5
        first, last = (LOC0, LOC0 + 1024) if position < 4 else (UNUSED0, NOISE + 1)
        if position == 4:
            score, label = scores[:, first:last].softmax(-1)[:, :-1].max(-1)
            self.labels.append(label), self.scores.append(score)
            self.noise.append(scores[:, NOISE] > scores[:, first:NOISE].amax(-1))
            last -= not self.noise_feedback
        allowed = torch.full_like(scores, -torch.inf)
        allowed[:, first:last] = scores[:, first:last]
        return allowed


@pytest.mark.parametrize("noise_feedback", [True, False], ids=["noise fed back", "noise replaced"])
@pytest.mark.parametrize("name", sorted(ARCHITECTURES.keys() - {"window of one"}))
def test_closed_set_decoding(name, noise_feedback, tmp_path):
    """Token for token what transformers generates under the same rules, with the same labels and scores.

    Not with a window of one: transformers' cache then keeps all keys (keys[-1 + 1 :]), unlike its forward.
    """
    hf, ours = noisy(tmp_path, **ARCHITECTURES[name])
    images, _ = random_inputs(hf, batch=4, seed=2)
    prompt = torch.tensor(LANGUAGE.prompt).expand(len(images), -1)
    inputs = reference_inputs(hf, images, prompt, prompt.shape[1])
    rules = OnlyGroups(inputs["input_ids"].shape[1], noise_feedback)
    generated = hf.generate(**inputs, max_new_tokens=5 * GROUPS, do_sample=False, logits_processor=[rules])
    theirs = generated[:, inputs["input_ids"].shape[1] :].unflatten(1, (GROUPS, 5))
    noise = torch.stack(rules.noise, dim=1)
    assert noise.any() and not noise.all(), "the test needs groups of both kinds"

    answer = GroupDecoder(ours, LANGUAGE, noise_feedback=noise_feedback)(images)
    assert torch.equal(answer.tokens, theirs)
    assert (theirs[..., 1:4] != theirs[..., :3]).any(), "the test needs answers of more than one id"
    assert ((theirs[..., 4] == NOISE) == (noise & noise_feedback)).all()
    assert torch.equal(answer.locs, theirs[..., :4] - LOC0)
    assert torch.equal(answer.labels, torch.stack(rules.labels, dim=1))
    assert torch.allclose(answer.scores, torch.stack(rules.scores, dim=1), atol=1e-5)
    assert torch.equal(answer.noise > answer.scores, noise)


def test_allowed_ids():
    """y0 x0 y1 x1 class, again and again, then eos."""
    locations, classes = (LOC0, LOC0 + 1024), (UNUSED0, NOISE + 1)
    assert [LANGUAGE.allowed(i) for i in range(5 * GROUPS)] == ([locations] * 4 + [classes]) * GROUPS
    assert LANGUAGE.allowed(5 * GROUPS) == (EOS, EOS + 1)


def test_fewer_groups_are_a_beginning(tmp_path):
    hf, ours = noisy(tmp_path)
    images, _ = random_inputs(hf, batch=2)
    few, all_of_them = GroupDecoder(ours, LANGUAGE, groups=2)(images), GroupDecoder(ours, LANGUAGE)(images)
    assert torch.equal(few.tokens, all_of_them.tokens[:, :2])


class Sizes(TorchDispatchMode):
    """Collects the last dimension of everything that is computed."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.dim():
            self.seen.add(out.shape[-1])
        return out


def test_no_logits_of_the_whole_vocabulary(tmp_path):
    """A token needs 1,024 or a few logits, never the vocabulary's; and the image is looked at once."""
    hf, ours = noisy(tmp_path)
    images, tokens = random_inputs(hf, batch=2)
    looks = []
    ours.vision.register_forward_hook(lambda *_: looks.append(1))
    with Sizes() as sizes:
        GroupDecoder(ours, LANGUAGE)(images)
    assert 1024 in sizes.seen and VOCAB not in sizes.seen
    assert len(looks) == 1
    with Sizes() as sizes, torch.no_grad():
        ours(images, tokens, 5)
    assert VOCAB in sizes.seen, "the ruler works"
