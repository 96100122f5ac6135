"""The losses: over the ids allowed, over the vocabulary, of the helper head; and how they are averaged."""

from functools import partial

import numpy as np
import pytest
import torch
from helpers import language_of, random_objects, torchrun
from reference import LANGUAGE, LOC0, NOISE, UNUSED0, VOCAB
from training import first_batch, launch, metrics, plain_loss, run, weights, weights_apart

from model import PaliGemma
from model.config import TextConfig
from model.gemma import Gemma
from model.io.tokenizer import Tokenizer
from train import fit as train
from train.data.open import open_data
from train.data.samples import collate
from train.data.targets import Noise, closed_set_target
from train.loss import allowed_loss, vocabulary_loss
from train.practice.dataset import PROMPTS_PER_SCENE, PracticeScenes

# Over the ids allowed ---------------------------------------------------------------------------------------


G = LANGUAGE.groups


def random_target(seed: int, objects: int):
    """Of an image with random objects."""
    boxes, labels = random_objects(np.random.default_rng(seed), objects, 128, 128, len(LANGUAGE.classes))
    return closed_set_target(np.random.default_rng(seed), boxes, labels, 128, 128, LANGUAGE, 1)


def tiny_decoder(final_cap, seed=0):
    torch.manual_seed(seed)
    config = TextConfig(2, 32, 1, 2, 1, 8, 48, 8**-0.5, final_cap=final_cap, vocab_size=VOCAB)
    return Gemma(config)


def slow_loss(decoder, hidden, tokens, weights):
    """Logits of the whole vocabulary in float64, all but the allowed ids struck out, token by token."""
    embed, cap, total, weight = decoder.embed.weight.double(), decoder.config.final_cap, 0.0, 0.0
    for row in range(len(tokens)):
        for position in range(tokens.shape[1] - 1):
            logits = embed @ hidden[row, position].double()
            logits = logits if cap is None else cap * torch.tanh(logits / cap)
            allowed = torch.full_like(logits, -torch.inf)
            ids = slice(LOC0, LOC0 + 1024) if position % 5 < 4 else slice(UNUSED0, NOISE + 1)
            allowed[ids] = logits[ids]
            total -= weights[row, position].double() * allowed.log_softmax(0)[tokens[row, position]]
            weight += weights[row, position].double()
    return total / weight


@pytest.mark.parametrize("final_cap", [None, 3.0], ids=["no cap", "cap"])
def test_loss(final_cap):
    """Equals the slow one, and so do its gradients; eos has no part in it."""
    decoder = tiny_decoder(final_cap)
    targets = [random_target(seed, n) for seed, n in enumerate((2, G, 0))]
    tokens, weights = (
        torch.tensor(np.stack([getattr(t, k) for t in targets])) for k in ("tokens", "weights")
    )
    hidden = torch.randn(3, 5 * G + 1, 32, generator=torch.Generator().manual_seed(1))
    ours, slow = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    loss = allowed_loss(decoder, ours, tokens, weights, LANGUAGE) / weights[:, :-1].sum()
    reference = slow_loss(decoder, slow, tokens, weights)
    assert loss.dtype == torch.float32 and abs(loss.item() - reference.item()) < 1e-5
    loss.backward(), reference.backward()
    assert torch.allclose(ours.grad, slow.grad, atol=1e-6) and ours.grad.abs().max() > 1e-3
    assert (ours.grad[:, -1] == 0).all(), "eos is the only id allowed: nothing to learn"
    assert (ours.grad[2, :-1].unflatten(0, (G, 5))[:, :4] == 0).all(), "noise boxes are not learnt"
    assert (ours.grad[2, :-1].unflatten(0, (G, 5))[:, 4] != 0).any(), "that they are noise is"


def test_loss_in_bfloat16():
    """Under autocast, as in training: the softmax is in float32."""
    decoder = tiny_decoder(None)
    target = random_target(0, 3)
    tokens, weights = torch.tensor(target.tokens)[None], torch.tensor(target.weights)[None]
    hidden = torch.randn(1, 5 * G + 1, 32, generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", torch.bfloat16):
        loss = allowed_loss(decoder, hidden, tokens, weights, LANGUAGE) / weights[:, :-1].sum()
    assert loss.dtype == torch.float32
    assert abs(loss.item() - slow_loss(decoder, hidden, tokens, weights).item()) < 0.02


def test_loss_sums_are_float32(tiny):
    """Whatever the weights of the positions are: 300 times 1 is 300, in bfloat16 it would stop at 256."""
    decoder = PaliGemma.from_pretrained(str(tiny), dtype=torch.bfloat16).decoder
    language = language_of(tiny)
    hidden = torch.randn(1, 300, decoder.config.width, dtype=torch.bfloat16)
    labels, ones = torch.full((1, 300), language.loc0), torch.ones(1, 300, dtype=torch.bfloat16)
    for loss in (vocabulary_loss, partial(allowed_loss, language=language)):
        rounded, exact = (loss(decoder, hidden, labels, w) for w in (ones, ones.float()))
        assert rounded.dtype == torch.float32 and rounded.item() == pytest.approx(exact.item(), rel=1e-5)


# Over the vocabulary ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("final_cap", [None, 3.0])
def test_vocabulary_loss(final_cap, tiny, monkeypatch):
    """Equals the loss of all logits at once, gradients included, whatever the chunks."""
    torch.manual_seed(0)
    config = PaliGemma.from_pretrained(str(tiny), final_cap=final_cap).config.text
    decoder = Gemma(config)
    hidden = torch.randn(2, 9, config.width)
    labels, weights_ = torch.randint(config.vocab_size, (2, 9)), torch.rand(2, 9).round(decimals=1)
    weights_[:, :3] = 0
    ours, theirs, weight = (
        hidden.clone().requires_grad_(),
        hidden.clone().requires_grad_(),
        decoder.embed.weight,
    )
    want = torch.nn.functional.cross_entropy(
        decoder.logits(theirs).flatten(0, 1), labels.flatten(), reduction="none"
    )
    want = (want * weights_.flatten()).sum()
    (0.5 * want).backward()
    want_weight, weight.grad = weight.grad, None
    monkeypatch.setattr("train.loss.CHUNK", 5)
    loss = vocabulary_loss(decoder, ours, labels, weights_)
    (0.5 * loss).backward()
    assert abs(loss.item() - want.item()) < 1e-3 and torch.allclose(ours.grad, theirs.grad, atol=1e-5)
    assert torch.allclose(weight.grad, want_weight, atol=1e-5) and want_weight.abs().max() > 1e-2
    weight.requires_grad_(False)  # as under an adapter
    again = hidden.clone().requires_grad_()
    (0.5 * vocabulary_loss(decoder, again, labels, weights_)).backward()
    assert torch.equal(again.grad, ours.grad)


def test_no_logits_of_all_positions(tiny, monkeypatch):
    """Only supervised positions meet the head, and in closed-set training only the allowed rows of it."""
    torch.manual_seed(0)
    decoder = Gemma(PaliGemma.from_pretrained(str(tiny)).config.text)
    sizes = []
    whole = decoder.logits
    monkeypatch.setattr(
        decoder, "logits", lambda h, *r: sizes.append((len(h), whole(h, *r).shape[-1])) or whole(h, *r)
    )
    language = language_of(tiny)
    labels = torch.tensor([[5, language.loc0 + 3, language.noise, language.loc0, language.eos]])
    weights_ = torch.tensor([[0.0, 1, 0.5, 0, 1]])
    allowed_loss(decoder, torch.randn(1, 5, 48), labels, weights_, language)
    assert sizes == [(1, 1024), (1, 81)]
    linear = torch.nn.functional.linear
    monkeypatch.setattr("train.loss.F.linear", lambda h, w: sizes.append((len(h), len(w))) or linear(h, w))
    monkeypatch.setattr("train.loss.CHUNK", 2)
    vocabulary_loss(decoder, torch.randn(1, 5, 48), labels, weights_)
    assert sizes[2:] == [(2, decoder.config.vocab_size), (1, decoder.config.vocab_size)]


# Averages ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mean", ["token", "example"])
@pytest.mark.parametrize("kind", ["pairs", "scenes", "practice"])
def test_loss_of_a_step(kind, mean, tiny, scenes, pairs, tmp_path):
    """The loss that is logged, of texts of different lengths and of detection over the whole vocabulary with
    its eos, is the plain one; micro-batches change nothing."""
    noise = Noise() if kind == "pairs" else Noise(weight=1, disguise=0)
    options = f"--patch-weight 0 --loss vocabulary --loss-mean {mean}"
    options += "" if kind == "pairs" else " --noise-weight 1 --noise-disguise 0"
    if kind == "practice":
        data = PracticeScenes(language_of(tiny), 64, 16, noise=noise)
        samples = [data[i, i] for i in range(4)]
    else:
        file = scenes if kind == "scenes" else pairs
        options += f" --data {file}"
        model = PaliGemma.from_pretrained(str(tiny), dtype=torch.float32)
        samples = first_batch(open_data(file, None, model, Tokenizer(tiny), 0, False, noise=noise))
    assert all(sample["labels"][-1] == 1 and sample["weights"][-1] == 1 for sample in samples)  # eos
    expected = plain_loss(tiny, samples, mean)
    for accumulate in (1, 2, 4):
        out = tmp_path / str(accumulate)
        run(tiny, out, f"{options} --steps 2 --accumulate {accumulate}")
        assert metrics(out)[0]["loss"] == pytest.approx(expected, abs=2e-4)
        assert weights_apart(weights(tmp_path / "1" / "step-0000002"), weights(out / "step-0000002")) < 1e-4
    if kind == "pairs":
        other = plain_loss(tiny, samples, "token" if mean == "example" else "example")
        assert abs(other - expected) > 2e-3, "the test needs means that differ"


def test_weights_of_an_example():
    """Whatever its length and its weights, a text counts as one; padding and prompt stay at 0."""
    samples = [
        dict(weights=torch.tensor(w), text=torch.ones(len(w), dtype=torch.int64))
        for w in ([0.0, 1, 1], [0.0, 0.5, 1, 0, 1, 1])
    ]
    batch = collate(samples, multiple=4, per_example=True)
    assert batch["weights"].shape == (2, 8) and batch["weights"].sum(1).tolist() == pytest.approx([1, 1])
    assert batch["weights"][0].tolist() == pytest.approx([0, 0.5, 0.5, 0, 0, 0, 0, 0])
    assert batch["weights"][1, 1] * 2 == batch["weights"][1, 2] and batch["weights"][1, 6:].sum() == 0
    assert collate(samples)["weights"].sum() == 5.5


def test_loss_mean_in_two_processes(tiny, pairs, tmp_path):
    """Two processes and micro-batches of one text each, of other lengths, do what one process does."""
    options = f"--patch-weight 0 --data {pairs} --loss-mean example --steps 3 --save-every 3"
    run(tiny, tmp_path / "one", options)
    launch(tiny, tmp_path / "two", f"{options} --accumulate 2", torchrun(2))
    assert weights_apart(*(weights(tmp_path / name / "step-0000003") for name in ("one", "two"))) <= 1e-4
    one, two = ([line["loss"] for line in metrics(tmp_path / name)] for name in ("one", "two"))
    assert one == pytest.approx(two, abs=2e-4)


# The helper head --------------------------------------------------------------------------------------------


def test_helper_loss_of_micro_batches(tiny, tmp_path):
    """The helper head's losses of the parts have the mean of the whole."""
    for name, more in (("plain", ""), ("parts", "--accumulate 2")):
        run(tiny, tmp_path / name, f"--patch-weight 1 --steps 3 {more}")
    assert weights_apart(*(weights(tmp_path / name / "step-0000003") for name in ("plain", "parts"))) < 1e-4


def test_helper_head_on_an_adapters_base(tiny, tmp_path):
    """Its weights are float32, the image tokens of an adapter's base bfloat16."""
    run(tiny, tmp_path / "run", "--lora --steps 2 --patch-weight 1")
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 2]


# Several prompts an image -----------------------------------------------------------------------------------


def test_an_image_is_encoded_once(all_tasks, with_codec):
    """The loss of a batch with several prompts an image is that of all pairs of image and prompt."""
    model = PaliGemma.from_pretrained(str(with_codec), dtype=torch.float32)
    objective = train.Objective(model, None)
    batch = collate([all_tasks[i, i] for i in range(2)]) | {"total": torch.ones(())}
    pairs = batch | {"image": batch["image"].repeat_interleave(PROMPTS_PER_SCENE, 0)}
    with torch.no_grad():
        assert torch.allclose(objective(batch)[0], objective(pairs)[0], rtol=1e-5)
        reordered = batch | {"image": batch["image"].flip(0)}
        assert not torch.allclose(objective(batch)[0], objective(reordered)[0], rtol=1e-5)
