"""The decode loop: buffers that stay, sampling, early stop, reading ahead."""

import copy
import os
import threading

import pytest
import torch
from helpers import equal
from PIL import Image
from reference import LANGUAGE, noisy

from model.decoding.batches import MAX_BATCH_CPU
from model.decoding.closed_set import EarlyStop, GroupDecoder
from model.decoding.detector import ClosedSetDetector
from model.decoding.generate import Sampling
from model.io.image import read_ahead


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Its noise is likeliest in many groups, but not in all."""
    return noisy(tmp_path_factory.mktemp("noisy"))[1]


def pictures(model, batch, seed=2):
    size = model.config.vision.image_size
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(seed))


def test_nothing_of_an_earlier_batch_is_left(model):
    """One decoder for batches of different sizes and contents; the buffers of a size stay in their places."""
    decoder = GroupDecoder(model, LANGUAGE)
    for batch, seed in ((3, 0), (3, 1), (1, 2), (3, 0)):
        before = decoder.cache.keys.data_ptr() if decoder.batch_size == batch else None
        images = pictures(model, batch, seed)
        assert equal(decoder(images), GroupDecoder(model, LANGUAGE)(images))
        assert before in (None, decoder.cache.keys.data_ptr())


def test_alone_and_in_a_batch(model):
    images = pictures(model, 4)
    together = GroupDecoder(model, LANGUAGE)(images)
    for i in range(4):
        assert torch.equal(GroupDecoder(model, LANGUAGE)(images[i : i + 1]).tokens[0], together.tokens[i])


@torch.no_grad()
def test_scores_of_early_stop(model):
    """Each image stops behind so many groups of noise in a row; what came before is as without a stop."""
    images = pictures(model, 6)
    full = GroupDecoder(model, LANGUAGE)(images)
    noise, stopped = 0.5, 0
    for patience in (1, 2):
        early = GroupDecoder(model, LANGUAGE, early_stop=EarlyStop(noise, patience))(images)
        decoded = early.tokens.shape[1]
        assert torch.equal(early.tokens, full.tokens[:, :decoded])
        for i in range(6):
            row, alive = (full.noise[i] > noise).tolist(), LANGUAGE.groups
            for group in range(LANGUAGE.groups - patience + 1):
                if all(row[group : group + patience]):
                    alive = group + patience
                    break
            assert early.live[i].tolist() == [group < alive for group in range(decoded)]
            stopped += alive < LANGUAGE.groups
        assert decoded == early.live.sum(-1).max()
    assert 0 < stopped < 12, "the test needs images that stop and images that do not"


def test_early_stop_ends_the_work(model):
    """No group is decoded behind the stop of the last image."""
    decoder = GroupDecoder(model, LANGUAGE, early_stop=EarlyStop(0.0, 2))
    assert decoder(pictures(model, 2)).tokens.shape == (2, 2, 5)
    for noise, patience in ((1.5, 2), (0.5, 0), (0.5, 1.5), (0.5, float("inf"))):
        with pytest.raises(ValueError, match="early stop"):
            EarlyStop(noise, patience)


def test_sampling(model):
    """Cold enough, it is greedy; a seed repeats; other numbers differ. Coordinates stay coordinates."""
    images = pictures(model, 2)
    greedy = GroupDecoder(model, LANGUAGE)(images)

    def drawn(sampling, seed):
        return GroupDecoder(model, LANGUAGE, sampling=sampling)(images, torch.Generator().manual_seed(seed))

    assert torch.equal(drawn(Sampling(1e-5), 0).tokens, greedy.tokens)
    assert torch.equal(drawn(Sampling(1.0, 1e-6), 0).tokens, greedy.tokens)
    hot = [drawn(Sampling(2.0, 0.9), seed) for seed in (0, 0, 1)]
    assert equal(hot[0], hot[1]) and not torch.equal(hot[0].tokens, hot[2].tokens)
    for answer in hot:
        assert (answer.locs >= 0).all() and (answer.locs < 1024).all()
        assert (answer.labels >= 0).all() and (answer.labels < len(LANGUAGE.classes)).all()


def test_read_ahead(tmp_path):
    """In order, in batches, errors where they belong, and not the whole folder at once."""
    files = []
    for i in range(11):
        files.append(tmp_path / f"{i}.png")
        Image.new("RGB", (4, 4), (i, 0, 0)).save(files[-1])
    files[3].write_text("no picture")
    taken = []

    def told():
        for file in files:
            taken.append(file)
            yield file

    seen = []
    for batch in read_ahead(told(), 2):
        assert len(taken) <= len(seen) + 4
        for file, reading in batch:
            seen.append(file)
            if file == files[3]:
                with pytest.raises(ValueError, match="3.png"):
                    reading.result()
            else:
                assert reading.result().getpixel((0, 0)) == (int(file.stem), 0, 0)
    assert seen == files and threading.active_count() < 20


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0, 0.9)])
def test_graph_and_kernel_equal_the_plain_loop(model, sampling):
    """In float32: the replayed graph with the fused head decodes the tokens of the plain loop on the CPU."""
    on_gpu = GroupDecoder(copy.deepcopy(model).cuda(), LANGUAGE, sampling=sampling)
    plain = GroupDecoder(model, LANGUAGE, sampling=sampling)
    for batch, seed in ((3, 0), (3, 1), (1, 2)):
        images = pictures(model, batch, seed)
        ours, theirs = (
            decoder(x, torch.Generator().manual_seed(seed))
            for decoder, x in ((on_gpu, images.cuda()), (plain, images))
        )
        assert torch.equal(ours.tokens.cpu(), theirs.tokens)
        assert torch.allclose(ours.scores.cpu(), theirs.scores, atol=1e-4)


def test_fitting_batch(model, monkeypatch):
    """As many images as half of the free memory holds, at least one, at most MAX_BATCH_CPU."""
    sizes = []
    for free in (0, 1 << 22, 1 << 24, 1 << 40):
        monkeypatch.setattr(os, "sysconf", lambda name, free=free: free if "PAGES" in name else 1)
        sizes.append(ClosedSetDetector(GroupDecoder(model, LANGUAGE)).fitting_batch())
    assert sizes == sorted(sizes) and sizes[0] == 1 < sizes[2] and sizes[3] == MAX_BATCH_CPU
    config = model.config.text  # half of the memory holds at least their caches and images
    cache = 8 * config.layers * config.kv_heads * config.head_dim * 5 * LANGUAGE.groups
    assert sizes[2] * cache < 1 << 23


def test_systems_that_do_not_say_how_much_memory_is_free(model, monkeypatch):
    """macOS has no such figure, Windows no os.sysconf: images are decoded together all the same."""

    def unknown(name):
        raise ValueError("unrecognized configuration name")

    detector = ClosedSetDetector(GroupDecoder(model, LANGUAGE))
    monkeypatch.setattr(os, "sysconf", unknown)
    assert detector.fitting_batch() == MAX_BATCH_CPU
    monkeypatch.delattr(os, "sysconf")
    assert detector.fitting_batch() == MAX_BATCH_CPU
