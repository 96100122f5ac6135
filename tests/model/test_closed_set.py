"""The closed-set language: its ids, the restricted choice, and decoding against transformers."""

import pytest
import torch
from reference import (
    ARCHITECTURES,
    EOS,
    LANGUAGE,
    LOC0,
    NOISE,
    UNUSED0,
    VOCAB,
    noisy,
    random_inputs,
    reference_inputs,
)
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LogitsProcessor

from model.config import COCO_CLASSES, VARIANTS
from model.decoding.closed_set import ClosedSet, GroupDecoder, choose
from model.decoding.generate import GREEDY, Sampling
from model.io.tokenizer import Tokenizer
from train.nano.untrained import nano_config

# Ids --------------------------------------------------------------------------------------------------------


def test_ids_of_a_checkpoint(tokenizer_file):
    """All from tokenizer and config: bos, the prompt, newline; 1,024 locations; 80 classes and noise."""
    tokenizer = Tokenizer(tokenizer_file)
    language = ClosedSet.of(nano_config(tokenizer), tokenizer)
    assert language.prompt == (2, *tokenizer.encode("detect all classes"), 108)
    assert language.loc0 == tokenizer.loc0 and language.eos == 1
    assert language.classes == COCO_CLASSES and language.noise == 7 + 80 == language.class0 + 80
    assert language.groups == nano_config(tokenizer).groups >= 12
    assert language.allowed(0) == (tokenizer.loc0, tokenizer.seg0)
    assert language.allowed(4) == (7, 88)
    official = ClosedSet.of(VARIANTS["paligemma2-3b-448"], tokenizer)
    assert official.groups == 51 and official.allowed(254) == (7, 88) and official.allowed(255) == (1, 2)


def test_allowed_ids():
    """y0 x0 y1 x1 class, again and again, then eos."""
    locations, classes = (LOC0, LOC0 + 1024), (UNUSED0, NOISE + 1)
    assert [LANGUAGE.allowed(i) for i in range(5 * GROUPS)] == ([locations] * 4 + [classes]) * GROUPS
    assert LANGUAGE.allowed(5 * GROUPS) == (EOS, EOS + 1)


# The choice -------------------------------------------------------------------------------------------------


def test_choose_by_hand():
    """Three classes and noise: the score counts noise, the choice does not."""
    p = torch.tensor([[0.1, 0.3, 0.2, 0.4], [0.2, 0.5, 0.1, 0.2]])
    choice = choose(p.log(), 10, True, True, GREEDY, torch.zeros(2))
    assert choice.best.tolist() == [11, 11] and choice.fed.tolist() == [13, 11]
    assert torch.allclose(choice.score, torch.tensor([0.3, 0.5]))
    assert torch.allclose(choice.noise, torch.tensor([0.4, 0.2]))
    fed = choose(p.log(), 10, True, False, GREEDY, torch.zeros(2)).fed
    assert fed.tolist() == [11, 11]
    drawn = choose(p.log(), 10, True, True, Sampling(1.0), torch.full((2,), 0.99))
    assert drawn.best.tolist() == [12, 12], "the last of the classes, not noise"


# Decoding ---------------------------------------------------------------------------------------------------


GROUPS = LANGUAGE.groups


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


def test_fewer_groups_are_a_beginning(tmp_path):
    hf, ours = noisy(tmp_path)
    images, _ = random_inputs(hf, batch=2)
    few, all_of_them = GroupDecoder(ours, LANGUAGE, groups=2)(images), GroupDecoder(ours, LANGUAGE)(images)
    assert torch.equal(few.tokens, all_of_them.tokens[:, :2])


@pytest.mark.parametrize("noise_feedback", [True, False], ids=["noise fed back", "noise replaced"])
@torch.no_grad()
def test_decoded_scores(noise_feedback, tmp_path):
    """Against one forward over the finished answer: every token the likeliest of those allowed, scores the
    softmax over the classes and noise, noise in it but never the answer."""
    hf, ours = noisy(tmp_path, window=10)
    images, _ = random_inputs(hf, batch=5, seed=3)
    answer = GroupDecoder(ours, LANGUAGE, noise_feedback=noise_feedback)(images)
    assert answer.tokens.shape == (5, GROUPS, 5) and answer.locs.shape == (5, GROUPS, 4)
    assert answer.labels.shape == answer.scores.shape == answer.noise.shape == (5, GROUPS)

    prompt = torch.tensor(LANGUAGE.prompt).expand(5, -1)
    text = torch.cat((prompt, answer.tokens.flatten(1)), dim=1)
    logits = ours(images, text, prompt.shape[1])[:, prompt.shape[1] - 1 : -1].unflatten(1, (GROUPS, 5))
    locs = logits[:, :, :4, LOC0 : LOC0 + 1024]
    assert torch.equal(answer.locs, locs.argmax(-1)) and torch.equal(
        answer.tokens[..., :4], answer.locs + LOC0
    )
    probabilities = logits[:, :, 4, UNUSED0 : NOISE + 1].softmax(-1)
    best, label = probabilities[..., :-1].max(-1)
    assert torch.equal(answer.labels, label) and torch.allclose(answer.scores, best, atol=1e-5)
    assert torch.allclose(answer.noise, probabilities[..., -1], atol=1e-5)
    assert (answer.labels < len(LANGUAGE.classes)).all()
    is_noise = answer.noise > answer.scores
    assert is_noise.any() and not is_noise.all(), "the test needs groups of both kinds"
    fed = torch.where(is_noise & noise_feedback, NOISE, UNUSED0 + label)
    assert torch.equal(answer.tokens[..., 4], fed)


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
