"""Logits against transformers, on random checkpoints of every architecture and in every published form."""

import pytest
import torch
from helpers import load
from reference import difference, pad_right, random_inputs, reference_logits, save, tiny_paligemma
from torch import nn
from transformers import PaliGemmaForConditionalGeneration

from model import PaliGemma

TOLERANCE = 2e-4  # float32, logits of about +-8
PADDING_TOLERANCE = 5e-5  # between ours: other shapes, other order of summation

ARCHITECTURES = {
    "gemma1": dict(family="gemma"),
    "gemma1, a kv head for every head": dict(family="gemma", kv_heads=4),
    "gemma1, one kv head, head_dim unlike width / heads": dict(
        family="gemma", kv_heads=1, head_dim=20, width=40
    ),
    "gemma1, 224 px": dict(family="gemma", image_size=224, layers=2),
    "gemma1, 448 px": dict(family="gemma", image_size=448, layers=2),
    "gemma2": dict(),
    "gemma2, one kv head": dict(kv_heads=1),
    "gemma2, a kv head for every head": dict(kv_heads=4),
    "gemma2, six heads, three kv heads": dict(width=54, heads=6, kv_heads=3, head_dim=10),
    "gemma2, query scale above head_dim": dict(query_scalar=36, head_dim=8),
    "gemma2, query scale below head_dim": dict(query_scalar=9, head_dim=32, width=64),
    "gemma2, official caps": dict(attn_cap=50.0, final_cap=30.0),
    "gemma2, no caps": dict(attn_cap=None, final_cap=None),
    "gemma2, attention cap only": dict(final_cap=None),
    "gemma2, final cap only": dict(attn_cap=None),
    "gemma2, window shorter than the image": dict(window=10, layers=4),
    "gemma2, window shorter than the suffix": dict(window=3, layers=4),
    "gemma2, window of one": dict(window=1),
    "gemma2, window one short of the sequence": dict(window=16 + 9 - 1),
    "gemma2, 224 px, window": dict(image_size=224, window=100),
    "gemma2, 448 px": dict(image_size=448, layers=2),
}


@torch.no_grad()
def assert_same_logits(ours: PaliGemma, hf):
    images, tokens = random_inputs(hf, length=9)
    logits = ours(images, tokens, 5)
    assert logits.dtype == torch.float32
    worst = difference(logits, reference_logits(hf, images, tokens, 5), tokens)
    print(f"max |difference| {worst:.1e}")
    assert worst <= TOLERANCE


@pytest.mark.parametrize("architecture", ARCHITECTURES.values(), ids=ARCHITECTURES.keys())
def test_architecture(architecture, tmp_path):
    hf = tiny_paligemma(seed=1, **architecture)
    assert_same_logits(load(save(hf, tmp_path)), hf)


@pytest.mark.parametrize("seed", range(3))
def test_published_gemma1(seed, tmp_path):
    """The sparse config of paligemma-3b-pt-224: head_dim 256 and image_size 224 are not in the file."""
    hf = tiny_paligemma(seed, family="gemma", heads=2, kv_heads=1, head_dim=256, image_size=224, layers=2)
    folder = save(hf, tmp_path, config="published")
    assert_same_logits(PaliGemma.from_pretrained(str(folder), dtype=torch.float32), hf)


@pytest.mark.parametrize("image_size", [224, 448])
def test_published_gemma2(image_size, tmp_path):
    """The config of paligemma2-3b-pt: no head_dim, no image_size at 224, several keys that mean nothing."""
    hf = tiny_paligemma(seed=2, heads=2, kv_heads=1, head_dim=256, image_size=image_size, layers=2)
    folder = save(hf, tmp_path, config="published")
    assert_same_logits(PaliGemma.from_pretrained(str(folder), dtype=torch.float32), hf)


@pytest.mark.parametrize("family", ["gemma", "gemma2"])
@pytest.mark.parametrize("shards", [1, 2, 3])
@pytest.mark.parametrize("names", ["A", "B", "C", "hybrid"])
def test_layout(names, shards, family, tmp_path):
    """Every generation of tensor names in one to three files, the tied head left out or stored."""
    hf = tiny_paligemma(seed=shards, family=family, layers=2)
    for head in (False, True):
        folder = save(
            hf, tmp_path / f"head-{head}", names=names, shards=shards, head=head, config="published"
        )
        assert_same_logits(PaliGemma.from_pretrained(str(folder), dtype=torch.float32), hf)


@pytest.mark.parametrize("names", ["A", "B", "C", "hybrid"])
def test_layouts_are_real(names, tmp_path):
    """transformers reads the folders that these tests call published, completely and to the same logits."""
    hf = tiny_paligemma(seed=4, layers=2)
    folder = save(hf, tmp_path, names=names, shards=2, head=names != "C", config="published")
    again, report = PaliGemmaForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    images, tokens = random_inputs(hf)
    assert torch.equal(reference_logits(again, images, tokens, 5), reference_logits(hf, images, tokens, 5))


def test_written_by_transformers(tmp_path):
    hf = tiny_paligemma(seed=5)
    hf.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert_same_logits(PaliGemma.from_pretrained(str(tmp_path), dtype=torch.float32), hf)


@pytest.mark.parametrize("window", [4096, 6])
@torch.no_grad()
def test_every_prefix_length(window, tmp_path):
    """One batch in which row i has a prefix of i + 1 tokens, up to no suffix at all; then each as an int."""
    hf = tiny_paligemma(seed=6, window=window)
    ours = load(save(hf, tmp_path))
    T = 7
    images, tokens = random_inputs(hf, batch=T, length=T)
    prefix_lens = torch.arange(1, T + 1)
    theirs = reference_logits(hf, images, tokens, prefix_lens)
    logits = ours(images, tokens, prefix_lens)
    assert difference(logits, theirs, tokens) <= TOLERANCE
    for i in range(T):
        alone = ours(images[i : i + 1], tokens[i : i + 1], i + 1)
        assert difference(alone, logits[i : i + 1], tokens[i : i + 1]) <= PADDING_TOLERANCE


@pytest.mark.parametrize("architecture", [dict(family="gemma"), dict(window=6)], ids=["gemma1", "gemma2"])
@torch.no_grad()
def test_right_padding(architecture, tmp_path):
    """A padded batch equals transformers' on the same batch, and ours on every row without its padding: also
    where prefix_len is that of the longest row and reaches into the padding of others."""
    hf = tiny_paligemma(seed=7, **architecture)
    ours = load(save(hf, tmp_path))
    lengths = [5, 11, 8, 11]
    images, tokens = random_inputs(hf, batch=4, length=11)
    tokens = pad_right(tokens, lengths)
    for prefix_len in (torch.tensor([3, 4, 8, 11]), 11):
        logits = ours(images, tokens, prefix_len)
        assert difference(logits, reference_logits(hf, images, tokens, prefix_len), tokens) <= TOLERANCE
        for i, length in enumerate(lengths):
            row = tokens[i : i + 1, :length]
            alone = ours(images[i : i + 1], row, torch.as_tensor(prefix_len).expand(4)[i].clamp(max=length))
            assert difference(alone, logits[i : i + 1, :length], row) <= PADDING_TOLERANCE


@pytest.mark.parametrize("architecture", [dict(family="gemma"), dict(window=6)], ids=["gemma1", "gemma2"])
@torch.no_grad()
def test_suffix_is_causal_and_prefix_is_not(architecture, tmp_path):
    """An edited token changes its own logits and later ones: of earlier ones only those of its own prefix."""
    hf = tiny_paligemma(seed=8, **architecture)
    ours = load(save(hf, tmp_path))
    images, tokens = random_inputs(hf, batch=1, length=9)
    before = ours(images, tokens, 4)
    for edited in range(1, 9):
        other = tokens.clone()
        other[0, edited] = 500 if tokens[0, edited] != 500 else 501
        changed = (ours(images, other, 4) - before).abs().amax(-1)[0]
        assert changed[edited] > 1e-3
        if edited < 4:
            assert (changed[:4] > 1e-4).all()
        else:
            assert (changed[:edited] == 0).all()


@pytest.mark.parametrize(
    ("override", "of_hf"),
    [
        (dict(attn_cap=None), dict(attn_cap=None)),
        (dict(final_cap=0), dict(final_cap=None)),
        (dict(attn_cap=2.0, final_cap=3.0), dict(attn_cap=2.0, final_cap=3.0)),
        (dict(sliding_window=None), dict(window=4096)),
        (dict(sliding_window=3), dict(window=3)),
    ],
    ids=["no attention cap", "no final cap", "other caps", "no window", "other window"],
)
@torch.no_grad()
def test_override_at_load(override, of_hf, tmp_path):
    """A field overridden at load gives the model that has it in its config, not the one on disk."""
    on_disk, wanted = tiny_paligemma(seed=9, window=8), tiny_paligemma(seed=9, **(dict(window=8) | of_hf))
    ours = load(save(on_disk, tmp_path), **override)
    assert_same_logits(ours, wanted)
    images, tokens = random_inputs(on_disk)
    assert difference(ours(images, tokens, 5), reference_logits(on_disk, images, tokens, 5), tokens) > 0.01


@pytest.mark.parametrize("architecture", [dict(family="gemma"), dict(window=10)], ids=["gemma1", "gemma2"])
@torch.no_grad()
def test_bfloat16(architecture, tmp_path):
    """bfloat16 strays from float32 no further than transformers' does, by the KL of next-token distributions:
    the mean over many tokens of several models, because a single one is luck."""
    ours_kl, theirs_kl = [], []
    for seed in range(4):
        hf = tiny_paligemma(seed=20 + seed, **architecture)
        folder = str(save(hf, tmp_path / str(seed), config="published"))
        half = PaliGemmaForConditionalGeneration.from_pretrained(
            folder, dtype=torch.bfloat16, attn_implementation="eager"
        )
        images, tokens = random_inputs(hf, batch=8, length=16, seed=seed)
        exact = reference_logits(hf, images, tokens, 6)
        theirs_kl.append(kl(exact, reference_logits(half, images.bfloat16(), tokens, 6)))
        ours = PaliGemma.from_pretrained(folder, dtype=torch.bfloat16)
        ours_kl.append(kl(exact, ours(images, tokens, 6)))
    ours_mean, theirs_mean = torch.tensor(ours_kl).mean(), torch.tensor(theirs_kl).mean()
    print(f"KL to float32, nats: ours {ours_mean:.2e} {ours_kl}, transformers {theirs_mean:.2e} {theirs_kl}")
    assert ours_mean <= 1.25 * theirs_mean


@torch.no_grad()
def test_bfloat16_rounds_where_transformers_rounds(tmp_path):
    """Norms are computed in float32, and the factor sqrt(width) is rounded before it meets the embedding."""
    hf = tiny_paligemma(seed=30)
    ours = load(save(hf, tmp_path), dtype=torch.bfloat16)
    theirs = hf.bfloat16().model.language_model
    _, tokens = random_inputs(hf, length=50)
    x = theirs.embed_tokens(tokens)
    assert torch.equal(ours.decoder.embed_tokens(tokens), x)
    assert torch.equal(ours.decoder.norm(x), theirs.norm(x))


def kl(exact: torch.Tensor, rounded: torch.Tensor) -> float:
    """Mean KL(exact || rounded) of the next-token distributions of logits [B, T, vocab], in nats."""
    exact, rounded = exact.double().log_softmax(-1), rounded.double().log_softmax(-1)
    return (exact.exp() * (exact - rounded)).sum(-1).mean().item()


# SigLIP's epsilon -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", ["full", "published"])
@torch.no_grad()
def test_epsilon_of_siglip(config, tmp_path):
    """transformers' features where the variance that a LayerNorm divides by is about its epsilon, 1e-6, in
    front of every norm. The hub's files do not give the epsilon."""
    hf = tiny_paligemma(0)
    for name, weight in hf.model.vision_tower.named_parameters():
        if any(part in name for part in ("embedding", "out_proj", "fc2")):  # what is added to the stream
            weight.mul_(1e-3)
    ours = PaliGemma.from_pretrained(str(save(hf, tmp_path, config=config)), dtype=torch.float32)
    images, _ = random_inputs(hf)
    theirs = hf.model.vision_tower(images).last_hidden_state
    assert torch.allclose(ours.vision(images), theirs, atol=1e-4) and theirs.abs().mean() > 0.1
    variances = []
    for norm in (module for module in ours.vision.modules() if isinstance(module, nn.LayerNorm)):
        norm.register_forward_pre_hook(lambda norm, x: variances.append(x[0].var(-1).mean()))
    ours.vision(images)
    assert len(variances) == 5 and all(1e-7 < variance < 1e-5 for variance in variances)
