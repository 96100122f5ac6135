"""`attend` fused by PyTorch's FlexAttention, for a long prefill on a GPU: mask and soft cap in one kernel.

It computes what model/attention.py says, tile by tile, and skips the tiles that the mask leaves empty. The
score matrices (at 896 px, 8 heads of 4,100 x 4,100) never exist.

Axes: B batch, T query, S key, N query heads, K kv heads, H head dim.
"""

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

fused = torch.compile(flex_attention, dynamic=False)  # uncompiled, it would build the score matrices


def block_mask(mask: Tensor) -> BlockMask:
    """Mask bool [B, T, S] -> which of its tiles are empty, full or mixed; made once for all layers."""
    B, T, S = mask.shape
    return create_block_mask(lambda b, head, t, s: mask[b, t, s], B, None, T, S, device=mask.device)


def flex_attend(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scale: float, cap: float | None) -> Tensor:
    """q [B, T, N, H], k and v [B, K, S, H] -> [B, T, N, H]."""

    def soft_cap(score, b, head, t, s):
        return cap * torch.tanh(score / cap)

    score_mod = soft_cap if cap is not None else None
    q = q.transpose(1, 2)  # [B, N, T, H]
    out = fused(q, k, v, score_mod=score_mod, block_mask=mask, scale=scale, enable_gqa=True)
    return out.transpose(1, 2)
