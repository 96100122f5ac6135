"""FlexAttention against the readable attention: both forms of it, PyTorch's own and the compiled one."""

from unittest.mock import Mock

import pytest
import torch
from reference import pad_right, random_inputs, save, tiny_paligemma
from torch.nn.attention.flex_attention import flex_attention

from model import PaliGemma, flex
from model.attention import attend, prefix_lm_mask, window_mask

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads", "cap", "window"), [(4, 2, 5.0, None), (4, 1, None, 40)])
def test_flex(heads, kv_heads, cap, window, compiled, monkeypatch):
    """Padding, prefix, suffix, window, soft cap, shared heads; more than one block of 128."""
    B, T, H = 2, 150, 32
    q = torch.randn(B, T, heads, H, device=DEVICE)
    k, v = torch.randn(2, B, kv_heads, T, H, device=DEVICE)
    valid = torch.arange(T, device=DEVICE) < torch.tensor([[T], [T - 13]], device=DEVICE)
    is_suffix = torch.arange(T, device=DEVICE).expand(B, T) >= torch.tensor([[100], [60]], device=DEVICE)
    positions = valid.cumsum(-1)
    mask = window_mask(prefix_lm_mask(valid, is_suffix), positions, positions, is_suffix, window)
    if not compiled:
        monkeypatch.setattr(flex, "fused", flex_attention)
    with torch.inference_mode():
        found = attend(q, k, v, flex.block_mask(mask), 0.2, cap)
        expected = attend(q, k, v, mask, 0.2, cap)
    assert torch.allclose(found[valid], expected[valid], atol=1e-5)


@torch.inference_mode()
def test_long_prefill(monkeypatch, tmp_path):
    """The whole prefill and forward, where both take the fused form: as on a GPU from 448 px."""
    hf = tiny_paligemma(layers=4, window=10)
    ours = PaliGemma.from_pretrained(save(hf, tmp_path), dtype=torch.float32)
    images, tokens = random_inputs(hf, batch=2, length=9)
    tokens = pad_right(tokens, [9, 5])

    def answers():
        cache = ours.new_cache(2, 12)
        hidden = ours.prefill(ours.encode(images), tokens, cache)
        return hidden, ours.step(tokens[:, 1], cache), ours(images, tokens, 4)[tokens != 0]

    plain, fused = answers(), Mock(wraps=flex_attention)
    monkeypatch.setattr(flex, "fused", fused)
    monkeypatch.setattr(PaliGemma, "_fused", lambda model, masks, _: tuple(map(flex.block_mask, masks)))
    for found, expected in zip(answers(), plain, strict=True):
        assert torch.allclose(found, expected, atol=1e-4)
    assert fused.call_count == 3 + 4  # the prefill's last block reads with one position, in the plain form


def test_fused_without_mask():
    """What the vision tower uses is the same softmax attention."""
    q = torch.randn(2, 20, 4, 16)
    k, v = torch.randn(2, 2, 4, 20, 16)
    everything = torch.ones(2, 20, 20, dtype=torch.bool)
    assert torch.allclose(attend(q, k, v, None, 0.3), attend(q, k, v, everything, 0.3), atol=1e-5)
