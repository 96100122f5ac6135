"""The restricted head as one Triton kernel: what `choose` of closed_set.py does, in a single launch.

A program takes BLOCK_R allowed rows of the tied embedding and BLOCK_B hidden states, and leaves their logits
in a scratch buffer. Programs count themselves when this is done. The last one for its hidden states finds all
logits there and does the rest: softmax, choice, score. So nothing waits, and no second launch is needed.
Which rows are allowed follows from the position, read on the device: one CUDA graph serves all steps.

Axes: B batch, D width, R allowed rows (1,024 coordinates, or classes and noise).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.decoding.closed_set import Choice
from model.decoding.generate import Sampling
from model.gemma import Gemma
from model.io.tokenizer import LOCS

R = tl.constexpr(LOCS)  # rows of locations, the larger of the two sets of allowed ids
BLOCKS = dict(BLOCK_B=16, BLOCK_R=16, BLOCK_D=128, BLOCK_END=4)  # END: hidden states chosen for at a time
INTERPRETED = triton.knobs.runtime.interpret  # without a GPU: the kernel runs in numpy


@triton.jit
def soft_cap(x, cap):
    """cap * tanh(x / cap); infinity is no cap. tanh(y) = 2 sigmoid(2 y) - 1."""
    finite = tl.where(cap == float("inf"), 1.0, cap)
    return tl.where(cap == float("inf"), x, finite * (2 * tl.sigmoid(2 * x / finite) - 1))


@triton.jit
def nucleus(p, top_p, N: tl.constexpr):
    """Probabilities [N, R] -> [N, 1]: the largest t for which those of at least t reach top_p together.

    Bisection over bit patterns, instead of a sort: positive floats are ordered as the integers with the same
    bits. Probabilities of at least low always reach top_p together, those of at least high never do. After 31
    halvings of a range below 2^30, high is low + 1. There is no float between them, so t is low exactly.
    """
    low, high = tl.zeros([N, 1], tl.int32), tl.full([N, 1], 0x3F800001, tl.int32)  # 0 <= t < next after 1.0
    for _ in range(31):
        middle = (low + high) // 2
        reached = tl.where(p >= middle.to(tl.float32, bitcast=True), p, 0.0)
        enough = tl.sum(reached, axis=1, keep_dims=True) >= top_p
        low, high = tl.where(enough, middle, low), tl.where(enough, high, middle)
    return low.to(tl.float32, bitcast=True)


@triton.jit
def draw(p, u, i):
    """A draw from weights p [N, R], given u [N, 1] in [0, 1): the first of the indices i [1, R] whose running
    sum exceeds u * sum, [N, 1]."""
    running = tl.cumsum(p, axis=1)
    total = tl.max(running, axis=1, keep_dims=True)
    return tl.min(tl.where((running > u * total) & (p > 0), i, R), axis=1, keep_dims=True)


@triton.jit
def restricted_head(
    hidden, embed, position, uniform, scratch, arrived, fed, best_id, score, noise,
    B, D, loc0, class0, classes, cap, temperature, top_p,
    GROUP: tl.constexpr, NOISE_FEEDBACK: tl.constexpr, SAMPLE: tl.constexpr, WIDEN: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_END: tl.constexpr,
):  # fmt: skip
    """hidden [B, D], embed [vocabulary, D], position [1], uniform [B] -> fed, best_id, score, noise [B].

    scratch float32 [B, R]: room for logits; arrived int32 [B / BLOCK_B]: counters at 0. WIDEN: multiply in
    float32, as Triton's interpreter computes in numpy, which would take the bits of bfloat16 for integers.
    """
    is_class = tl.load(position) % GROUP == GROUP - 1
    first = tl.where(is_class, class0, loc0)
    rows = tl.where(is_class, classes + 1, R)
    tile, batch = tl.program_id(0), tl.program_id(1)
    if tile * BLOCK_R < rows:  # there are programs for R rows; most have nothing to do if these are classes
        r = tile * BLOCK_R + tl.arange(0, BLOCK_R)
        b = batch * BLOCK_B + tl.arange(0, BLOCK_B)
        h = hidden + b[:, None] * D
        w = embed + (first + r).to(tl.int64)[None, :] * D
        logits = tl.zeros([BLOCK_B, BLOCK_R], tl.float32)
        for start in range(0, D, BLOCK_D):
            d = start + tl.arange(0, BLOCK_D)
            h_tile = tl.load(h + d[None, :], (b[:, None] < B) & (d[None, :] < D), 0.0)
            w_tile = tl.load(w + d[:, None], (r[None, :] < rows) & (d[:, None] < D), 0.0)
            if WIDEN:
                h_tile, w_tile = h_tile.to(tl.float32), w_tile.to(tl.float32)
            logits = tl.dot(h_tile, w_tile, logits, input_precision="ieee")
        tl.store(scratch + b[:, None] * R + r[None, :], soft_cap(logits, cap), b[:, None] < B)

    # atomic_add is ordered both ways (release and acquire, across the GPU): what a program stored before it
    # is visible to every program that counts later. The first barrier extends this to the stores of all its
    # threads, the second to their loads. So the last program to count sees all logits.
    tl.debug_barrier()
    if tl.atomic_add(arrived + batch, 1) == tl.num_programs(0) - 1:
        tl.debug_barrier()
        tl.store(arrived + batch, 0)  # for the next launch
        i = tl.arange(0, R)[None, :]
        real = i < tl.where(is_class, classes, R)  # noise counts in p, but is never chosen
        # A few hidden states at a time: singly, each would wait for its sums; all need too many registers.
        for start in range(batch * BLOCK_B, min(B, (batch + 1) * BLOCK_B), BLOCK_END):
            row = start + tl.arange(0, BLOCK_END)[:, None]
            there = row < B
            # .cg: from the L2 cache, which all programs share. L1 may hold what an earlier launch left there.
            x = tl.load(scratch + row * R + i, there & (i < rows), float("-inf"), cache_modifier=".cg")
            x = tl.where(there, x, 0.0)
            real_x = tl.where(real, x, float("-inf"))
            e = tl.exp(x - tl.max(x, axis=1, keep_dims=True))
            p = e / tl.sum(e, axis=1, keep_dims=True)
            p_noise = tl.sum(tl.where(real, 0.0, p), axis=1, keep_dims=True)
            if SAMPLE:
                hot = tl.exp((real_x - tl.max(real_x, axis=1, keep_dims=True)) / temperature)
                hot = hot / tl.sum(hot, axis=1, keep_dims=True)
                hot = tl.where(hot >= nucleus(hot, top_p, BLOCK_END), hot, 0.0)
                best = draw(hot, tl.load(uniform + row, there, 0.0), i)
            else:
                best = tl.argmax(real_x, axis=1, keep_dims=True)
            p_real = tl.max(tl.where(real, p, 0.0), axis=1, keep_dims=True)
            p_best = tl.sum(tl.where(i == best, p, 0.0), axis=1, keep_dims=True)
            is_noise = NOISE_FEEDBACK & (p_noise > p_real)
            tl.store(best_id + row, first + best, there)
            tl.store(fed + row, tl.where(is_noise, class0 + classes, first + best), there)
            tl.store(score + row, p_best + 0 * tl.sum(p, axis=1, keep_dims=True), there)  # NaN if any p is
            tl.store(noise + row, p_noise, there)


class FusedHead:
    """Head in one launch. Its buffers grow with the batch, and are otherwise reused."""

    def __init__(
        self, decoder: Gemma, allowed: list[tuple[int, int]], noise_feedback: bool, sampling: Sampling
    ):
        weight = decoder.embed.weight
        (self.loc0, _), (self.class0, last) = allowed[0], allowed[-1]
        self.classes = last - self.class0 - 1  # without noise
        self.embed, self.group, self.sampling = weight, len(allowed), sampling
        self.cap = decoder.config.final_cap or float("inf")
        self.noise_feedback = noise_feedback
        self.slots = torch.arange(self.group, device=weight.device)
        self.scratch = torch.empty(0, R.value, device=weight.device)
        self.arrived = torch.zeros(0, dtype=torch.int32, device=weight.device)

    def __call__(self, hidden: Tensor, slot: int | Tensor, uniform: Tensor) -> Choice:
        """Hidden [B, D], slot of the group, uniform [B] -> Choice. slot may also be a position of the answer,
        int64 [1] on the device."""
        B, D = hidden.shape
        if len(self.scratch) < B:
            self.scratch = hidden.new_empty(B, R.value, dtype=torch.float32)
            self.arrived = self.slots.new_zeros(triton.cdiv(B, BLOCKS["BLOCK_B"]), dtype=torch.int32)
        best, fed = self.slots.new_empty(2, B)
        score, noise = self.scratch.new_empty(2, B)
        position = slot if isinstance(slot, Tensor) else self.slots[slot:]
        grid = triton.cdiv(R.value, BLOCKS["BLOCK_R"]), triton.cdiv(B, BLOCKS["BLOCK_B"])
        with torch.cuda.device_of(hidden):  # Triton launches on the current device, wherever the tensors are
            restricted_head[grid](
                hidden.contiguous(), self.embed, position, uniform, self.scratch, self.arrived,
                fed, best, score, noise, B, D, self.loc0, self.class0, self.classes, self.cap,
                self.sampling.temperature, self.sampling.top_p, GROUP=self.group, WIDEN=INTERPRETED,
                NOISE_FEEDBACK=self.noise_feedback, SAMPLE=self.sampling.temperature > 0, **BLOCKS,
            )  # fmt: skip
        return Choice(best=best, fed=fed, score=score, noise=noise)
