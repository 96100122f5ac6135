"""Another image size than the checkpoint's: position embeddings resampled, a longer window, all recorded."""

import json
import math

import numpy as np
import pytest
import torch
from helpers import apart, complaint, edit_json, load, same
from peft import PeftModel
from reference import difference, random_inputs, reference_logits, save, tiny_paligemma
from safetensors.torch import load_file, save_file
from transformers import PaliGemmaForConditionalGeneration

from model.attention import prefix_lm_mask, window_mask
from model.config import VARIANTS
from model.decoding.generate import generate
from model.io.adapter import DETECTION, save_adapter
from model.io.weights import load_config
from model.lora import TARGETS, add_lora, fold, lora_layers
from model.siglip import resample_positions

SIZE, OTHER = 56, 84  # 4 x 4 and 6 x 6 patches of 14 pixels
POSITIONS = "vision.position_embedding.weight"
STORED_POSITIONS = "vision_tower.vision_model.embeddings.position_embedding.weight"
FAMILIES = {"gemma1": dict(family="gemma"), "gemma2, window": dict(window=8)}


@pytest.fixture(scope="module", params=FAMILIES.values(), ids=FAMILIES)
def base(request, tmp_path_factory):
    """A checkpoint of 56 px in the official layout."""
    hf = tiny_paligemma(seed=5, layers=2, image_size=SIZE, **request.param)
    return save(hf, tmp_path_factory.mktemp("base"))


def theirs(folder):
    """A checkpoint in transformers, which must find all of it and nothing else."""
    hf, report = PaliGemmaForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    return hf.eval()


# Resampling -------------------------------------------------------------------------------------------------


def slow_zoom(positions: np.ndarray, tokens: int) -> np.ndarray:
    """What scipy.ndimage.zoom of order 1 computes, one patch of the new grid after the other, in float64."""
    old, new = math.isqrt(len(positions)), math.isqrt(tokens)
    grid, rows = positions.astype(np.float64).reshape(old, old, -1), []
    for i in range(new):
        for j in range(new):
            y, x = ((k * (old - 1) / (new - 1) if new > 1 else 0.0) for k in (i, j))
            top, left = min(int(y), max(old - 2, 0)), min(int(x), max(old - 2, 0))
            bottom, right = min(top + 1, old - 1), min(left + 1, old - 1)
            v, u = y - top, x - left
            upper = (1 - u) * grid[top, left] + u * grid[top, right]
            lower = (1 - u) * grid[bottom, left] + u * grid[bottom, right]
            rows.append((1 - v) * upper + v * lower)
    return np.array(rows)


@pytest.mark.parametrize(
    ("old", "new"), [(16, 32), (16, 64), (8, 14), (8, 5), (8, 20), (32, 16), (4, 1), (1, 3), (2, 3)]
)
def test_resampling(old, new):
    positions = torch.randn(old * old, 6)
    resampled = resample_positions(positions, new * new)
    assert resampled.shape == (new * new, 6) and resampled.dtype == torch.float32
    assert apart(resampled, torch.tensor(slow_zoom(positions.numpy(), new * new))) < 1e-6
    assert not resampled.requires_grad and resampled.is_contiguous()


def test_corners_stay_and_a_ramp_stays_a_ramp():
    """By hand: x and y of each patch, from 0 to 1, are x and y in any grid."""

    def ramp(side):
        y, x = np.mgrid[:side, :side] / (side - 1)
        return torch.tensor(np.stack((x, y), -1).reshape(-1, 2), dtype=torch.float32)

    assert apart(resample_positions(ramp(8), 14 * 14), ramp(14)) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_size_changes_no_bit(dtype, base):
    positions = torch.randn(64, 6).to(dtype)
    assert resample_positions(positions, 64) is positions
    model, again = load(base, dtype=dtype), load(base, dtype=dtype, image_size=SIZE)
    assert same(again.state_dict(), model.state_dict()) and again.config == model.config


# The config -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["paligemma-3b", "paligemma2-3b", "paligemma2-28b"])
def test_official_sizes(name):
    """From 224 to 448 px as published, except for the window, which ends 768 positions later."""
    small, large = VARIANTS[f"{name}-224"], VARIANTS[f"{name}-448"]
    window = small.text.sliding_window and 4096 + 1024 - 256
    assert small.override(image_size=448) == large.override(sliding_window=window)
    assert large.override(image_size=224).override(image_size=224) == small, "smaller: the window stays"
    assert small.override(image_size=448, sliding_window=9).text.sliding_window == 9, "the caller's wins"
    assert small.override(sliding_window=9, image_size=448).text.sliding_window == 9


@pytest.mark.parametrize("image_size", [144, 224, 320])
def test_answers_lose_no_more_of_a_larger_image(image_size):
    """The same number of image tokens is out of the window of each token of an answer."""

    def hidden(config, prefix=5, answer=60):
        P = config.vision.tokens
        positions = torch.arange(1, P + prefix + answer + 1)[None]
        is_suffix = positions > P + prefix
        mask = prefix_lm_mask(torch.ones_like(is_suffix), is_suffix)
        mask = window_mask(mask, positions, positions, is_suffix, config.text.sliding_window)
        return (~mask[0, P + prefix :, :P]).sum(-1)

    nano = load_config("nano")
    assert torch.equal(hidden(nano.override(image_size=image_size)), hidden(nano)) and hidden(nano).any()


@pytest.mark.parametrize(("size", "nearest"), [(225, "224 and 238"), (237, "224 and 238"), (5, "14 and 28")])
def test_sizes_that_do_not_work(size, nearest, base):
    message = complaint(load, base, image_size=size)
    assert str(base) in message and f"image_size = {size}: not a multiple of patch_size 14" in message
    assert nearest in message


@pytest.mark.parametrize("size", [0, -14, 28.0, "28", True, None])
def test_sizes_that_are_none(size, base):
    assert f"image_size = {size!r}: must be an integer > 0" in complaint(load, base, image_size=size)


# Loading and saving -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, 1e-6), (torch.bfloat16, 8e-3)])
@pytest.mark.parametrize("image_size", [OTHER, 28])
@torch.no_grad()
def test_load_at_another_size(image_size, dtype, rounding, base):
    """Only the position embeddings differ from the checkpoint's."""
    model, plain = load(base, dtype=dtype, image_size=image_size), load(base, dtype=dtype)
    tokens = (image_size // 14) ** 2
    wanted = slow_zoom(load_file(base / "model.safetensors")[STORED_POSITIONS].numpy(), tokens)
    state, before = model.state_dict(), plain.state_dict()
    positions = state.pop(POSITIONS)
    del before[POSITIONS]
    assert positions.dtype == dtype and ((positions - torch.tensor(wanted)).abs() <= rounding).all()
    assert same(state, before)
    assert model.config.vision.image_size == image_size and model.config.vision.tokens == tokens
    logits = model(torch.zeros(1, 3, image_size, image_size), torch.ones(1, 4, dtype=torch.int64), 2)
    assert logits.isfinite().all()


@torch.no_grad()
def test_transformers_loads_what_is_saved(base, tmp_path):
    """The new size is in the config, for us and for transformers, to the same logits."""
    ours = load(base, image_size=OTHER)
    ours.save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    assert raw["vision_config"]["image_size"] == OTHER
    assert raw["vision_config"]["num_image_tokens"] == raw["text_config"]["num_image_tokens"] == 36
    hf, again = theirs(tmp_path), load(tmp_path)
    images, tokens = random_inputs(hf)
    assert images.shape[-1] == OTHER
    assert difference(ours(images, tokens, 5), reference_logits(hf, images, tokens, 5), tokens) <= 2e-4
    assert again.config == ours.config and same(again.state_dict(), ours.state_dict())


@pytest.mark.parametrize("overrides", [{}, dict(image_size=OTHER), dict(image_size=28)], ids=str)
def test_positions_of_another_size_than_the_config_says(overrides, base, tmp_path):
    """Damage is refused whatever size is asked for, even that which would fit."""
    state = load_file(base / "model.safetensors")
    for wrong in ([36, 32], [4, 32], [16, 31]):
        state[STORED_POSITIONS] = torch.zeros(wrong)
        save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
        (tmp_path / "config.json").write_text((base / "config.json").read_text())
        message = complaint(load, tmp_path, **overrides)
        assert f"{STORED_POSITIONS} has shape {wrong}, the config asks for [16, 32]" in message


def test_generate_where_the_image_takes_all_positions(base):
    """Its complaint counts no tokens below zero, and mentions the image."""
    model = load(base, image_size=OTHER, max_positions=30)
    message = complaint(lambda: next(generate(model, torch.zeros(1, 36, 48), [[2, 108]], 4)))
    assert "positions for 0 after those of the image" in message and "smaller image size" in message


# Adapters ---------------------------------------------------------------------------------------------------


@pytest.fixture
def adapter(base, tmp_path):
    """The folder of an adapter of 84 px, and the model that it was saved from."""
    model = load(base, image_size=OTHER)
    add_lora(model, TARGETS["published"], rank=3)
    for layer in lora_layers(model).values():
        layer.B.data = torch.randn(layer.B.shape) * 0.3
    save_adapter(model, tmp_path / "adapter", base=str(base))
    return tmp_path / "adapter", model


@torch.no_grad()
def test_adapter(base, adapter):
    """Base and adapter give the model that was trained; another size only if the caller asks for it."""
    folder, model = adapter
    assert not any("position" in name for name in load_file(folder / "adapter_model.safetensors"))
    for again in (load(base, folder), load(base, folder, image_size=OTHER)):
        assert again.config == model.config and same(again.state_dict(), model.state_dict())
    small = load(base, folder, image_size=SIZE)
    assert small.config == load(base).config, "what the caller says wins"
    edit_json(folder / DETECTION, lambda raw: raw.pop("image_size"))
    assert load(base, folder).config == load(base).config, "an adapter that does not say: the base's size"


@torch.no_grad()
def test_adapter_in_peft_and_merged(base, adapter, tmp_path):
    """PEFT puts it on the base saved at that size; merged into the base it is a checkpoint of that size."""
    folder, model = adapter
    load(base, image_size=OTHER).save_pretrained(tmp_path / "larger")
    hf = PeftModel.from_pretrained(theirs(tmp_path / "larger"), folder).eval()
    images, tokens = random_inputs(hf)
    ours = model(images, tokens, 5)
    assert difference(ours, reference_logits(hf, images, tokens, 5), tokens) <= 2e-4
    fold(load(base, folder)).save_pretrained(tmp_path / "merged")
    assert load(tmp_path / "merged").config == model.config
    merged = reference_logits(theirs(tmp_path / "merged"), images, tokens, 5)
    assert difference(ours, merged, tokens) <= 2e-4


def test_adapter_of_a_size_that_the_base_cannot_have(base, adapter):
    """Nano's patches of 16 pixels are not those of an official base: the complaint is about the two."""
    folder, _ = adapter
    edit_json(folder / DETECTION, lambda raw: raw.update(image_size=128))
    message = complaint(load, base, folder)
    assert str(base) in message and str(folder) in message and "image_size = 128" in message
