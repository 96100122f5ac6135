"""`attend` fused by PyTorch's FlexAttention, for long sequences on a GPU: mask and soft cap in one kernel.

It computes what model/attention.py says, tile by tile, and skips the tiles that the mask leaves empty. Scores
(at 896 px, 8 heads of 4,100 x 4,100 in every layer) and mask never exist, forward or backward: who reads whom
follows from a few numbers a token.

Axes: B batch, T query, S key, N query heads, K kv heads, H head dim.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

TILE = 128  # tokens; sequences are padded to a multiple of it
# Uncompiled, it would build the score matrices. At its second length or batch PyTorch compiles it for all.
fused = torch.compile(flex_attention)


def block_mask(
    valid: Tensor, is_suffix: Tensor, positions: Tensor, window: int | None, branch: Tensor | None = None
) -> BlockMask:
    """What prefix_lm_mask and window_mask say of the same [B, S], for all layers with this window.

    branch int [B, S]: 0 for what all tokens may read, otherwise only those with the same number may; None: 0
    everywhere.
    """
    # Query t reads key s if start[s] <= end[t], positions[s] >= oldest[t], and their branches agree.
    end = positions * is_suffix  # the prefix reads itself, a token of the suffix what is not after it
    start = torch.where(valid, end, valid.shape[1] + 1)  # padding is after everything
    oldest = torch.zeros_like(end) if window is None else (positions - window + 1) * is_suffix
    branch = torch.zeros_like(end) if branch is None else branch
    pad = 0, -valid.shape[1] % TILE
    end, positions, oldest, branch = (F.pad(x, pad) for x in (end, positions, oldest, branch))
    start = F.pad(start, pad, value=valid.shape[1] + 1)

    def reads(b, head, t, s):
        own = (branch[b, s] == 0) | (branch[b, s] == branch[b, t])
        return (start[b, s] <= end[b, t]) & (positions[b, s] >= oldest[b, t]) & own

    # Of each tile of keys [B, 1, S / TILE] and of queries [B, T / TILE, 1]: the least and the largest.
    (start0, start1), (position0, position1), (key0, key1) = (
        x.unflatten(-1, (1, -1, TILE)).aminmax(dim=-1) for x in (start, positions, branch)
    )
    (end0, end1), (oldest0, oldest1), (query0, query1) = (
        x.unflatten(-1, (-1, 1, TILE)).aminmax(dim=-1) for x in (end, oldest, branch)
    )
    full = (start1 <= end0) & (position0 >= oldest1) & (key1 == 0)  # every query reads every key
    own = (key0 == 0) | (key0 <= query1) & (key1 >= query0)
    mixed = (start0 <= end1) & (position1 >= oldest0) & own & ~full  # all others are empty
    return BlockMask.from_kv_blocks(*_listed(mixed), *_listed(full), BLOCK_SIZE=TILE, mask_mod=reads)


def _listed(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """bool [B, T, S] of tiles -> how many there are in each row [B, 1, T], and their columns, these first."""
    tiles = tiles[:, None].int()
    return tiles.sum(-1, dtype=torch.int32), tiles.argsort(dim=-1, descending=True, stable=True).int()


def flex_attend(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scale: float, cap: float | None) -> Tensor:
    """q [B, T, N, H], k and v [B, K, T, H] -> [B, T, N, H]."""

    def soft_cap(score, b, head, t, s):
        return cap * torch.tanh(score / cap)

    score_mod, T = soft_cap if cap is not None else None, q.shape[1]
    q, k, v = (F.pad(x, (0, 0, 0, -T % TILE)) for x in (q.transpose(1, 2), k, v))
    out = fused(q, k, v, score_mod=score_mod, block_mask=mask, scale=scale, enable_gqa=True)  # [B, N, T, H]
    return out[:, :, :T].transpose(1, 2)
