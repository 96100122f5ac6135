"""Training of the mask codec."""

import numpy as np
import torch

from model.decoding.masks import MaskCodec
from model.io.hub import CODEC, NANO
from train.nano import codec as codec_program
from train.nano.codec import Codebook, Masks, mean_iou, random_shape


def test_shapes():
    rng = np.random.default_rng(0)
    shapes = [random_shape(rng) for _ in range(50)]
    assert all(shape.shape == (64, 64) and shape.dtype == bool and shape.any() for shape in shapes)
    assert len({shape.tobytes() for shape in shapes}) > 30


def test_masks_are_the_same_for_a_step():
    assert torch.equal(Masks(3)[2], Masks(3)[2]) and Masks(3)[1].shape[1:] == (64, 64)


def test_codebook_follows_the_features():
    """A code that is used moves to the mean of its features; one that nobody uses is given a new place."""
    codec = MaskCodec(8, 4)
    codec.codebook.zero_()
    codec.codebook[1] = 10.0
    book = Codebook(codec)
    features = torch.tensor([[1.0, 2, 3, 4], [3, 2, 1, 0]]).repeat(10, 1)
    codes = torch.zeros(20, dtype=torch.int64)
    for _ in range(600):
        book.update(features, codes, torch.Generator().manual_seed(0))
    assert torch.allclose(codec.codebook[0], torch.tensor([2.0, 2, 2, 2]), atol=0.01)
    distances = (codec.codebook[1] - features).abs().sum(1)
    assert distances.min() < 0.5 and codec.codebook.abs().max() < 5


def test_codec_training(tmp_path, capsys, monkeypatch):
    """A few steps get somewhere, and what is written is a codec."""
    monkeypatch.setattr(codec_program, "SCENES_PER_STEP", 4)
    for steps in (1, 100):
        size = "--channels 16 --width 8 --lr 5e-3 --workers 0 --held-out 5".split()
        codec_program.main(["--out", str(tmp_path / str(steps)), "--steps", str(steps), *size])
    assert "mean IoU" in capsys.readouterr().out
    masks = torch.cat([Masks(5)[i] for i in range(5)])  # of more than a scene: one mask says little
    codecs = [MaskCodec.load(tmp_path / name / CODEC) for name in ("1", "100")]
    short, longer = ((codec.decode(codec.encode(masks)) - masks).square().mean() for codec in codecs)
    assert longer < short - 0.02
    assert 0 <= mean_iou(codecs[1], masks) < mean_iou(MaskCodec.load(NANO / CODEC), masks) <= 1
