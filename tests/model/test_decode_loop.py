"""The decode loop: buffers that stay between batches, early stop, sampling, and the graph's capture."""

import argparse
import contextlib
import copy
import os
import weakref
from types import SimpleNamespace

import pytest
import torch
from helpers import equal
from reference import LANGUAGE, noisy

from model import PaliGemma
from model.decoding.batches import MAX_BATCH
from model.decoding.closed_set import GROUP, EarlyStop, GroupDecoder, capture_graph
from model.decoding.detector import ClosedSetDetector
from model.decoding.generate import Sampling
from model.decoding.parallel import ParallelDecoder
from train import fit


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Its noise is likeliest in many groups, but not in all."""
    return noisy(tmp_path_factory.mktemp("noisy"))[1]


def pictures(model, batch, seed=2):
    size = model.config.vision.image_size
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(seed))


# Batches ----------------------------------------------------------------------------------------------------


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


def test_fitting_batch(model, monkeypatch):
    """As many images as half of the free memory holds, at least one, at most MAX_BATCH."""
    sizes = []
    for free in (0, 1 << 22, 1 << 24, 1 << 40):
        monkeypatch.setattr(os, "sysconf", lambda name, free=free: free if "PAGES" in name else 1)
        sizes.append(ClosedSetDetector(GroupDecoder(model, LANGUAGE)).fitting_batch())
    assert sizes == sorted(sizes) and sizes[0] == 1 < sizes[2] and sizes[3] == MAX_BATCH
    in_parallel = ClosedSetDetector(ParallelDecoder(model, LANGUAGE, 100))
    assert in_parallel.fitting_batch() == 10  # of 100 branches, 1,024 tokens a step
    config = model.config.text  # half of the memory holds at least their caches and images
    cache = 8 * config.layers * config.kv_heads * config.head_dim * 5 * LANGUAGE.groups
    assert sizes[2] * cache < 1 << 23


def test_systems_that_do_not_say_how_much_memory_is_free(model, monkeypatch):
    """macOS has no such figure, Windows no os.sysconf: images are decoded together all the same."""

    def unknown(name):
        raise ValueError("unrecognized configuration name")

    detector = ClosedSetDetector(GroupDecoder(model, LANGUAGE))
    monkeypatch.setattr(os, "sysconf", unknown)
    assert detector.fitting_batch() == MAX_BATCH
    monkeypatch.delattr(os, "sysconf")
    assert detector.fitting_batch() == MAX_BATCH


def test_nan_does_not_outlive_its_batch(model):
    """The cache is used again; slots that are not read have weight 0, and 0 times NaN is NaN."""
    decoder, images = GroupDecoder(model, LANGUAGE), pictures(model, 2)
    decoder(images * float("nan"))
    assert equal(decoder(images), GroupDecoder(model, LANGUAGE)(images))


def test_the_old_cache_goes_before_the_new_one_comes(model, monkeypatch):
    """Memory holds one of them, when the last batch of a set is smaller."""
    decoder, make = GroupDecoder(model, LANGUAGE), PaliGemma.new_cache
    decoder(pictures(model, 2))
    old = weakref.ref(decoder.cache)

    def new_cache(*args):
        assert old() is None
        return make(*args)

    monkeypatch.setattr(PaliGemma, "new_cache", new_cache)
    decoder(pictures(model, 1))


def test_memory_runs_out_on_the_way(model, monkeypatch):
    """A batch that does not fit leaves a decoder that decodes smaller ones as before."""
    decoder, images = GroupDecoder(model, LANGUAGE), pictures(model, 2)
    expected = decoder(images)

    def full(make):
        def allocate(*shape, **options):
            if shape == (GROUP, 3):
                raise torch.OutOfMemoryError("CUDA out of memory")
            return make(*shape, **options)

        return allocate

    for name in ("zeros", "empty"):
        monkeypatch.setattr(torch, name, full(getattr(torch, name)))
    with pytest.raises(torch.OutOfMemoryError):
        decoder(pictures(model, 3))
    assert equal(decoder(images), expected)


# Early stop and sampling ------------------------------------------------------------------------------------


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


# On a GPU ---------------------------------------------------------------------------------------------------


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


def test_decoding_is_on_the_gpu_of_the_images(model, current, monkeypatch):
    """The buffers and the graph are made, and every group decoded, with the images' device current."""
    seen, images, prepare, group = [], pictures(model, 2), GroupDecoder._prepare, GroupDecoder._decode_group

    def note(function):
        def noted(*args, **kwargs):
            seen.append(bool(current) and current[-1] is images)
            return function(*args, **kwargs)

        return noted

    monkeypatch.setattr(GroupDecoder, "_prepare", note(prepare))
    monkeypatch.setattr(GroupDecoder, "_decode_group", note(group))
    GroupDecoder(model, LANGUAGE)(images)
    assert seen == [True] * (1 + LANGUAGE.groups) and not current


@pytest.fixture
def graphs(monkeypatch):
    """torch.cuda's streams and graphs as names; what happens to them is recorded in order."""
    happened = []

    class Stream(str):
        def wait_stream(self, other):
            happened.append(f"{self} waits for {other}")

    class Graph:
        def replay(self):
            happened.append("replay")

    @contextlib.contextmanager
    def on(stream):
        happened.append(f"on {stream}")
        yield
        happened.append(f"off {stream}")

    @contextlib.contextmanager
    def capture(graph, stream=None, capture_error_mode="global"):
        happened.append(f"capture on {stream}, {capture_error_mode}")
        yield
        happened.append("captured")

    fakes = dict(Stream=lambda: Stream("side"), current_stream=lambda: Stream("main"), stream=on)
    for name, fake in (fakes | dict(CUDAGraph=Graph, graph=capture)).items():
        monkeypatch.setattr(torch.cuda, name, fake)
    return happened


def test_capture(graphs):
    """Trial runs on a stream of its own, each prepared for, then the capture, on the same stream: the default
    one may be of another GPU. Other threads may go on using CUDA meanwhile."""
    outputs = torch.zeros(1), torch.ones(1)

    def function():
        graphs.append("run")
        return outputs

    replay = capture_graph(function, lambda: graphs.append("prepare"))
    assert graphs == [
        *("side waits for main", "on side", "prepare", "run", "prepare", "run", "prepare", "off side"),
        *("main waits for side", "capture on side, thread_local", "run", "captured"),
    ]
    graphs.clear()
    assert replay() is outputs and replay() is outputs and graphs == ["replay", "replay"]


def test_replays_decode_what_the_loop_does(model, taped_graphs):
    """The operations of one group, captured once for a size, decode every group of every batch."""
    plain = [GroupDecoder(model, LANGUAGE)(pictures(model, 2, seed)) for seed in (0, 1)]
    tapes, decoder = taped_graphs(GroupDecoder), GroupDecoder(model, LANGUAGE)
    answers = [decoder(pictures(model, 2, seed)) for seed in (0, 1, 0)]
    assert all(equal(answer, plain[seed]) for seed, answer in zip((0, 1, 0), answers, strict=True))
    assert len(tapes) == 1 and not torch.equal(plain[0].tokens, plain[1].tokens)
    graph = weakref.ref(decoder.decode_group)
    decoder.release()
    assert graph() is None and equal(decoder(pictures(model, 2, 1)), plain[1]) and len(tapes) == 2


def test_trial_runs_draw_from_numbers_in_range(model, monkeypatch):
    """A graph is tried before there are random numbers: what memory held could choose ids that are none."""
    decoder = GroupDecoder(model, LANGUAGE)
    monkeypatch.setattr(torch, "empty", lambda *shape, **options: torch.full(shape, float("inf")))
    decoder._prepare(2, torch.device("cpu"))
    assert (decoder.uniform >= 0).all() and (decoder.uniform < 1).all()


def test_no_random_state_is_read_while_decoding(model, monkeypatch):
    """--recompute: `checkpoint` reads the GPU's random state, which the capture of a graph forbids; where
    there is no gradient it has nothing to do. Where there is one, every block is run twice."""
    recomputing, runs, read = copy.deepcopy(model), [], torch.get_rng_state
    options = argparse.Namespace(recompute=True, compile=False, shard=False)
    fit.distribute(SimpleNamespace(model=recomputing), options)

    def forbidden():
        raise RuntimeError("Cannot call CUDAGeneratorImpl::current_seed during CUDA graph capture")

    monkeypatch.setattr(torch, "get_rng_state", forbidden)
    assert equal(
        GroupDecoder(recomputing, LANGUAGE)(pictures(model, 2)),
        GroupDecoder(model, LANGUAGE)(pictures(model, 2)),
    )
    monkeypatch.setattr(torch, "get_rng_state", read)
    for block in recomputing.decoder.layers:
        block.mlp.register_forward_hook(lambda *args: runs.append(1))
    recomputing(pictures(model, 1), torch.ones(1, 4, dtype=torch.int64), 2).sum().backward()
    assert len(runs) == 2 * len(recomputing.decoder.layers)
