"""The restricted head: the Triton kernel against the plain form, in Triton's interpreter or on a GPU."""

from dataclasses import fields

import pytest
import torch
from helpers import python

from model.config import TextConfig
from model.decoding import head_kernel
from model.decoding.closed_set import Head
from model.decoding.generate import GREEDY, Sampling
from model.decoding.head_kernel import PROGRAMS, TILES, FusedHead, tile_for
from model.gemma import Gemma

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # conftest.py asks for the interpreter on a CPU
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []  # there, -m gpu runs all of these


VOCAB, LOC0, CLASS0 = 1400, 150, 7


NEAR = dict(rtol=1e-5, atol=1e-6)


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """The largest tiles, as the interpreter takes a while for each program."""
    if DEVICE == "cpu":
        monkeypatch.setattr(head_kernel, "PROGRAMS", 1)


def heads(width, classes=80, dtype=torch.float32, cap=30.0, noise_feedback=True, sampling=GREEDY, seed=0):
    """The plain head and the kernel, on the same random embedding."""
    shape = dict(width=width, mlp=8, layers=1, heads=1, kv_heads=1, head_dim=8, query_scale=1.0)
    config = TextConfig(version=2, vocab_size=VOCAB, final_cap=cap, **shape)
    decoder = Gemma(config)
    noise = torch.randn(VOCAB, width, generator=torch.Generator().manual_seed(seed))
    decoder.embed.weight = torch.nn.Parameter((noise * 3 / width**0.5).to(DEVICE, dtype), requires_grad=False)
    allowed = [(LOC0, LOC0 + 1024)] * 4 + [(CLASS0, CLASS0 + classes + 1)]
    options = decoder, allowed, noise_feedback, sampling
    return Head(*options), FusedHead(*options)


def inputs(batch, width, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(batch, width, generator=generator).to(DEVICE, dtype)
    return hidden, torch.rand(batch, generator=generator).to(DEVICE)


def check(plain, fused):
    for field in fields(plain):
        a, b = getattr(plain, field.name), getattr(fused, field.name)
        assert a.shape == b.shape and a.dtype == b.dtype
        assert torch.equal(a, b) if a.dtype == torch.int64 else torch.allclose(a, b, **NEAR), field.name


@pytest.mark.parametrize(("cap", "noise_feedback"), [(30.0, True), (None, False)])
@pytest.mark.parametrize(("batch", "width", "classes"), [(1, 16, 80), (3, 130, 1), (17, 64, 97), (33, 33, 5)])
def test_kernel_greedy(batch, width, classes, noise_feedback, cap):
    """Sizes that fill no block, one row and many, a coordinate and a class; the buffers serve every call."""
    plain, fused = heads(width, classes, cap=cap, noise_feedback=noise_feedback)
    for slot in (3, 4):
        hidden, uniform = inputs(batch, width, seed=slot)
        check(plain(hidden, slot, uniform), fused(hidden, slot, uniform))


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(1.0, 0.9)], ids=["greedy", "sampled"])
@pytest.mark.parametrize("slot", [2, 4])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter, about NaN
def test_kernel_without_numbers(slot, sampling):
    """One logit that is NaN makes the score NaN, whatever is chosen. (If all are, the interpreter stops.)"""
    both = heads(64, sampling=sampling)
    both[0].decoder.embed.weight.data[(CLASS0 if slot == 4 else LOC0) + 3] = torch.nan
    hidden, uniform = inputs(3, 64)
    for head in both:
        assert head(hidden, slot, uniform).score.isnan().all()


@pytest.mark.parametrize("tile", TILES)
def test_kernel_of_every_tile(tile, monkeypatch):
    """More states than a tile has, so that the last tile of states and of classes is not full; a width that
    is not a multiple of its part."""
    dtype = (torch.float32, torch.bfloat16)[TILES.index(tile) % 2]
    monkeypatch.setattr(head_kernel, "TILES", (tile,))
    exact, fused = heads(140, classes=70, dtype=dtype)
    exact.decoder.embed.weight = torch.nn.Parameter(exact.decoder.embed.weight.float(), requires_grad=False)
    hidden, uniform = inputs(tile[0] + 3, 140, dtype)
    check(exact(hidden.float(), 4, uniform), fused(hidden, 4, uniform))


@pytest.mark.parametrize("bytes_each", [2, 4])
@pytest.mark.parametrize("states", [1, 16, 24, 32, 51, 64, 128, 256, 512, 2048])
def test_tiles(states, bytes_each, monkeypatch):
    """As many programs as a GPU has SMs, where there is work for them, and few more, unless the tiles are the
    largest; and a tile's part of the width has one size in bytes."""
    monkeypatch.setattr(head_kernel, "PROGRAMS", PROGRAMS)
    for rows in (1024, 81, 2):
        tile = tile_for(states, rows, bytes_each)
        block_b, block_r, block_d = tile.values()
        programs = -(-states // block_b) * -(-rows // block_r)
        assert programs >= PROGRAMS or (block_b, block_r) == TILES[-1][:2]
        assert programs < 4 * PROGRAMS or (block_b, block_r) == TILES[0][:2]
        assert 12 << 10 <= (block_b + block_r) * block_d * bytes_each <= 16 << 10
    assert tile_for(16, 1024, 2)["BLOCK_R"] == 8 and tile_for(512, 1024, 2)["BLOCK_R"] == 64


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 0.9), (2.0, 0.3), (1.0, 1e-6)])
def test_kernel_samples(temperature, top_p):
    """The same random numbers choose the same ids."""
    sampling = Sampling(temperature, top_p)
    plain, fused = heads(48, classes=20, sampling=sampling)
    for slot in (2, 4):
        hidden, uniform = inputs(8, 48, seed=slot)
        check(plain(hidden, slot, uniform), fused(hidden, slot, uniform))


def test_kernel_refuses_what_it_would_ignore():
    with pytest.raises(ValueError, match="top-k 3"):
        heads(16, sampling=Sampling(1.0, top_k=3))


def test_kernel_bfloat16():
    """Weights and states in bfloat16, sums in float32: nearer to the exact logits than the plain form's."""
    _, fused = heads(96, dtype=torch.bfloat16)
    exact, _ = heads(96, dtype=torch.bfloat16)
    exact.decoder.embed.weight = torch.nn.Parameter(exact.decoder.embed.weight.float(), requires_grad=False)
    hidden, uniform = inputs(9, 96, torch.bfloat16)
    for slot in (0, 4):
        check(exact(hidden.float(), slot, uniform), fused(hidden, slot, uniform))


def test_ties():
    """Equal logits: the first id, in both; noise as likely as a class is not noise."""
    plain, fused = heads(16, classes=6)
    hidden, uniform = torch.zeros(5, 16, device=DEVICE), torch.rand(5, device=DEVICE)
    for slot, first, count in ((0, LOC0, 1024), (4, CLASS0, 7)):
        choice = plain(hidden, slot, uniform)
        check(choice, fused(hidden, slot, uniform))
        assert (choice.best == first).all() and (choice.fed == first).all()
        assert torch.allclose(choice.score, torch.full_like(choice.score, 1 / count))


@pytest.mark.parametrize("noise_feedback", [True, False])
def test_all_noise(noise_feedback):
    """Noise takes nearly all the probability: still a class is the answer, noise is fed back or not."""
    plain, fused = heads(16, classes=6, cap=None, noise_feedback=noise_feedback)
    weight = plain.decoder.embed.weight
    weight[CLASS0 + 6] = 100.0
    hidden, uniform = torch.ones(3, 16, device=DEVICE), torch.rand(3, device=DEVICE)
    choice = plain(hidden, 4, uniform)
    check(choice, fused(hidden, 4, uniform))
    assert (choice.noise == 1).all() and (choice.score < 1e-30).all()
    assert (choice.best < CLASS0 + 6).all()
    assert ((choice.fed == CLASS0 + 6) if noise_feedback else (choice.fed == choice.best)).all()


# For GPUs that are not here ---------------------------------------------------------------------------------


def test_the_kernels_are_launched_on_the_gpu_of_their_tensors(current, monkeypatch):
    """Also for who calls FusedHead by itself."""
    launches, hidden = [], torch.zeros(2, 16, device=DEVICE)

    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, **kwargs: launches.append(bool(current) and current[-1] is hidden)

    for name in ("restricted_logits", "choose_one"):
        monkeypatch.setattr(head_kernel, name, Kernel())
    plain, _ = heads(16, classes=3)
    head = head_kernel.FusedHead(plain.decoder, plain.allowed, noise_feedback=False, sampling=GREEDY)
    head(hidden, 0, torch.zeros(2, device=DEVICE))
    assert launches == [True, True] and not current


COMPILE = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import triton
from model.decoding.head_kernel import STAGES, TILES, choose_one, restricted_logits

POINTERS = dict(position="*i64", logits="*fp32", uniform="*fp32", fed="*i64", best_id="*i64", score="*fp32")
POINTERS |= dict(noise="*fp32", hidden="*bf16", embed="*bf16")
NUMBERS = dict.fromkeys(["B", "D", "first", "rows", "choices"], "i32")
NUMBERS |= dict.fromkeys(["cap", "temperature", "top_p"], "fp32")


def compiled(kernel, target, aligned, constants, types=(), **options):
    # aligned: numbers and addresses are known to be multiples of 16, as D and the rows of a cache are
    types = POINTERS | NUMBERS | dict(types) | dict.fromkeys(constants, "constexpr")
    signature = {name: types[name] for name in kernel.arg_names}
    arguments = [i for i, name in enumerate(signature) if name in ("B", "D", "hidden", "embed", "logits")]
    attributes = {(i,): [["tt.divisibility", 16]] for i in arguments if aligned}
    source = ASTSource(kernel, signature, constants, attributes)
    found = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
    assert len(found.asm["cubin"]) > 1000
    assert found.metadata.shared <= 99 << 10  # bytes that a program may have on any GPU from sm_80 on
    return found.asm["ptx"]


for target in (80, 90):
    for weight, aligned, tiles in (("*bf16", True, TILES[::5]), ("*fp32", False, TILES[:1])):
        for b, r, d in tiles:
            print(target, weight, b, r)
            block = dict(BLOCK_B=b, BLOCK_R=r, BLOCK_D=d if weight == "*bf16" else d // 2)
            types = dict(hidden=weight, embed=weight)
            constants = dict(WIDEN=False) | block
            ptx = compiled(restricted_logits, target, aligned, constants, types, num_stages=STAGES)
            assert ("mma" in ptx) == (weight == "*bf16")
            assert ("cp.async" in ptx) or not aligned
    for sample in (False, True):
        compiled(choose_one, target, True, dict(NOISE_FEEDBACK=not sample, SAMPLE=sample))
"""


def test_compiles_without_a_gpu(tmp_path):
    """For sm_80 and sm_90; bfloat16 products run on the tensor cores."""
    python("-c", COMPILE, TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path))
