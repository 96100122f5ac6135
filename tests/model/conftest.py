"""Fixtures of the tests of the library."""

import contextlib

import pytest
import torch
from helpers import load
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model.cache import KVCache
from model.io.adapter import save_adapter
from model.lora import TARGETS, add_lora


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


@pytest.fixture
def adapter(model, tmp_path):
    """A folder with an adapter of that model."""
    tuned = load(model)
    add_lora(tuned, TARGETS["decoder"], rank=2)
    save_adapter(tuned, tmp_path / "adapter")
    return tmp_path / "adapter"


# A CUDA graph on the CPU ------------------------------------------------------------------------------------


class Tape(TorchDispatchMode):
    """Records PyTorch's operations, to run them again on the same tensors without the Python around them:
    what a CUDA graph does. Numbers that Python computed stay as they were at the capture."""

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing: Python asks for a number")
        results = function(*args, **(kwargs or {}))
        # What is new is written again at a replay; views, and what was changed in place, are there already.
        read = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if is_tensor(x)}
        made = [is_tensor(x) and x.untyped_storage().data_ptr() not in read for x in tree_leaves(results)]
        self.operations.append((function, args, kwargs or {}, tree_leaves(results), made))
        return results

    def replay(self):
        for function, args, kwargs, results, made in self.operations:
            again = tree_leaves(function(*args, **kwargs))
            for old, new, is_made in zip(results, again, made, strict=True):
                if is_made:
                    old.copy_(new)


def is_tensor(x) -> bool:
    return isinstance(x, torch.Tensor)


@pytest.fixture
def taped_graphs(monkeypatch):
    """taped_graphs(Decoder): its objects capture their graphs as on a GPU, on the tapes that it returns.
    Steps read whole caches, as there."""
    tapes = []
    monkeypatch.setattr("model.paligemma.KVCache", lambda *args: KVCache(*args[:-1], True))

    class Stream:
        def wait_stream(self, other):
            pass

    class Graph(Tape):
        def __init__(self):
            super().__init__()
            tapes.append(self)

    @contextlib.contextmanager
    def capture(graph, **options):
        with graph:
            yield

    def on_the_cpu(make):
        return lambda *shape, device=None, **options: make(*shape, **options)

    def tape(decoder: type) -> list[Tape]:
        prepare = decoder._prepare

        def prepare_as_on_a_gpu(self, batch_size, device):
            with monkeypatch.context() as patch:  # what is asked for on the GPU comes from the CPU
                for name in ("zeros", "ones"):
                    patch.setattr(torch, name, on_the_cpu(getattr(torch, name)))
                prepare(self, batch_size, torch.device("cuda"))

        monkeypatch.setattr(decoder, "_prepare", prepare_as_on_a_gpu)
        return tapes

    fakes = dict(Stream=Stream, current_stream=Stream, stream=lambda _: contextlib.nullcontext())
    for name, fake in (fakes | dict(CUDAGraph=Graph, graph=capture)).items():
        monkeypatch.setattr(torch.cuda, name, fake)
    return tape
