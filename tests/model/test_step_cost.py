"""What a decoding step launches on a GPU, counted without one: operators, and the graphs of torch.compile."""

import copy
import logging
from dataclasses import replace

import pytest
import torch
from helpers import load
from torch.utils._python_dispatch import TorchDispatchMode

from model import PaliGemma
from model.config import VARIANTS
from model.decoding.compiled import CompiledBlock, compile_steps
from model.decoding.detector import closed_set_decoder
from model.decoding.joined import fix_norms, join

NO_KERNEL = {"_unsafe_view", "detach", "empty", "empty_like", "new_empty", "lift_fresh"}
LAYERS = 26


class Operators(TorchDispatchMode):
    """Counts the operators that compute something: about one kernel each on a GPU."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += not function.is_view and function.overloadpacket.__name__ not in NO_KERNEL
        return function(*args, **(kwargs or {}))


def official_shape() -> PaliGemma:
    """The layers, norms and caps of the 3B in bfloat16, narrow."""
    full = VARIANTS["paligemma2-3b-224"]
    vision = replace(full.vision, image_size=28, width=16, heads=2, mlp=16, layers=1)
    text = replace(full.text, width=16, heads=2, kv_heads=1, head_dim=8, mlp=16, vocab_size=1200)
    assert text.layers == LAYERS and text.version == 2
    return PaliGemma(replace(full, vision=vision, text=text, image_token=1100)).bfloat16().eval()


@torch.no_grad()  # not inference_mode, in which one operator may stand for several
def operators(model: PaliGemma, branches: int | None = None) -> int:
    """Of one step."""
    prompt = torch.tensor([[2, 3, 4]])
    cache = model.new_cache(1, 20)
    model.prefill(model.encode(torch.zeros(1, 3, 28, 28)), prompt, cache)
    with Operators() as seen:
        if branches is None:
            model.step(torch.tensor([5]), cache)
        else:
            model.step_branches(
                torch.zeros(1, branches, dtype=torch.int64), torch.arange(branches)[None], cache
            )
    return seen.count


def test_operators_of_a_step(monkeypatch):
    """Nobody adds some to 26 layers unseen: 42 a layer and 25 for the rest; they were 62 and 26."""
    # On a GPU a fused kernel; a CPU would count six operators.
    monkeypatch.setattr(torch.nn.functional, "rms_norm", lambda x, shape, scale, eps: x * scale)
    model = official_shape()
    separate = operators(model)
    fix_norms(model)
    join(model)
    assert operators(model) <= 42 * LAYERS + 25
    assert operators(model, branches=4) <= 44 * LAYERS + 40
    assert separate - operators(model) >= 20 * LAYERS


def counting(graphs: list) -> CompiledBlock:
    """A block compiled by TorchDynamo alone, which leaves the graphs in the list."""

    def keep(graph, inputs):
        graphs.append(graph)
        return graph

    return CompiledBlock(keep)


def test_one_graph_serves_all_layers_and_steps(model):
    """In sequence one for all groups; another for branches; a second size of batch once more, no third."""
    plain, graphs = load(model), []
    fix_norms(plain)
    join(plain)
    compiled = copy.deepcopy(plain)
    compiled.decoder.run_step = counting(graphs)
    counts = []
    for decode, batch in (("sequence", 3), ("parallel", 3), ("sequence", 2), ("sequence", 4)):
        images = torch.rand(batch, 3, *[plain.config.vision.image_size] * 2) * 2 - 1
        options = dict(groups=2) if decode == "sequence" else dict(branches=3)
        theirs, ours = (closed_set_decoder(m, decode, **options)(images) for m in (plain, compiled))
        assert torch.equal(ours.tokens, theirs.tokens)
        assert torch.allclose(ours.scores, theirs.scores, atol=1e-5)
        counts.append(len(graphs))
    assert counts == [1, 2, 3, 3]


def test_a_step_that_does_not_compile_is_said_in_one_line(model, caplog):
    def no_compiler(graph, inputs):
        raise RuntimeError("no C++ compiler\nand much more")

    plain = load(model)
    failing = copy.deepcopy(plain)
    failing.decoder.run_step = CompiledBlock(no_compiler)
    images = torch.rand(1, 3, *[plain.config.vision.image_size] * 2) * 2 - 1
    with caplog.at_level(logging.WARNING):
        ours = closed_set_decoder(failing, "sequence", groups=1)(images)
    lines = [r.getMessage() for r in caplog.records if r.name == "model.decoding.compiled"]
    assert len(lines) == 1 and "no C++ compiler" in lines[0] and "\n" not in lines[0]
    assert torch.equal(ours.tokens, closed_set_decoder(plain, "sequence", groups=1)(images).tokens)


def test_errors_that_are_not_the_compilers(model):
    """What fails uncompiled too is raised as it is."""
    broken = load(model)
    broken.decoder.run_step = counting([])
    broken.decoder.layers[1].mlp.down_proj = torch.nn.Linear(3, 5)
    with pytest.raises(RuntimeError, match="shapes"), torch.inference_mode():
        cache = broken.new_cache(1, 5)
        cache.start(torch.ones(1, 3, dtype=torch.bool), torch.arange(1, 4)[None])
        broken.step(torch.tensor([5]), cache)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("decode", ["sequence", "parallel"])
def test_compiled_and_joined_on_a_gpu(model, decode, caplog):
    """In float32: the graph of joined and compiled steps decodes what separate, uncompiled ones do; and they
    were compiled. Then as many images as need other kernels."""
    plain = load(model).cuda()
    others = [copy.deepcopy(plain) for _ in range(2)]
    for other in others:
        fix_norms(other)
        join(other)
    compile_steps(others[1])
    decoders = [closed_set_decoder(m, decode) for m in (plain, *others)]
    for batch in (1, 3, 2):
        images = (torch.rand(batch, 3, *[plain.config.vision.image_size] * 2) * 2 - 1).cuda()
        with caplog.at_level(logging.WARNING):
            theirs, *ours = (decoder(images) for decoder in decoders)
        for answer in ours:
            assert torch.equal(answer.tokens, theirs.tokens)
            assert torch.allclose(answer.scores, theirs.scores, atol=1e-4)
    assert not [r for r in caplog.records if r.name == "model.decoding.compiled"]


def test_an_older_pytorch(monkeypatch):
    """torch.compile without the options that came after 2.11 is called without them."""
    given = {}

    def compile(model, *, fullgraph=False, dynamic=None, backend="inductor", mode=None, options=None):
        given.update(fullgraph=fullgraph, backend=backend)
        return model

    monkeypatch.setattr(torch, "compile", compile)
    CompiledBlock()
    assert given == dict(fullgraph=True, backend="inductor")
