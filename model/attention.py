"""Attention: who may read whom, rotary positions, and the attention function. The place to experiment.

Axes: B batch, T query, S key, N query heads, K kv heads, H head dim.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def prefix_lm_mask(valid: Tensor, is_suffix: Tensor) -> Tensor:
    """bool [B, S], bool [B, S] -> bool [B, S, S]: True where query t may read key s.

    The prefix reads all of itself, the suffix is causal, padding (valid False) is never read.
    is_suffix 0 0 0 1 1  ->  rows 0-2 see keys 0-2, row 3 sees 0-3, row 4 sees 0-4.
    """
    block = is_suffix.cumsum(-1)
    return (block[:, None, :] <= block[:, :, None]) & valid[:, None, :]


def window_mask(
    mask: Tensor, query_pos: Tensor, key_pos: Tensor, is_suffix: Tensor, window: int | None
) -> Tensor:
    """Narrow a mask [B, T, S] to the sliding window of a local layer; None leaves it as it is.

    query_pos [B, T], key_pos [B, S]: absolute positions. A suffix token loses keys `window` or more positions
    back; the prefix, is_suffix [B, T] False, goes on reading all of itself (as in transformers 5; big_vision
    has no window).
    """
    if window is None:
        return mask
    near = query_pos[:, :, None] - key_pos[:, None, :] < window
    return mask & (near | ~is_suffix[:, :, None])


def rope_angles(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Positions [B, T] -> cos and sin, float32 [B, T, 1, H/2]."""
    exponent = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    angles = positions[..., None, None].float() * theta**-exponent
    return angles.cos(), angles.sin()


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary position embedding of [B, T, N, H]; pairs are (i, i + H/2), the half-split form of Gemma."""
    cos, sin = rope
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, cap: float | None = None
) -> Tensor:
    """Softmax attention: q [B, T, N, H], k and v [B, K, S, H] -> [B, T, N, H].

    Query heads j*N/K ... share kv head j. They are folded into the query axis, so keys and values are never
    repeated. mask: bool [B, T, S], True where reading is allowed, or None, or a BlockMask (model/flex.py)
    for its fused form. cap: scores become cap * tanh(scores / cap).
    """
    if mask is None and cap is None:
        q = q.transpose(1, 2)
        return F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=True).transpose(1, 2)
    if not isinstance(mask, Tensor | None):
        from model.flex import flex_attend

        return flex_attend(q, k, v, mask, scale, cap)
    B, T, N, H = q.shape
    K = k.shape[1]
    q = q.view(B, T, K, N // K, H).permute(0, 2, 3, 1, 4)  # [B, K, N/K, T, H]
    scores = (q.reshape(B, K, -1, H) * scale) @ k.transpose(-1, -2)  # [B, K, N/K * T, S]
    if cap is not None:
        scores = torch.tanh(scores / cap) * cap
    scores = scores.view(B, K, N // K, T, -1)
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None], torch.finfo(scores.dtype).min)
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(v.dtype)
    out = weights.view(B, K, -1, weights.shape[-1]) @ v  # [B, K, N/K * T, H]
    return out.view(B, K, N // K, T, H).permute(0, 3, 1, 2, 4).reshape(B, T, N, H)
