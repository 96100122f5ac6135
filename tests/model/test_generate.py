"""Free text: against transformers' generate, batches against single answers, and each way of choosing."""

import io

import pytest
import torch
from helpers import call
from PIL import Image
from reference import EOS, PAD, random_inputs, reference_inputs, save, tiny_paligemma

from infer import generate as program
from model import PaliGemma
from model.decoding.generate import Sampling, generate, sample

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


def test_seeds(both):
    hf, ours = both
    images, prompts = inputs(hf)
    hot = [
        answers(ours, images, prompts, Sampling(3.0), generator=torch.Generator().manual_seed(seed))[0]
        for seed in (0, 0, 1)
    ]
    assert torch.equal(hot[0], hot[1]) and not (hot[0].shape == hot[2].shape and torch.equal(hot[0], hot[2]))


def test_choosing():
    """Greedy, top-k and top-p by hand; frequencies of what is left."""
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
    }
    for sampling, ids in kept.items():
        found = sample(logits, sampling, uniform).bincount(minlength=4) / 20_000
        expected = torch.zeros(4).index_copy(0, torch.tensor(ids), p[ids] / p[ids].sum())
        assert ((found - expected).abs() < 0.015).all() and (found[expected == 0] == 0).all()


def test_refused(both):
    hf, ours = both
    images, prompts = inputs(hf)
    with pytest.raises(ValueError, match="positions for"):
        next(generate(ours, ours.encode(images), prompts, 100_000))
    with pytest.raises(ValueError, match="max_new_tokens 0"):
        next(generate(ours, ours.encode(images), prompts, 0))
    for bad in (dict(temperature=-1.0), dict(top_k=-1), dict(top_p=0.0)):
        with pytest.raises(ValueError, match="top-k"):
            Sampling(**bad)


# The program ------------------------------------------------------------------------------------------------


@pytest.fixture
def ask(model, tmp_path, monkeypatch, capsys):
    """Run generate.py on a picture, in this process: exit code, standard output, lines of standard error."""
    Image.new("RGB", (40, 30), "red").save(tmp_path / "a.png")
    monkeypatch.chdir(tmp_path)

    def ask(*options, lines=None):
        """lines: of standard input, text or bytes."""
        typed = b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines or [])
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(typed), "utf-8"))
        argv = "--image", "a.png", "--model", model, *options
        code, out, err = call(monkeypatch, capsys, program, *argv)
        return code, out, err.splitlines()

    return ask


def test_one_answer(ask):
    """The tokens of the library, as text, and nothing else on standard output; a seed repeats."""
    code, out, err = ask("--prompt", "detect all classes", "--max-tokens", "9")
    assert code == 0 and len(out.splitlines()) >= 1 and "9 tokens" in err[-1]
    assert ask("--prompt", "detect all classes", "--max-tokens", "9")[1] == out
    hot = ["--prompt", "a", "--temperature", "2", "--max-tokens", "9"]
    assert ask(*hot)[1] == ask(*hot)[1] != ask(*hot, "--seed", "1")[1]
    assert len(ask(*hot, "--samples", "3", "--eos-offset", "99")[1].splitlines()) >= 3


def test_conversation(ask):
    """Commands, mistakes and prompts in turn: each costs a line, and the end of input ends it."""
    lines = ["a", "", "/help", "/image none.png", "/image a.png", "/nonsense"]
    lines += ["word " * 2000, "detect zebras", b"\xff", "a"]
    code, out, err = ask("--max-tokens", "5", lines=lines)
    assert code == 0 and out.count("/image FILE") == 3
    answers = [line for line in err if line.endswith("a second")]
    mistakes = [line for line in err if line.startswith("generate.py: ")]
    assert len(answers) == 2 and len(mistakes) == 4
    for line, words in zip(mistakes, ("none.png: no such file", "positions", "zebra", "UTF-8"), strict=True):
        assert words in line


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--image", "none.png", "--prompt", "a"], "no such file"),
        (["--prompt", "a", "--max-tokens", "0"], "--max-tokens"),
        (["--prompt", "a", "--top-p", "2"], "top-p"),
        (["--prompt", "word " * 2000], "positions"),
        (["--prompt", "cat \udcff"], "UTF-8"),
        (["--prompt", "detect zebras"], "did you mean 'zebra'"),
        (["--prompt", "a", "--top-k", "3"], "temperature"),
        (["--prompt", "a", "--samples", "3"], "temperature"),
        (["--prompt", "  "], "--prompt is empty"),
        (["--prompt", "a", "--model", "nowhere/"], "nowhere"),
    ],
)
def test_a_mistake_is_one_line(ask, options, complaint):
    code, _, err = ask(*options)
    assert code and err[-1].startswith("generate.py: ") and complaint in err[-1]
    assert len(err) == 1 or err[0].startswith("usage: ")
