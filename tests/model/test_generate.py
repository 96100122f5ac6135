"""Answers in any words: against transformers, in batches, sampled, and never an id that is no text."""

from itertools import islice
from types import SimpleNamespace

import pytest
import torch
from reference import EOS, PAD, random_inputs, reference_inputs, save, tiny_paligemma

from model import PaliGemma
from model.config import VARIANTS
from model.decoding.generate import Sampling, generate, nucleus, sample
from model.decoding.generate import generate as generate_ids
from model.io.hub import resolve
from model.io.tokenizer import LOCS, SEGS, Tokenizer
from model.io.weights import load_config

COUNT = 12


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    hf, folders = tiny_paligemma(3), tmp_path_factory.mktemp("g")
    ours = PaliGemma.from_pretrained(str(save(hf, folders / "a")), dtype=torch.float32)
    tokens, _ = answers(ours, *inputs(hf))
    with torch.no_grad():  # eos becomes likelier than something that is said in the middle of an answer
        weight = hf.get_input_embeddings().weight
        weight[EOS] = 1.1 * weight[tokens[0, 4]]
    return hf, PaliGemma.from_pretrained(str(save(hf, folders / "b")), dtype=torch.float32)


def inputs(hf, batch=6):
    images, tokens = random_inputs(hf, batch=batch, length=8)
    return images, [row[: 3 + i].tolist() for i, row in enumerate(tokens)]  # 3 to 8 tokens


def answers(ours, images, prompts, *args, **kwargs):
    steps = list(generate(ours, ours.encode(images), prompts, COUNT, *args, **kwargs))
    return tuple(torch.stack(column, dim=1) for column in zip(*steps, strict=True))


def alone(ours, images, prompts, i, *args, **kwargs):
    tokens, log_p = answers(ours, images[i : i + 1], prompts[i : i + 1], *args, **kwargs)
    return tokens[0], log_p[0]


def test_greedy_equals_transformers(both):
    """Prompts of different lengths in one batch: what transformers generates for each alone."""
    hf, ours = both
    images, prompts = inputs(hf)
    tokens, log_p = answers(ours, images, prompts)
    ended = 0
    for i, prompt in enumerate(prompts):
        text = torch.tensor([prompt])
        theirs = reference_inputs(hf, images[i : i + 1], text, len(prompt))
        out = hf.generate(
            **theirs, max_new_tokens=COUNT, do_sample=False, eos_token_id=EOS, pad_token_id=PAD,
            output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
        want = out.sequences[0, theirs["input_ids"].shape[1] :]
        assert torch.equal(tokens[i, : len(want)], want) and (tokens[i, len(want) :] == PAD).all()
        their_log_p = (
            torch.stack(out.logits, dim=1)[0].float().log_softmax(-1).gather(-1, want[:, None])[:, 0]
        )
        assert torch.allclose(log_p[i, : len(want)], their_log_p, atol=1e-4)
        assert (log_p[i, len(want) :] == 0).all()
        ended += want[-1].item() == EOS
    assert 0 < ended < len(prompts), "the test needs answers that end, and answers that do not"


def test_batch_equals_one_by_one(both):
    hf, ours = both
    images, prompts = inputs(hf)
    tokens, log_p = answers(ours, images, prompts)
    for i in range(len(prompts)):
        one, its_log_p = alone(ours, images, prompts, i)
        assert torch.equal(tokens[i, : len(one)], one)
        assert torch.allclose(log_p[i, : len(one)], its_log_p, atol=1e-5)


def test_eos_offset(both):
    """Answers become longer; without end if the offset is large."""
    hf, ours = both
    images, prompts = inputs(hf)
    lengths = []
    for offset in (0.0, 1.0, 1000.0):
        tokens, _ = answers(ours, images, prompts, Sampling(eos_offset=offset))
        lengths.append((tokens != PAD).sum().item())
    assert lengths == sorted(lengths) and lengths[0] < lengths[2] == COUNT * len(prompts)


# Sampling ---------------------------------------------------------------------------------------------------


def test_seeds(both):
    hf, ours = both
    images, prompts = inputs(hf)
    hot = [
        answers(ours, images, prompts, Sampling(3.0), generator=torch.Generator().manual_seed(seed))[0]
        for seed in (0, 0, 1)
    ]
    assert torch.equal(hot[0], hot[1]) and not (hot[0].shape == hot[2].shape and torch.equal(hot[0], hot[2]))


def test_choosing():
    """Greedy, top-k, top-p and temperature by hand; frequencies of what is left."""
    p = torch.tensor([0.4, 0.1, 0.3, 0.2])
    logits = p.log().expand(20_000, -1)
    uniform = torch.rand(20_000, generator=torch.Generator().manual_seed(0))
    kept = {
        Sampling(): [0],
        Sampling(1.0, top_k=1): [0],
        Sampling(1.0, top_k=2): [0, 2],
        Sampling(1.0, top_p=0.65): [0, 2],
        Sampling(1.0, top_k=3, top_p=0.75): [0, 2],
        Sampling(1.0): [0, 1, 2, 3],
        Sampling(1.0, top_k=9): [0, 1, 2, 3],
        Sampling(2.0): [0, 1, 2, 3],
    }
    for sampling, ids in kept.items():
        found = sample(logits, sampling, uniform).bincount(minlength=4) / 20_000
        likely = p[ids] ** (1 / (sampling.temperature or 1))
        expected = torch.zeros(4).index_copy(0, torch.tensor(ids), likely / likely.sum())
        assert ((found - expected).abs() < 0.015).all() and (found[expected == 0] == 0).all()


def test_nucleus():
    p = torch.tensor([[0.5, 0.1, 0.3, 0.1], [0.1, 0.2, 0.3, 0.4]])
    kept = {0.4: [[0], [3]], 0.5: [[0], [2, 3]], 0.75: [[0, 2], [1, 2, 3]], 0.85: [[0, 1, 2, 3], [1, 2, 3]]}
    for top_p, rows in kept.items():
        assert [row.nonzero()[:, 0].tolist() for row in nucleus(p, top_p)] == rows


def test_refused(both):
    hf, ours = both
    images, prompts = inputs(hf)
    with pytest.raises(ValueError, match="positions for"):
        next(generate(ours, ours.encode(images), prompts, 100_000))
    with pytest.raises(ValueError, match="max_new_tokens 0"):
        next(generate(ours, ours.encode(images), prompts, 0))
    for bad in (
        dict(temperature=-1.0), dict(temperature=float("nan")), dict(top_k=-1), dict(top_k=3),
        dict(temperature=1.0, top_p=0.0), dict(temperature=1.0, top_p=1.1),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="top-k"):
            Sampling(**bad)


# Ids that are no text ---------------------------------------------------------------------------------------


def config_and_ids(name):
    """A config, and how many ids its tokenizer has."""
    if name == "nano":
        return load_config("nano"), Tokenizer(resolve("nano")).size
    return VARIANTS[name], 256_000 + LOCS + SEGS  # Gemma's pieces, locations and segmentation codes


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("name", ["nano", "paligemma-3b-224", "paligemma2-3b-224"])
def test_ids_that_are_no_text_are_never_generated(name, temperature):
    """<image>, and the rows that only fill the embedding up to a multiple of 64: likeliest, and not chosen.
    The last id that the tokenizer has may be."""
    config, size = config_and_ids(name)
    assert config.image_token == size < config.text.vocab_size
    wanted = [size, size + 1, config.text.vocab_size - 1, size - 1]

    def logits(hidden):
        scores = torch.zeros(1, config.text.vocab_size)
        scores[:, 500], scores[:, size - 1] = 50, 60 * (wanted[hidden] == size - 1)
        scores[:, wanted[hidden]] += 100
        return scores

    step = iter(range(len(wanted)))
    model = SimpleNamespace(
        config=config,
        new_cache=lambda *args: None,
        prefill=lambda *args: next(step),
        step=lambda *args: next(step),
        decoder=SimpleNamespace(logits=logits),
    )
    image_tokens = torch.zeros(1, config.vision.tokens, 1)
    steps = generate_ids(model, image_tokens, [[config.bos]], len(wanted), Sampling(temperature))
    assert [int(tokens) for tokens, _ in islice(steps, len(wanted))] == [500, 500, 500, size - 1]
