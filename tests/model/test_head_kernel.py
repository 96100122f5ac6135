"""The restricted head: the Triton kernel against the plain form, in Triton's interpreter or on a GPU."""

from dataclasses import fields

import pytest
import torch
from helpers import python

from model.config import TextConfig
from model.decoding.closed_set import Head
from model.decoding.generate import GREEDY, Sampling
from model.decoding.head_kernel import FusedHead
from model.gemma import Gemma

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # conftest.py asks for the interpreter on a CPU


VOCAB, LOC0, CLASS0 = 1400, 150, 7


NEAR = dict(rtol=1e-5, atol=1e-6)


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


def test_kernel_many_rows():
    """The branches of 11 images, 24 each; then fewer rows, in the same buffers. Of classes only, which is all
    that parallel decoding chooses here; 1,024 coordinates for this many rows take the interpreter half a
    minute."""
    plain, fused = heads(33, noise_feedback=False)
    for count in (264, 20):
        hidden, uniform = inputs(count, 33, seed=count)
        check(plain(hidden, 4, uniform), fused(hidden, 4, uniform))


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 0.9), (2.0, 0.3), (1.0, 1e-6)])
def test_kernel_samples(temperature, top_p):
    """The same random numbers choose the same ids."""
    sampling = Sampling(temperature, top_p)
    plain, fused = heads(48, classes=20, sampling=sampling)
    for slot in (2, 4):
        hidden, uniform = inputs(8, 48, seed=slot)
        check(plain(hidden, slot, uniform), fused(hidden, slot, uniform))


def test_kernel_bfloat16():
    """Weights and states in bfloat16, sums in float32: nearer to the exact logits than the plain form's."""
    _, fused = heads(96, dtype=torch.bfloat16)
    exact, _ = heads(96, dtype=torch.bfloat16)
    exact.decoder.embed.weight = torch.nn.Parameter(exact.decoder.embed.weight.float(), requires_grad=False)
    hidden, uniform = inputs(9, 96, torch.bfloat16)
    for slot in (0, 4):
        check(exact(hidden.float(), slot, uniform), fused(hidden, slot, uniform))


def test_kernel_reads_the_position_on_the_device():
    """Any position of the answer, as a number in the device's memory."""
    plain, fused = heads(32)
    hidden, uniform = inputs(2, 32)
    position = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    for value in (0, 4, 9, 123):
        check(plain(hidden, value % 5, uniform), fused(hidden, position.fill_(value), uniform))


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


def test_the_kernel_is_launched_on_the_gpu_of_its_tensors(current, monkeypatch):
    """Also for who calls FusedHead by itself."""
    pytest.importorskip("triton")
    from model.decoding import head_kernel

    launches = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda hidden, *args, **kwargs: launches.append(current[-1] is hidden if current else None)

    monkeypatch.setattr(head_kernel, "restricted_head", Kernel())
    plain, _ = heads(16, classes=3)
    head = head_kernel.FusedHead(plain.decoder, plain.allowed, noise_feedback=False, sampling=GREEDY)
    head(torch.zeros(2, 16, device=DEVICE), 0, torch.zeros(2, device=DEVICE))
    assert launches == [True] and not current


COMPILE = """
from itertools import product

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from model.decoding.head_kernel import BLOCKS, restricted_head
numbers = dict.fromkeys(["B", "D", "loc0", "class0", "classes"], "i32")
numbers |= dict.fromkeys(["cap", "temperature", "top_p"], "fp32")
# In sequence, sampled, and the classes of parallel branches: nothing is fed back, and numbers and addresses
# are known to be multiples of 16, as 384 rows are.
variants = [("*bf16", False, True, False), ("*fp32", True, True, False), ("*bf16", False, False, True)]
for (weight, sample, feedback, aligned), target in product(variants, [80, 90]):
    print(weight, sample, feedback, aligned, target)
    pointers = dict(hidden=weight, embed=weight, position="*i64", uniform="*fp32", scratch="*fp32")
    pointers |= dict(arrived="*i32", fed="*i64", best_id="*i64", score="*fp32", noise="*fp32")
    constants = dict(GROUP=5, NOISE_FEEDBACK=feedback, SAMPLE=sample, WIDEN=False) | BLOCKS
    signature = pointers | numbers | dict.fromkeys(constants, "constexpr")
    arguments = [i for i, name in enumerate(signature) if name in pointers or name in ("B", "D", "classes")]
    attributes = {(i,): [["tt.divisibility", 16]] for i in arguments if aligned}
    source = ASTSource(restricted_head, signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", target, 32))
    assert len(compiled.asm["cubin"]) > 1000
    assert ("mma" in compiled.asm["ptx"]) == (weight == "*bf16")
"""


def test_compiles_without_a_gpu(tmp_path):
    """For sm_80 and sm_90; bfloat16 products run on the tensor cores."""
    python("-c", COMPILE, TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path))
