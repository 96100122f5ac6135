"""Photographs that are shown to nano: told apart from drawings, and said once."""

import io
import warnings

import numpy as np
import pytest
import torch
from helpers import ROOT, call, complaint
from PIL import Image
from safetensors.torch import save_file

from infer import detect, generate
from model import Detector
from model.decoding.packing import load_for_decoding
from model.io.adapter import save_adapter
from model.io.hub import NANO, PHOTOGRAPHS
from model.lora import TARGETS, add_lora
from train.nano.photographs import crops, ridge
from train.practice.scenes import make_scene

EXAMPLE = ROOT / "media" / "example.png"
CELLS = ROOT / "media" / "blood_cells.jpg"  # eight photographs, each 400 x 300


@pytest.fixture(scope="module")
def photograph(tmp_path_factory):
    """The fourth of the eight, as drawn for train/README.md, with its boxes."""
    file = tmp_path_factory.mktemp("photographs") / "cells.jpg"
    with Image.open(CELLS) as sheet:
        sheet.crop((1220, 0, 1618, 298)).save(file)
    return file


def test_scenes_and_a_photograph(photograph):
    nano = Detector.from_pretrained("nano", device="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = nano([EXAMPLE] + [Image.fromarray(make_scene(i, 128, "same").image) for i in range(4)])
        assert not any(one.photograph for one in found)
    with pytest.warns(
        UserWarning, match=r"cells\.jpg looks like a photograph, and this model knows drawings"
    ):
        assert [one.photograph for one in nano([EXAMPLE, photograph])] == [False, True]
    with pytest.warns(UserWarning, match=r"a picture and 1 more of 2 pictures look like photographs"):
        assert all(one.photograph for one in nano([Image.open(photograph)] * 2, classes=["kite"]))


def test_programs_say_so_once(photograph, here, monkeypatch, capsys):
    both = ("--image", EXAMPLE, photograph, photograph, "--device", "cpu")
    code, _, err = call(monkeypatch, capsys, detect, *both)
    assert code == 0 and len(err.splitlines()) == 1
    assert err.startswith(f"detect.py: {photograph} and 1 more of 3 pictures look like photographs")
    assert "--model google/paligemma2-3b-mix-448 --classes" in err
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(f"/image {photograph}\n".encode())))
    code, _, err = call(monkeypatch, capsys, generate, "--image", photograph, "--device", "cpu")
    assert code == 0 and err.count("looks like a photograph") == 1


def test_of_these_weights_alone(model, photograph, tmp_path):
    """Not with an adapter, at another size or in a copy that was saved; refused where it does not fit."""
    tuned = load_for_decoding("nano")
    assert tuned.photograph_test is not None
    tuned.save_pretrained(tmp_path / "tuned")
    add_lora(tuned, TARGETS["decoder"], rank=1)
    save_adapter(tuned, tmp_path / "adapter")
    assert load_for_decoding(tmp_path / "tuned").photograph_test is None
    assert load_for_decoding("nano", adapter=tmp_path / "adapter").photograph_test is None
    assert load_for_decoding("nano", image_size=160).photograph_test is None
    save_file(dict(weight=torch.zeros(7), bias=torch.zeros(())), tmp_path / "tuned" / PHOTOGRAPHS)
    assert f"{PHOTOGRAPHS} is of another checkpoint" in complaint(load_for_decoding, tmp_path / "tuned")
    assert (NANO / PHOTOGRAPHS).stat().st_size < 2000


def test_ridge():
    """Two clouds that a line separates, of very different numbers and scales."""
    rng = np.random.default_rng(0)
    spread = [1, 100, 0.01]
    positive, negative = rng.normal(3, 1, (20, 3)) * spread, rng.normal(-3, 1, (2000, 3)) * spread
    weight, bias = ridge(positive, negative)
    assert (positive @ weight + bias > 0).all() and (negative @ weight + bias < 0).all()


def test_crops():
    """The picture itself, then parts of it, which differ."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 90, 3), np.uint8))
    first, *others = crops(np.random.default_rng(0), [image])
    assert first is image and len({one.tobytes() for one in others}) == len(others) == 24
    assert all(0.3 * 90 < one.width <= 90 and 0.25 * 60 < one.height <= 60 for one in others)
