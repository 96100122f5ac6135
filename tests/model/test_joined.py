"""Matrices joined for decoding: the same answers as from separate ones, in every form of the model."""

import copy
import weakref
from functools import partial

import pytest
import torch
from helpers import load
from reference import random_inputs, save, tiny_paligemma
from torch import nn

from infer.lib.knock_out import without_head, without_layer
from model import PaliGemma
from model.decoding import packing
from model.decoding.detector import closed_set_decoder
from model.decoding.joined import fix_norms, join
from model.decoding.layouts import Int8Linear, PlanesLinear
from model.decoding.packing import load_for_decoding, quantize
from model.gemma import RMSNorm
from model.lora import add_lora, lora_layers
from model.seam import replace_attention


def joined(model: PaliGemma) -> PaliGemma:
    model = copy.deepcopy(model)
    join(model)
    return model


@torch.inference_mode()
def hidden_states(model: PaliGemma, images, tokens) -> list[torch.Tensor]:
    """Of a whole sequence; of the end of the prefill, whose last block computes one position; of steps of one
    token and of branches."""
    found, (B, T) = [model.hidden(images, tokens, 3)], tokens.shape
    cache = model.new_cache(B, T + 2)
    found.append(model.prefill(model.encode(images), tokens[:, :3], cache))
    found += [model.step(token, cache) for token in tokens[:, 3:].T]
    parents = torch.arange(2).expand(B, -1)
    found.append(model.step_branches(tokens[:, :2], parents, cache))
    return found


def without_softmax(q, k, v, mask, scale, cap=None):
    """An attention that is not the project's own, and wants its heads repeated."""
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[1], dim=1) for x in (k, v))
    weights = torch.einsum("btnh,bnsh->bnts", q, k).sigmoid() * scale * mask[:, None]
    return torch.einsum("bnts,bnsh->btnh", weights, v)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("change", ["", "attention", "rotation", "adapter", "int8"])
def test_joined_equals_separate(version, change, tmp_path, monkeypatch):
    """Both versions of Gemma; with another attention and another rotation; next to an adapter; in 8 bits."""
    hf = tiny_paligemma(family="gemma" if version == 1 else "gemma2")
    model = PaliGemma.from_pretrained(str(save(hf, tmp_path)), dtype=torch.float32)
    assert model.config.text.version == version
    if change == "attention":
        replace_attention(model, without_softmax)
    if change == "rotation":
        for block in model.decoder.layers:
            block.attn.rotate = lambda x, rope: x
    if change == "adapter":
        add_lora(model, r"decoder\.layers\.\d+\.(attn\.v|mlp\.gate)_proj")
        for layer in lora_layers(model).values():
            layer.B.data.normal_()
    other = joined(model)
    if change == "int8":
        with monkeypatch.context() as patch:
            patch.setattr(packing, "join_block", lambda block: None)
            quantize(model)
        quantize(other)
    attn, mlp = other.decoder.layers[1].attn, other.decoder.layers[1].mlp
    if change == "adapter":
        assert attn.qkv_proj is None and mlp.gate_up_proj is None and len(lora_layers(other)) > 1
    else:
        assert attn.q_proj is None and mlp.up_proj is None
        assert isinstance(attn.qkv_proj, (Int8Linear, PlanesLinear) if change == "int8" else nn.Linear)
    images, tokens = random_inputs(hf, batch=2, length=7)
    for ours, theirs in zip(hidden_states(other, images, tokens), hidden_states(model, images, tokens)):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def test_attention_is_recorded_and_knocked_out(model):
    """What looks into a model and changes it does so in a joined one."""
    plain = load(model)
    other = joined(plain)
    tokens = torch.tensor([[2, 5, 6, 7]])
    images = torch.rand(1, 3, *[plain.config.vision.image_size] * 2) * 2 - 1
    with torch.inference_mode(), plain.record_attention() as theirs, other.record_attention() as ours:
        plain(images, tokens, 3)
        other(images, tokens, 3)
    assert ours.keys() == theirs.keys() == set(range(plain.config.text.layers))
    assert all(torch.allclose(ours[i], theirs[i], atol=1e-5) for i in ours)
    whole = hidden_states(plain, images, tokens)
    for missing in (partial(without_head, layer=1, head=2), partial(without_layer, tower="decoder", layer=1)):
        with missing(plain), missing(other):
            theirs, ours = (hidden_states(m, images, tokens) for m in (plain, other))
        assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in zip(ours, theirs))
        assert not any(torch.allclose(a, b, atol=1e-2) for a, b in zip(theirs, whole))


def test_a_layer_at_a_time(model, monkeypatch):
    """Memory never holds two copies: when a matrix is joined, those before it are gone."""
    plain = load(model)
    separate = [weakref.ref(p) for p in plain.decoder.layers.parameters() if p.dim() == 2]
    most, cat = [], torch.cat

    def counted(tensors, *args, **kwargs):
        most.append(sum(p() is not None for p in separate))
        return cat(tensors, *args, **kwargs)

    monkeypatch.setattr(torch, "cat", counted)
    join(plain)
    assert most == [len(separate) - 3 * (i - i // 2) - 2 * (i // 2) for i in range(len(most))]
    assert len(most) == 2 * plain.config.text.layers


def test_norms_keep_their_bits():
    """1 + weight computed once gives the same bits, in both dtypes; it is forgotten when the model is moved
    or cast, and no checkpoint knows of it."""
    norm = RMSNorm(48, 1e-6)
    norm.weight.data.normal_()
    holder = nn.Module()
    holder.decoder = nn.ModuleList([norm])
    for dtype in (torch.float32, torch.bfloat16):
        norm.to(dtype)
        assert norm.scale is None
        x = torch.randn(3, 48).to(dtype)
        plain, names = norm(x), set(norm.state_dict())
        fix_norms(holder)
        assert norm.scale.dtype == torch.float32 and set(norm.state_dict()) == names == {"weight"}
        assert torch.equal(norm(x), plain)


def test_joined_where_it_gains(model):
    """On a CPU matrices stay as they are, but in int8."""
    assert load_for_decoding(model).decoder.layers[0].attn.qkv_proj is None
    assert load_for_decoding(model, int8=True).decoder.layers[0].attn.q_proj is None
    on_gpu = load_for_decoding(model, device="meta").decoder.layers[0]
    assert on_gpu.attn.q_proj is None and on_gpu.mlp.gate_up_proj.weight.is_meta
    assert all(m.scale is not None for m in on_gpu.modules() if isinstance(m, RMSNorm))


def test_answers_stay(model):
    """Boxes in both forms, to the token."""
    plain = load(model)
    other = joined(plain)
    fix_norms(other)
    images = torch.rand(2, 3, *[plain.config.vision.image_size] * 2) * 2 - 1
    for decode in ("sequence", "parallel"):
        ours, theirs = (closed_set_decoder(m, decode)(images) for m in (other, plain))
        assert torch.equal(ours.tokens, theirs.tokens)
        assert torch.allclose(ours.scores, theirs.scores, atol=1e-4)
