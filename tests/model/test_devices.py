"""Which GPU the work lands on, and how the decode loop is captured: torch.cuda's functions replaced by ones
that keep a record, as most machines that run the tests have no second GPU, or none."""

import argparse
import contextlib
import copy
import os
import sys
import weakref
from types import SimpleNamespace

import pytest
import torch
from helpers import equal
from reference import LANGUAGE, LOC0, UNUSED0, random_inputs, save, tiny_paligemma

from infer import benchmark, benchmark_step, evaluate, tradeoffs
from infer.lib import measuring
from infer.lib import options as loading
from model import PaliGemma
from model.decoding.closed_set import GROUP, GroupDecoder, capture_graph
from model.decoding.generate import GREEDY
from model.gemma import Gemma
from model.io.hub import NANO
from train import fit
from train.run.log import peak_memory


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = save(tiny_paligemma(0), tmp_path_factory.mktemp("tiny"))
    return PaliGemma.from_pretrained(str(folder), dtype=torch.float32)


def pictures(batch, seed=0):
    return random_inputs(tiny_paligemma(0), batch=batch, seed=seed)[0]


class Stop(Exception):
    """Raised by a stand-in once the test has seen enough."""


# ---- programs make their GPU the current one ---------------------------------------------------------------


@pytest.fixture
def gpus(monkeypatch):
    """Tensors can be "on" any GPU; the calls that choose or ask a device are recorded: (name, device)."""
    calls, empty = [], torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, device=None, **k: empty(*a, **k))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch._C, "_cuda_setDevice", lambda i: calls.append(("current", i)), raising=False)
    for name in ("synchronize", "max_memory_allocated", "get_device_name"):
        record = lambda device=None, name=name: calls.append((name, device))  # noqa: E731
        monkeypatch.setattr(torch.cuda, name, record)
    return calls


@pytest.mark.parametrize(
    ("device", "expected"),
    [("cuda:1", [("current", 1)]), ("cuda", []), ("auto", []), ("cpu", [])],
)
def test_load_model_takes_its_gpu(device, expected, gpus, monkeypatch):
    """Before the weights are loaded, so that nothing lands on GPU 0; a device without a number stays."""

    def from_pretrained(*args, device, **kwargs):
        gpus.append(("load", device))
        raise Stop

    monkeypatch.setattr(PaliGemma, "from_pretrained", from_pretrained)
    parser = argparse.ArgumentParser()
    loading.add_model_arguments(parser)
    with pytest.raises(Stop):
        loading.load_model(parser.parse_args(["--device", device]))
    assert gpus == [*expected, ("load", "cuda" if device == "auto" else device)]


@pytest.mark.parametrize("asked", ["auto", "cuda"])
def test_every_rank_of_torchrun_takes_its_gpu(asked, gpus, monkeypatch):
    """evaluate.py: GPU number LOCAL_RANK, on every node."""
    for name, value in dict(WORLD_SIZE="4", RANK="3", LOCAL_RANK="1").items():
        monkeypatch.setitem(os.environ, name, value)
    monkeypatch.setattr(evaluate, "join_processes", lambda *args, **kwargs: None)
    monkeypatch.setattr(PaliGemma, "from_pretrained", lambda *a, device, **k: gpus.append(("load", device)))
    monkeypatch.setattr("model.decoding.packing.can_pack", lambda model: False)
    parser = argparse.ArgumentParser()
    loading.add_model_arguments(parser)
    args = parser.parse_args(["--device", asked])
    evaluate.join_torchrun(args)
    loading.load_model(args)
    assert gpus == [("current", 1), ("load", "cuda:1")]


def test_a_device_that_is_not_there():
    with pytest.raises(ValueError, match="--device cuda:77 cannot be used here, try --device cpu"):
        loading.usable_device("cuda:77")


PROGRAMS = {
    "benchmark": (benchmark, "measure", []),
    "benchmark, a side's process": (benchmark, "child", ["--child", "ours"]),
    "the head": (tradeoffs, "TiedHead", ["head"]),
    "a LoRA step": (benchmark_step, "our_step", ["--child", "ours"]),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_benchmarks_take_their_gpu(name, gpus, monkeypatch):
    """Before the work begins."""
    module, work, argv = PROGRAMS[name]

    def begin(*args, **kwargs):
        raise Stop

    monkeypatch.setattr(module, work, begin)
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *argv, "--device", "cuda:1"])
    with pytest.raises(Stop):
        module.main()
    assert gpus == [("current", 1)]


def test_benchmarks_ask_their_gpu(gpus, monkeypatch):
    """Clocks wait for, memory and names are of, the GPU that is measured."""
    measuring.seconds(lambda: None, "cuda:1")
    peak_memory("cuda:1")
    step = lambda *args, **kwargs: (lambda: 0.0, [torch.nn.Parameter(torch.zeros(1))])  # noqa: E731
    monkeypatch.setattr(benchmark_step, "our_step", step)
    monkeypatch.setattr(benchmark_step, "peak_memory", lambda device: 0)
    benchmark_step.measure("ours", None, argparse.Namespace(device="cuda:1", steps=1))
    monkeypatch.setattr(benchmark, "copy_bandwidth", lambda device: 1.0)

    def begin(*args):  # the GPU's name is asked for before
        raise Stop

    monkeypatch.setitem(benchmark.SIDES, "ours", begin)
    options = dict(model="nano", device="cuda:1", dtype="float32", int8=False, compile=False, peer=False)
    with pytest.raises(Stop):
        benchmark.measure(NANO, argparse.Namespace(memory=False, **options))
    asked = [device for name, device in gpus if name != "current"]
    assert len(asked) == 8 and set(asked) == {"cuda:1"} and ("get_device_name", "cuda:1") in gpus


# ---- the library's own code runs on the GPU of its tensors -------------------------------------------------


@pytest.fixture
def current(monkeypatch):
    """The tensors whose device is the current one, innermost last."""
    stack = []

    @contextlib.contextmanager
    def device_of(tensor):
        stack.append(tensor)
        yield
        stack.pop()

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    return stack


def test_decoding_is_on_the_gpu_of_the_images(model, current, monkeypatch):
    """The buffers and the graph are made, and every group decoded, with the images' device current."""
    seen, images, prepare, group = [], pictures(2), GroupDecoder._prepare, GroupDecoder._decode_group

    def note(function):
        def noted(*args, **kwargs):
            seen.append(bool(current) and current[-1] is images)
            return function(*args, **kwargs)

        return noted

    monkeypatch.setattr(GroupDecoder, "_prepare", note(prepare))
    monkeypatch.setattr(GroupDecoder, "_decode_group", note(group))
    GroupDecoder(model, LANGUAGE)(images)
    assert seen == [True] * (1 + LANGUAGE.groups) and not current


def test_the_kernel_is_launched_on_the_gpu_of_its_tensors(current, monkeypatch):
    """Also for who calls FusedHead by itself."""
    pytest.importorskip("triton")
    from model.decoding import head_kernel

    launches = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda hidden, *args, **kwargs: launches.append(current[-1] is hidden if current else None)

    monkeypatch.setattr(head_kernel, "restricted_head", Kernel())
    decoder = Gemma(tiny_config())
    allowed = [(LOC0, LOC0 + 1024)] * 4 + [(UNUSED0, UNUSED0 + 4)]
    head = head_kernel.FusedHead(decoder, allowed, noise_feedback=False, sampling=GREEDY)
    head(torch.zeros(2, decoder.config.width), 0, torch.zeros(2))
    assert launches == [True] and not current


def tiny_config():
    from model.config import TextConfig

    shape = dict(width=16, mlp=8, layers=1, heads=1, kv_heads=1, head_dim=8, query_scale=1.0)
    return TextConfig(version=2, vocab_size=LOC0 + 1024, **shape)


# ---- the graph, and what stays between batches -------------------------------------------------------------


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


def test_nan_does_not_outlive_its_batch(model):
    """The cache is used again; slots that are not read have weight 0, and 0 times NaN is NaN."""
    decoder, images = GroupDecoder(model, LANGUAGE), pictures(2)
    decoder(images * float("nan"))
    assert equal(decoder(images), GroupDecoder(model, LANGUAGE)(images))


def test_the_old_cache_goes_before_the_new_one_comes(model, monkeypatch):
    """Memory holds one of them, when the last batch of a set is smaller."""
    decoder, make = GroupDecoder(model, LANGUAGE), PaliGemma.new_cache
    decoder(pictures(2))
    old = weakref.ref(decoder.cache)

    def new_cache(*args):
        assert old() is None
        return make(*args)

    monkeypatch.setattr(PaliGemma, "new_cache", new_cache)
    decoder(pictures(1))


def test_memory_runs_out_on_the_way(model, monkeypatch):
    """A batch that does not fit leaves a decoder that decodes smaller ones as before."""
    decoder, images = GroupDecoder(model, LANGUAGE), pictures(2)
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
        decoder(pictures(3))
    assert equal(decoder(images), expected)


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
    assert equal(GroupDecoder(recomputing, LANGUAGE)(pictures(2)), GroupDecoder(model, LANGUAGE)(pictures(2)))
    monkeypatch.setattr(torch, "get_rng_state", read)
    for block in recomputing.decoder.layers:
        block.mlp.register_forward_hook(lambda *args: runs.append(1))
    recomputing(pictures(1), torch.ones(1, 4, dtype=torch.int64), 2).sum().backward()
    assert len(runs) == 2 * len(recomputing.decoder.layers)
