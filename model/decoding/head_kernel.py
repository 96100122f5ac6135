"""The restricted head in two Triton kernels: what `choose` of closed_set.py does, in two launches.

`restricted_logits` multiplies hidden states by the allowed rows of the tied embedding, a tile of each in
every program. `choose_one` has a program for each hidden state: softmax, choice, score.

One launch could do both, if the last program to multiply went on for all others. But for 16 states it would
do 16 softmaxes in series, while 131 SMs have nothing to do; a second launch inside a graph costs about 1 us.

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
INTERPRETED = triton.knobs.runtime.interpret  # without a GPU: the kernels run in numpy

# Hidden states and rows of a tile, and how much of the width a program reads at a time. tile_for takes the
# largest that gives PROGRAMS programs: an H100 has 132 SMs, an A100 108. For 1,024 rows there are then 128:
#     16 states or fewer   16 x 8         64   32 x 16        256   64 x 32
#     32                   16 x 16       128   32 x 32        512   64 x 64, and more programs from there
# Large tiles read less: of the 3B, 512 states in tiles of 16 x 16 would read 2,048 programs * 32 rows
# * 4.6 KB = 302 MB from the L2 cache, in tiles of 64 x 64 a quarter of that.
TILES = (64, 64, 64), (64, 32, 64), (32, 32, 128), (32, 16, 128), (16, 16, 256), (16, 8, 256)
PROGRAMS = 128
# Four parts of the width are on their way while another is multiplied. With 16 x 8 these are 16 KB of the
# embedding; to read 3.35 TB/s, with 0.7 us or so until memory answers, each of 132 SMs must have 18 KB on the
# way. They take at most 80 KB of shared memory; even small GPUs have 99 KB.
STAGES = 5


def tile_for(states: int, rows: int, bytes_each: int) -> dict[str, int]:
    """The tile for so many hidden states and rows of numbers of 2 or 4 bytes."""
    wanted = (tile for tile in TILES if triton.cdiv(states, tile[0]) * triton.cdiv(rows, tile[1]) >= PROGRAMS)
    block_b, block_r, block_d = next(wanted, TILES[-1])
    return dict(BLOCK_B=block_b, BLOCK_R=block_r, BLOCK_D=block_d * 2 // bytes_each)


@triton.jit
def soft_cap(x, cap):
    """cap * tanh(x / cap); infinity is no cap. tanh(y) = 2 sigmoid(2 y) - 1."""
    finite = tl.where(cap == float("inf"), 1.0, cap)
    return tl.where(cap == float("inf"), x, finite * (2 * tl.sigmoid(2 * x / finite) - 1))


@triton.jit
def nucleus(p, top_p):
    """Probabilities [R] -> the largest t for which those of at least t reach top_p together.

    Bisection over bit patterns, instead of a sort: positive floats are ordered as the integers with the same
    bits. Probabilities of at least low always reach top_p together, those of at least high never do. After 31
    halvings of a range below 2^30, high is low + 1. There is no float between them, so t is low exactly.
    """
    low, high = tl.full([], 0, tl.int32), tl.full([], 0x3F800001, tl.int32)  # 0 <= t < next after 1.0
    for _ in range(31):
        middle = (low + high) // 2
        reached = tl.where(p >= middle.to(tl.float32, bitcast=True), p, 0.0)
        enough = tl.sum(reached) >= top_p
        low, high = tl.where(enough, middle, low), tl.where(enough, high, middle)
    return low.to(tl.float32, bitcast=True)


@triton.jit
def draw(p, u, i):
    """A draw from weights p [R], given u in [0, 1): the first of the indices i [R] whose running sum exceeds
    u * sum."""
    running = tl.cumsum(p)
    return tl.min(tl.where((running > u * tl.max(running)) & (p > 0), i, R))


@triton.jit
def restricted_logits(
    hidden, embed, logits, B, D, first, rows, cap,
    WIDEN: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """hidden [B, D], embed [vocabulary, D] -> capped logits float32 [B, R] of `rows` ids from `first` on.

    WIDEN: multiply in float32, as Triton's interpreter computes in numpy, which would take the bits of
    bfloat16 for integers.
    """
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    b = tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)
    h = hidden + b[:, None] * D
    w = embed + (first + r).to(tl.int64)[None, :] * D
    sums = tl.zeros([BLOCK_B, BLOCK_R], tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        h_tile = tl.load(h + d[None, :], (b[:, None] < B) & (d[None, :] < D), 0.0)
        w_tile = tl.load(w + d[:, None], (r[None, :] < rows) & (d[:, None] < D), 0.0)
        if WIDEN:
            h_tile, w_tile = h_tile.to(tl.float32), w_tile.to(tl.float32)
        sums = tl.dot(h_tile, w_tile, sums, input_precision="ieee")
    tl.store(logits + b[:, None] * R + r[None, :], soft_cap(sums, cap), b[:, None] < B)


@triton.jit
def choose_one(
    logits, uniform, fed, best_id, score, noise, first, rows, choices, temperature, top_p,
    NOISE_FEEDBACK: tl.constexpr, SAMPLE: tl.constexpr,
):  # fmt: skip
    """logits [B, R], uniform [B] -> fed, best_id, score, noise [B]; a program for one of B.

    rows: how many ids have a logit, from `first` on; choices: as many, or one less where noise is the last.
    """
    b, i = tl.program_id(0), tl.arange(0, R)
    real = i < choices  # noise counts in p, but is never chosen
    x = tl.load(logits + b * R + i, i < rows, float("-inf"))
    real_x = tl.where(real, x, float("-inf"))
    e = tl.exp(x - tl.max(x))
    p = e / tl.sum(e)
    p_noise = tl.sum(tl.where(real, 0.0, p))
    if SAMPLE:
        hot = tl.exp((real_x - tl.max(real_x)) / temperature)
        hot = hot / tl.sum(hot)
        hot = tl.where(hot >= nucleus(hot, top_p), hot, 0.0)
        best = draw(hot, tl.load(uniform + b), i)
    else:
        best = tl.argmax(real_x, axis=0)
    p_best = tl.sum(tl.where(i == best, p, 0.0))
    is_noise = NOISE_FEEDBACK & (p_noise > tl.max(tl.where(real, p, 0.0)))
    tl.store(best_id + b, first + best)
    tl.store(fed + b, tl.where(is_noise, first + choices, first + best))
    tl.store(score + b, p_best + 0 * tl.sum(p))  # NaN if any p is
    tl.store(noise + b, p_noise)


class FusedHead:
    """Head in two launches."""

    def __init__(
        self, decoder: Gemma, allowed: list[tuple[int, int]], noise_feedback: bool, sampling: Sampling
    ):
        if sampling.top_k:
            raise ValueError(f"top-k {sampling.top_k}: the fused head draws by temperature and top-p only")
        self.embed, self.allowed = decoder.embed.weight, allowed
        self.cap = decoder.config.final_cap or float("inf")
        self.noise_feedback, self.sampling = noise_feedback, sampling

    def __call__(self, hidden: Tensor, slot: int, uniform: Tensor) -> Choice:
        """Hidden [B, D], slot of the group, uniform [B] -> Choice."""
        B, D = hidden.shape
        first, last = self.allowed[slot]
        rows, has_noise = last - first, slot == len(self.allowed) - 1
        tile = tile_for(B, rows, self.embed.element_size())
        logits = hidden.new_empty(B, R.value, dtype=torch.float32)
        best, fed = hidden.new_empty(2, B, dtype=torch.int64)
        score, noise = logits.new_empty(2, B)
        grid = triton.cdiv(rows, tile["BLOCK_R"]), triton.cdiv(B, tile["BLOCK_B"])
        with torch.cuda.device_of(hidden):  # Triton launches on the current device, wherever the tensors are
            restricted_logits[grid](
                hidden.contiguous(), self.embed, logits, B, D, first, rows, self.cap,
                WIDEN=INTERPRETED, num_stages=STAGES, **tile,
            )  # fmt: skip
            choose_one[(B,)](
                logits, uniform, fed, best, score, noise, first, rows, rows - has_noise,
                self.sampling.temperature, self.sampling.top_p,
                NOISE_FEEDBACK=self.noise_feedback, SAMPLE=self.sampling.temperature > 0,
            )  # fmt: skip
        return Choice(best=best, fed=fed, score=score, noise=noise)
