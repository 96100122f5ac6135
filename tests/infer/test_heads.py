"""infer/heads.py: where the attention of each token lies, and the model without some heads."""

import numpy as np
import pytest
import torch
from helpers import apart, call, tiny_config
from PIL import Image

from infer import heads
from model import PaliGemma
from model.attention import attend
from model.decoding.boxes import boxes_to_locs
from model.decoding.closed_set import ClosedSet
from model.io.hub import resolve
from model.io.image import to_network
from model.io.tokenizer import Tokenizer
from model.seam import attention_layers
from train.practice.scenes import make_scene


@pytest.fixture
def model():
    model = PaliGemma(tiny_config(Tokenizer(resolve("nano")))).eval()
    for name, weight in model.named_parameters():
        torch.nn.init.normal_(weight, std=1.0 if "embed" in name else 0.15)
    model.folder = resolve("nano")
    return model


def test_patch_cover_by_hand():
    """A grid of 2 x 2: the whole image, and the right half of the upper left patch."""
    boxes = np.array([[0, 0, 1, 1], [0.25, 0, 0.5, 0.5]])
    assert heads.patch_cover(boxes, 2).tolist() == [[1, 1, 1, 1], [0.5, 0, 0, 0]]


@torch.no_grad()
def test_where_it_looks(model):
    """As in a text of its own for each object, token by token."""
    scenes, size, P = (make_scene(i, 64, "same") for i in range(3)), 64, model.config.vision.tokens
    language, entropies, insides, masses = ClosedSet.of(model.config, model.tokenizer), [], [], []
    for scene in scenes:
        cover = heads.patch_cover(scene.boxes / size, 4)
        for own, locs in zip(cover, boxes_to_locs(scene.boxes, size, size)):
            text = [*language.prompt, *(locs + language.loc0)]
            with model.record_attention() as maps:
                image = to_network(torch.from_numpy(scene.image)[None])
                model.hidden(image, torch.tensor([text]), len(language.prompt))
            rows = torch.stack([w[0, :, -5:, :P] for w in maps.values()]).numpy()  # [L, N, 5, P]
            masses.append(rows.sum(-1))
            share = rows / rows.sum(-1, keepdims=True).clip(1e-12)
            entropies.append(-(share * np.log2(share.clip(1e-12))).sum(-1))
            boxes = np.stack([cover.max(0), *[own] * 4])
            insides.append((share * boxes).sum(-1))
    entropy, on_image, inside, area = heads.where_it_looks(model, "same", 3)
    for found, expected in ((entropy, entropies), (on_image, masses), (inside, insides)):
        assert np.abs(found - np.mean(expected, 0)).max() < 1e-4
    assert area.shape == (5,) and area[0] >= area[1] == area[4] > 0


@torch.no_grad()
def test_knocked_out_heads(model):
    """Their columns of o_proj meet zeros: the same as if those weights were zero."""
    images, tokens = torch.rand(1, 3, 64, 64), torch.randint(3, 900, (1, 6))
    usual = model(images, tokens, 3)
    heads.knock_out(model, [(0, 1), (1, 0), (1, 2)])
    found = model(images, tokens, 3)
    for layer in attention_layers(model):
        layer.attend = attend
    for i, head in ((0, 1), (1, 0), (1, 2)):
        model.decoder.layers[i].attn.o_proj.weight[:, 16 * head : 16 * (head + 1)] = 0
    assert apart(found, model(images, tokens, 3)) < 1e-4 < apart(found, usual)


def test_program(model, tmp_path, monkeypatch, capsys):
    model.save_pretrained(tmp_path / "tiny")
    plot = tmp_path / "plot.png"
    code, out, err = call(
        monkeypatch, capsys, heads, "--model", tmp_path / "tiny", "--count", 2, "--out", plot,
        "--device", "cpu",
    )  # fmt: skip
    assert code == 0, err
    assert "of that in the box" in out and "knocked out" in out
    assert Image.open(plot).size[0] > 800
