"""Another attention, another mask, and the weights of an attention: model/seam.py."""

import pytest
import torch
import torch.nn.functional as F
from helpers import ROOT, apart, call, complaint, load, picture, python
from reference import ARCHITECTURES, random_inputs, save, tiny_paligemma

from infer import detect, evaluate, generate
from model.attention import attend, prefix_lm_mask
from train import fit

CALLS = []


def plain(q, k, v, mask, scale, cap=None):
    """The formula as it is written, each head by itself."""
    CALLS.append(tuple(q.shape))
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[1], dim=1) for x in (k, v))
    scores = q.transpose(1, 2) @ k.transpose(-1, -2) * scale  # [B, N, T, S]
    scores = scores if cap is None else torch.tanh(scores / cap) * cap
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None], -1e30)
    return (scores.softmax(-1) @ v).transpose(1, 2)


def sigmoid(q, k, v, mask, scale, cap=None):
    """Sums to anything, not to 1."""
    weights = torch.sigmoid(torch.einsum("btnh,bksh->btns", q, k[:, :1]) * scale)
    weights = weights if mask is None else weights * mask[:, :, None]
    return torch.einsum("btns,bsh->btnh", weights, v[:, 0]) / 8


def causal(valid, is_suffix):
    """The prefix does not read ahead."""
    return valid[:, None, :] & torch.ones(valid.shape[1], valid.shape[1], dtype=torch.bool).tril()


def blind(valid, is_suffix):
    """The answer does not read the first seven tokens of the image."""
    mask = prefix_lm_mask(valid, is_suffix)
    hidden = torch.arange(valid.shape[1]) < 7
    return mask & ~(is_suffix[:, :, None] & hidden)


@pytest.fixture(params=ARCHITECTURES)
def case(request, tmp_path):
    """A folder, images and tokens of each architecture."""
    hf = tiny_paligemma(**ARCHITECTURES[request.param])
    return save(hf, tmp_path), *random_inputs(hf, batch=2, length=9)


@torch.no_grad()
def test_another_attention_is_called_where_it_was_put(case):
    folder, images, tokens = case
    usual = load(folder)(images, tokens, 4)
    for tower, layers in (("text", ["decoder"]), ("vision", ["vision"]), ("both", ["vision", "decoder"])):
        model = load(folder, attention=plain, attention_in=tower)
        CALLS.clear()
        logits = model(images, tokens, 4)
        assert len(CALLS) == sum(len(getattr(model, part).layers) for part in layers)
        assert apart(logits, usual) <= 1e-4
        assert apart(load(folder, attention=sigmoid, attention_in=tower)(images, tokens, 4), usual) > 1e-3


@pytest.mark.parametrize("changes", [dict(attention=sigmoid), dict(mask=causal), dict(mask=blind)])
@torch.no_grad()
def test_steps_and_branches_follow(case, changes):
    """What is put in: one forward, steps with a cache, and branches in both forms give the same."""
    folder, images, tokens = case
    model, usual = load(folder, **changes), load(folder)
    at_once = model.hidden(images, tokens, 5)
    assert apart(at_once, usual.hidden(images, tokens, 5)) > 1e-3

    cache = model.new_cache(2, 9)
    steps = [model.prefill(model.encode(images), tokens[:, :5], cache)]
    steps += [model.step(token, cache) for token in tokens[:, 5:].T]
    assert apart(torch.stack(steps, 1), at_once[:, 4:]) <= 1e-4

    prompt = tokens[0, :5]  # the same for both images, as branches have it
    text = torch.cat((prompt.expand(2, -1), tokens[:, 5:]), dim=1)
    expected = model.hidden(images, text, 5)
    other = tokens[:, 5:].flip(1)
    branches = torch.stack((tokens[:, 5:], other), dim=1)  # [B, 2, 4]
    end, read = model.read_branches(model.encode(images), prompt, branches)
    assert apart(end, expected[:, 4]) <= 1e-4 and apart(read[:, 0], expected[:, 5:]) <= 1e-4

    cache = model.new_cache(2, 5 + 8)
    model.prefill(model.encode(images), prompt.expand(2, -1), cache)
    for depth in range(4):
        parents = [[0, 1]] + [[2 * d, 2 * d + 1] for d in range(depth)]
        parents = torch.tensor(sum(parents, [])).expand(2, -1)
        hidden = model.step_branches(branches[:, :, depth], parents, cache)
        assert apart(hidden[:, 0], expected[:, 5 + depth]) <= 1e-4


@torch.no_grad()
def test_recorded_weights(case):
    """Those of the formula; every query's sum to 1; none where the mask is closed; and nothing changes."""
    folder, images, tokens = case
    tokens[1, 7:] = 0  # padding
    model = load(folder)
    usual = model(images, tokens, 4)
    with model.record_attention() as maps:
        assert torch.equal(model(images, tokens, 4), usual)
    image_tokens = model.config.vision.tokens
    text, length = model.config.text, image_tokens + tokens.shape[1]
    assert list(maps) == list(range(text.layers))
    valid = torch.cat((torch.ones(2, image_tokens, dtype=torch.bool), tokens != 0), dim=1)
    is_suffix = (torch.arange(length) >= image_tokens + 4).expand(2, -1)
    closed = ~prefix_lm_mask(valid, is_suffix)
    for weights in maps.values():
        assert weights.shape == (2, text.heads, length, length)
        assert (weights.sum(-1) - 1).abs().max() < 1e-5
        assert weights.masked_select(closed[:, None]).abs().max() == 0
    assert all(block.attn.attend is attend for block in model.decoder.layers)

    with model.record_attention("vision") as seen:
        model.encode(images)
    layer = model.vision.layers[0]
    x = model.vision.patch_embedding(images).flatten(2).mT + model.vision.position_embedding.weight
    q, k = (part(layer.norm1(x)).unflatten(-1, (layer.attn.heads, -1)).transpose(1, 2)
            for part in (layer.attn.q_proj, layer.attn.k_proj))  # fmt: skip
    assert apart(seen[0], F.softmax(q @ k.mT * q.shape[-1] ** -0.5, dim=-1)) < 1e-5


@torch.no_grad()
def test_recording_steps_and_errors(tmp_path):
    """With a cache a pass is a step; of another attention its own weights are recorded; an error leaves the
    model as it was."""
    hf = tiny_paligemma()
    images, tokens = random_inputs(hf, batch=1, length=6)
    model = load(save(hf, tmp_path), attention=sigmoid)
    cache = model.new_cache(1, 8)
    for cache.whole in (True, False):  # as on a GPU, all slots of the cache, and those in use
        model.prefill(model.encode(images), tokens, cache)
        with model.record_attention() as maps:
            model.step(tokens[:, 0], cache)
        slots = model.config.vision.tokens + (8 if cache.whole else 6 + 1)
        assert maps[0].shape == (1, model.config.text.heads, 1, slots)
        assert (maps[0][..., model.config.vision.tokens + 6 + 1 :] == 0).all()
        assert (maps[0].sum(-1) - 1).abs().min() > 1e-3
    with pytest.raises(ValueError), model.record_attention():
        model(images, tokens, 99)
    assert all(block.attn.attend is sigmoid for block in model.decoder.layers)
    assert "none of text, vision, both" in complaint(lambda: model.record_attention("image").__enter__())


@pytest.mark.parametrize(
    "name, fault",
    [
        ("mine", "write package.module:function"),
        (":f", "write package.module:function"),
        ("no_such_module:f", "No module named"),
        ("broken_code:f", "invalid syntax"),
        ("model.attention:none_such", "none_such"),
        ("model.attention:torch", "is no function"),
    ],
)
def test_names_of_no_function(name, fault, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken_code.py").write_text("def f(:\n")
    for option in ("--attention", "--mask"):
        code, _, err = call(monkeypatch, capsys, detect, "--image", picture(tmp_path / "a.png"), option, name)
        assert code == 1 and fault in err and len(err.splitlines()) == 1


MINE = """
import torch
from model.attention import attend, prefix_lm_mask

def shut(q, k, v, mask, scale, cap=None):
    print("shut was called")
    return torch.zeros_like(q)

def noted(valid, is_suffix):
    print("noted was called")
    return prefix_lm_mask(valid, is_suffix)
"""


def test_every_program_takes_them(tmp_path, monkeypatch, capsys):
    """A file of the working folder, by its name, in each program that runs a model."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine_for_programs.py").write_text(MINE)
    own = "--attention", "mine_for_programs:shut", "--mask", "mine_for_programs:noted"
    image = picture(tmp_path / "a.png")
    runs = {
        detect: ["--image", image, "--out", tmp_path / "drawn"],
        generate: ["--image", image, "--prompt", "caption en", "--max-tokens", 2],
        evaluate: ["--count", 1, "--sets", "same"],
        fit: ["--model", "nano", "--out", tmp_path / "run", "--steps", 1, "--batch-size", 1, "--device",
              "cpu", "--workers", 0, "--val-every", 0],
    }  # fmt: skip
    for program, options in runs.items():
        code, out, err = call(monkeypatch, capsys, program, *options, *own)
        assert code == 0, err
        assert "shut was called" in out and "noted was called" in out, program


def test_as_a_command(tmp_path):
    """The working folder is searched by a program that is started as a file, too."""
    (tmp_path / "mine.py").write_text(MINE)
    image = picture(tmp_path / "a.png")
    program = ROOT / "infer" / "detect.py"
    assert "shut was called" in python(program, "--image", image, "--attention", "mine:shut", cwd=tmp_path)
