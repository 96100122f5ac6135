"""Attention: who may read whom, rotary positions, and the attention function.

The place to experiment: change a function here, or have a model call another one (model/seam.py).

Axes: B batch, T query, S key, N query heads, K kv heads, H head dim.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def prefix_lm_mask(valid: Tensor, is_suffix: Tensor) -> Tensor:
    """bool [B, S], bool [B, S] -> bool [B, S, S]: True where query t may read key s.

    The prefix reads all of itself, the suffix is causal, and padding (not valid) is never read:

        is_suffix    0 0 0 1 1          keys      0 1 2 3 4
        block        0 0 0 1 2          query 0   x x x . .
                                        query 1   x x x . .
                                        query 2   x x x . .
                                        query 3   x x x x .
                                        query 4   x x x x x

    A function put in its place (model/seam.py) takes and returns the same. It is called with whole sequences,
    and in decoding with the slots of the cache, of which the empty ones are not valid: so a row must not
    depend on later tokens. In local layers the window narrows the mask afterwards.
    """
    block = is_suffix.cumsum(-1)  # [B, S]: the prefix is block 0, every suffix token a block of its own
    return (block[:, None, :] <= block[:, :, None]) & valid[:, None, :]


def branch_mask(parents: Tensor) -> Tensor:
    """Parents int64 [B, N] -> bool [B, N, N]: True where key s is query t itself or one of its ancestors.

    The N tokens follow a common prefix. The parent of a token is the one before it in its branch; the first
    token of a branch is its own parent. A branch has at most four tokens, and reads no other branch:

        parents    0 1 0 0 1          token 0 reads 0, 1 reads 1, 2 reads 0 2, 3 reads 0 3, 4 reads 1 4
    """
    ids = torch.arange(parents.shape[1], device=parents.device)
    reads, ancestor = ids[:, None] == ids, parents
    for _ in range(3):  # one step up each time, from the first token of a branch to itself
        reads = reads | (ancestor[..., None] == ids)  # [B, N, N]
        ancestor = parents.gather(1, ancestor)
    return reads


def window_mask(
    mask: Tensor, query_pos: Tensor, key_pos: Tensor, is_suffix: Tensor, window: int | None
) -> Tensor:
    """Narrow a mask [B, T, S] to the sliding window of a local layer; None leaves it as it is.

    query_pos [B, T], key_pos [B, S]: absolute positions; is_suffix [B, T]: of the queries. A token of the
    suffix no longer reads keys that are `window` or more positions before it. With a window of 2:

        is_suffix    0 0 0 1 1          keys      0 1 2 3 4
                                        query 0-2 x x x . .       the prefix goes on reading all of itself
                                        query 3   . . x x .
                                        query 4   . . . x x

    transformers 5 does the same. big_vision, which trained the official checkpoints, has no window at all.
    The two differ only above 4,096 positions (896 px), where sliding_window=None follows big_vision.
    """
    if window is None:
        return mask
    near = query_pos[:, :, None] - key_pos[:, None, :] < window  # [B, T, S]
    return mask & (near | ~is_suffix[:, :, None])


def rope_angles(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Positions [B, T] -> cos and sin, float32 [B, T, 1, H/2]; the axis of 1 is for the heads.

    Always float32: bfloat16 cannot tell positions above 256 apart.
    """
    exponent = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim  # [H/2]
    angles = positions[..., None, None].float() * theta**-exponent  # [B, T, 1, H/2]
    return angles.cos(), angles.sin()


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary position embedding of [B, T, N, H]; pairs are (i, i + H/2), the half-split form of Gemma."""
    cos, sin = rope
    a, b = x.float().chunk(2, dim=-1)  # [B, T, N, H/2] each
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, cap: float | None = None
) -> Tensor:
    """Softmax attention: q [B, T, N, H], k and v [B, K, S, H] -> [B, T, N, H].

    Query heads j * N/K to (j + 1) * N/K - 1 share kv head j. mask: bool [B, T, S], True where reading is
    allowed; None: everywhere (the vision tower); or a BlockMask of model/flex.py, which only this function is
    given. cap: scores become cap * tanh(scores / cap).

    A function put in its place (model/seam.py) takes and returns the same. q and k are rotated, but not
    scaled. In decoding, T is 1 or the number of branches, S is the number of cache slots that are read, and
    the mask excludes the empty ones. For answers to be the same with a cache as without, the output for a
    query must not depend on other queries or on other rows of the batch. Weights are recorded by passing an
    identity matrix [S, S] as the values of each head: so the function must be linear in v and accept any
    width of v.
    """
    training_on_cpu = q.requires_grad and q.device.type == "cpu"  # where the fused kernel's gradient is slow
    if mask is None and cap is None and not training_on_cpu:  # the vision tower: one fused kernel does it
        q = q.transpose(1, 2)  # [B, N, T, H]
        return F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=True).transpose(1, 2)
    if not isinstance(mask, Tensor | None):  # a BlockMask: a long sequence on a GPU
        from model.flex import flex_attend  # here, because it brings torch.compile along

        return flex_attend(q, k, v, mask, scale, cap)

    # The heads that share a kv head are laid along the query axis: one matmul per kv head serves them all,
    # and keys and values are never repeated.
    B, T, N, H = q.shape
    K = k.shape[1]
    q = q.view(B, T, K, N // K, H).permute(0, 2, 3, 1, 4).reshape(B, K, -1, H)  # [B, K, N/K * T, H]
    scores = (q * scale) @ k.transpose(-1, -2)  # [B, K, N/K * T, S]
    if cap is not None:
        scores = torch.tanh(scores / cap) * cap
    scores = scores.view(B, K, N // K, T, -1)  # [B, K, N/K, T, S]
    if mask is not None:
        # Not -inf: the softmax of a row that reads nothing would be NaN.
        scores = scores.masked_fill(~mask[:, None, None], torch.finfo(scores.dtype).min)
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(v.dtype)  # [B, K, N/K, T, S]
    out = weights.view(B, K, -1, weights.shape[-1]) @ v  # [B, K, N/K * T, H]
    out = out.view(B, K, N // K, T, -1).permute(0, 3, 1, 2, 4)  # [B, T, K, N/K, H]
    return out.reshape(B, T, N, -1)
