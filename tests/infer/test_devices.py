"""Programs make the GPU that they are given the current one.

torch.cuda's functions are replaced by ones that keep a record: most machines that run the tests have no
second GPU, or none.
"""

import argparse
import os
import sys
from types import SimpleNamespace

import pytest
import torch

from infer import benchmark, benchmark_step, evaluate, tradeoffs
from infer.lib import measuring
from infer.lib import options as loading
from model import PaliGemma
from model.io.hub import NANO
from train.run.processes import peak_memory


class Stop(Exception):
    """Raised by a stand-in once the test has seen enough."""


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
    stub = SimpleNamespace(folder=None, decoder=torch.nn.Module(), projector=torch.nn.Linear(1, 1))
    monkeypatch.setattr(
        PaliGemma, "from_pretrained", lambda *a, device, **k: gpus.append(("load", device)) or stub
    )
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

    def begin(*args):  # the GPU's name is asked for before
        raise Stop

    monkeypatch.setattr(benchmark, "limits", begin)
    options = dict(
        model="nano", device="cuda:1", dtype="float32", int8=False, compile=False, peers=[], minutes=1
    )
    with pytest.raises(Stop):
        benchmark.measure(NANO, argparse.Namespace(**options))
    asked = [device for name, device in gpus if name != "current"]
    assert len(asked) == 8 and set(asked) == {"cuda:1"} and ("get_device_name", "cuda:1") in gpus
