"""FlexAttention against the readable attention: both forms of it, PyTorch's own and the compiled one."""

from unittest.mock import Mock

import pytest
import torch
from reference import pad_right, random_inputs, save, tiny_paligemma
from torch._dynamo.testing import CompileCounter
from torch.nn.attention import flex_attention as pytorch
from torch.nn.attention.flex_attention import flex_attention

from model import PaliGemma, flex
from model.attention import attend, prefix_lm_mask, window_mask

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def sequence(T, lengths, prefixes):
    """valid, is_suffix and positions of right-padded texts."""
    valid = torch.arange(T, device=DEVICE) < torch.tensor(lengths, device=DEVICE)[:, None]
    is_suffix = torch.arange(T, device=DEVICE) >= torch.tensor(prefixes, device=DEVICE)[:, None]
    return valid, is_suffix, valid.cumsum(-1)


def plain_mask(valid, is_suffix, positions, window):
    return window_mask(prefix_lm_mask(valid, is_suffix), positions, positions, is_suffix, window)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads", "cap", "window"), [(4, 2, 5.0, None), (4, 1, None, 40)])
def test_flex(heads, kv_heads, cap, window, compiled, monkeypatch):
    """Padding, prefix, suffix, window, soft cap, shared heads; more than one tile."""
    B, T, H = 2, 150, 32
    q = torch.randn(B, T, heads, H, device=DEVICE)
    k, v = torch.randn(2, B, kv_heads, T, H, device=DEVICE)
    tokens = sequence(T, [T, T - 13], [100, 60])
    if not compiled:
        monkeypatch.setattr(flex, "fused", flex_attention)
    with torch.inference_mode():
        found = attend(q, k, v, flex.block_mask(*tokens, window), 0.2, cap)
        expected = attend(q, k, v, plain_mask(*tokens, window), 0.2, cap)
    assert torch.allclose(found[tokens[0]], expected[tokens[0]], atol=1e-5)


@pytest.mark.parametrize("window", [None, 150])
def test_tiles(window):
    """A tile that is skipped holds no pair that reads, one that is taken as a whole no pair that does not;
    and of a long sequence many are."""
    valid, is_suffix, positions = tokens = sequence(1000, [1000, 800], [200, 500])
    mask = flex.block_mask(*tokens, window)
    pairs = torch.zeros(2, 1024, 1024, dtype=torch.bool, device=DEVICE)
    pairs[:, :1000, :1000] = plain_mask(*tokens, window)
    pairs[:, 1000:, :1000] = (valid & ~is_suffix)[
        :, None
    ]  # what is read by rows that only fill the last tile
    counts = pairs.unflatten(1, (8, 128)).unflatten(3, (8, 128)).sum((2, 4))  # [2, 8, 8]
    full, mixed = torch.zeros(2, 2, 8, 8, dtype=torch.bool, device=DEVICE)
    lists = (mask.full_kv_num_blocks, mask.full_kv_indices), (mask.kv_num_blocks, mask.kv_indices)
    for of_kind, (numbers, columns) in zip((full, mixed), lists):
        listed = torch.arange(8, device=DEVICE) < numbers[:, 0, :, None]
        of_kind.scatter_(2, columns[:, 0].long(), listed)
    assert torch.equal(full, counts == 128**2) and (counts[~full & ~mixed] == 0).all()
    assert (counts[mixed] == 0).sum() <= 12 < (counts == 0).sum()


def test_no_form_for_each_length(monkeypatch):
    """At its ninth form PyTorch would give up, and build the score matrices."""
    counter = CompileCounter()
    monkeypatch.setattr(flex, "fused", torch.compile(flex_attention, backend=counter))
    for B, T in [(1, 20), (1, 140), (2, 300), *((1 + i % 3, 260 + 70 * i) for i in range(8))]:
        q, (k, v) = torch.randn(B, T, 2, 16), torch.randn(2, B, 1, T, 16)
        tokens = sequence(T, [T] * B, [9] * B)
        for window in (None, 50):
            with torch.inference_mode():
                found, expected = (
                    attend(q, k, v, mask(*tokens, window), 0.3, 9.0) for mask in (flex.block_mask, plain_mask)
                )
            assert torch.allclose(found, expected, atol=1e-5)
    assert counter.frame_count <= 4


def fuse_everything(monkeypatch) -> Mock:
    """Let every sequence be read as a long one on a GPU is, gradients included."""
    fused = Mock(wraps=flex_attention)
    monkeypatch.setattr(flex, "fused", fused)
    monkeypatch.setattr(PaliGemma, "_is_fused", lambda model, tokens: True)
    monkeypatch.setattr(pytorch, "_validate_device", lambda *_: None)  # no gradients of PyTorch's on a CPU
    torch._dynamo.reset()  # a cap that changes, as between the models of these tests, can have no gradients
    return fused


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

    plain, fused = answers(), fuse_everything(monkeypatch)
    for found, expected in zip(answers(), plain, strict=True):
        assert torch.allclose(found, expected, atol=1e-4)
    assert fused.call_count == 3 + 4  # the prefill's last block reads with one position, in the plain form


def test_gradients(monkeypatch, tmp_path):
    """Training reads long sequences, too: answers in sequence and in branches, and their gradients."""
    hf = tiny_paligemma(layers=2, window=10)
    ours = PaliGemma.from_pretrained(save(hf, tmp_path), dtype=torch.float32)
    images, tokens = random_inputs(hf, batch=2, length=9)
    tokens = pad_right(tokens, [9, 5])
    branches = torch.randint(3, 20, (2, 3, 4))

    def gradients():
        ours.zero_grad()
        image_tokens = ours.encode(images)
        hidden = ours.read(image_tokens, tokens, 4)[tokens != 0]
        end, of_branches = ours.read_branches(image_tokens, tokens[0, :4], branches)
        (hidden.square().mean() + end.square().mean() + (of_branches**3).mean()).backward()
        weights = {name: p.grad.clone() for name, p in ours.named_parameters() if p.grad is not None}
        return {"hidden": hidden, "end": end, "branches": of_branches} | weights

    plain, fused = gradients(), fuse_everything(monkeypatch)
    for name, found in gradients().items():
        near = 1e-4 * plain[name].detach().abs().max().item()
        if "k_proj.bias" not in name:  # it only adds a constant to the scores: its gradient is rounding noise
            assert torch.allclose(found, plain[name], rtol=1e-3, atol=near), name
    assert fused.call_count == 4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_on_a_gpu(dtype):
    """Compiled, with the 3B's heads; several lengths and batches."""
    for B, T in [(1, 1100), (1, 1300), (2, 1700), (3, 4200)]:
        tokens = sequence(T, [T] * B, [T - 99] * B)
        inputs = [
            torch.randn(shape, dtype=dtype, device=DEVICE, requires_grad=True)
            for shape in ((B, T, 8, 256), (B, 4, T, 256), (B, 4, T, 256))
        ]
        for window in (None, 1000):
            for mask, taken in ((flex.block_mask, found := []), (plain_mask, expected := [])):
                out = attend(*inputs, mask(*tokens, window), 256**-0.5, 50.0)
                taken += [out, *torch.autograd.grad(out.float().square().sum(), inputs)]
            for ours, theirs in zip(found, expected, strict=True):
                assert (ours - theirs).norm() < 0.02 * theirs.norm()


def test_fused_without_mask():
    """What the vision tower uses is the same softmax attention."""
    q = torch.randn(2, 20, 4, 16)
    k, v = torch.randn(2, 2, 4, 20, 16)
    everything = torch.ones(2, 20, 20, dtype=torch.bool)
    assert torch.allclose(attend(q, k, v, None, 0.3), attend(q, k, v, everything, 0.3), atol=1e-5)
