"""Gemma 1 and 2 decoder.   Axes: B batch, T query, S key, N query heads, K kv heads, H head dim, D width.

One class for both: what Gemma 2 has beyond Gemma 1 (norms after attention and MLP, soft caps, a sliding
window in every other layer) follows from the config.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.attention import attend, rope_angles, rotate
from model.cache import KVCache, LayerCache
from model.config import TextConfig

Rope = tuple[Tensor, Tensor]  # cos and sin, of model/attention.py


class RMSNorm(nn.Module):
    """x / rms(x) * (1 + weight): a weight of zero leaves the scale as it is.

    Always computed in float32: 1 + weight in bfloat16 would be a multiple of 1/128.
    """

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))
        self.eps = eps
        self.scale: Tensor | None = None  # 1 + weight, once model/decoding/joined.py has fixed it

    def forward(self, x: Tensor) -> Tensor:
        scale = 1 + self.weight.float() if self.scale is None else self.scale
        return F.rms_norm(x.float(), self.weight.shape, scale, self.eps).to(x.dtype)

    def _apply(self, *args, **kwargs):  # called by .to() and its like: the weight may move or be rounded
        self.scale = None
        return super()._apply(*args, **kwargs)


def at(x: Tensor, only: Tensor) -> Tensor:
    """[B, T, ...] and one position of each row, int64 [B] -> [B, 1, ...]"""
    return x[torch.arange(len(x), device=x.device), only][:, None]


class Attention(nn.Module):
    def __init__(self, config: TextConfig):
        super().__init__()
        self.attend, self.rotate = attend, rotate  # or what is put in their place, see model/seam.py
        self.heads, self.kv_heads, self.head_dim = config.heads, config.kv_heads, config.head_dim
        self.scale, self.cap = config.query_scale, config.attn_cap
        self.q_proj = nn.Linear(config.width, config.heads * config.head_dim, bias=False)
        self.k_proj = nn.Linear(config.width, config.kv_heads * config.head_dim, bias=False)
        self.v_proj = nn.Linear(config.width, config.kv_heads * config.head_dim, bias=False)
        self.o_proj = nn.Linear(config.heads * config.head_dim, config.width, bias=False)
        self.qkv_proj: nn.Module | None = None  # these three in one, see model/decoding/joined.py

    def forward(
        self, x: Tensor, rope: Rope, mask: Tensor, cache: LayerCache | None, only: Tensor | None
    ) -> Tensor:
        q, k, v = self._projected(x, rope, only)
        k, v = k.transpose(1, 2), v.transpose(1, 2)  # [B, K, T, H]
        if cache is not None:
            k, v = cache.update(k, v)  # [B, K, S, H]: those of the past too, already rotated
        out = self.attend(q, k, v, mask, self.scale, self.cap)  # [B, T, N, H]
        return self.o_proj(out.flatten(-2))  # [B, T, D]

    def _projected(self, x: Tensor, rope: Rope, only: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """[B, T, D] -> q [B, T, N, H], k and v [B, T, K, H]; q and k rotated. only [B]: q [B, 1, N, H] of
        these positions."""
        heads = (-1, self.head_dim)
        if self.qkv_proj is not None:
            split = (self.heads + self.kv_heads, self.kv_heads)
            qk, v = self.qkv_proj(x).unflatten(-1, heads).split(split, dim=2)
            q, k = self.rotate(qk, rope).split((self.heads, self.kv_heads), dim=2)
            return q if only is None else at(q, only), k, v
        queries, q_rope = x, rope
        if only is not None:
            queries, q_rope = at(x, only), tuple(at(part, only) for part in rope)
        q = self.rotate(self.q_proj(queries).unflatten(-1, heads), q_rope)
        k = self.rotate(self.k_proj(x).unflatten(-1, heads), rope)
        return q, k, self.v_proj(x).unflatten(-1, heads)


class MLP(nn.Module):
    """GeGLU: down(gelu(gate x) * up x), gelu in its tanh form."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.width, config.mlp, bias=False)
        self.up_proj = nn.Linear(config.width, config.mlp, bias=False)
        self.down_proj = nn.Linear(config.mlp, config.width, bias=False)
        self.gate_up_proj: nn.Module | None = None  # gate and up in one, see model/decoding/joined.py

    def forward(self, x: Tensor) -> Tensor:
        if self.gate_up_proj is None:
            gate, up = self.gate_proj(x), self.up_proj(x)
        else:
            gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(F.gelu(gate, approximate="tanh") * up)


class Block(nn.Module):
    """Attention and MLP, each added to x, with a norm before it and, in Gemma 2, another one after it.

    The norms are named by their place: what the hub calls `post_attention_layernorm` is pre_mlp_norm in
    Gemma 1, and post_attn_norm in Gemma 2.
    """

    def __init__(self, config: TextConfig):
        super().__init__()

        def norm(used: bool = True) -> nn.Module:
            return RMSNorm(config.width, config.norm_eps) if used else nn.Identity()

        post_norms = config.version == 2
        self.pre_attn_norm = norm()
        self.attn = Attention(config)
        self.post_attn_norm = norm(post_norms)
        self.pre_mlp_norm = norm()
        self.mlp = MLP(config)
        self.post_mlp_norm = norm(post_norms)

    def forward(
        self, x: Tensor, rope: Rope, mask: Tensor, cache: LayerCache | None, only: Tensor | None = None
    ) -> Tensor:
        read = self.attn(self.pre_attn_norm(x), rope, mask, cache, only)
        x = (x if only is None else at(x, only)) + self.post_attn_norm(read)
        return x + self.post_mlp_norm(self.mlp(self.pre_mlp_norm(x)))


class Gemma(nn.Module):
    def __init__(self, config: TextConfig):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.width)  # the output head too: see `logits`
        self.layers = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.width, config.norm_eps)
        self.run_step = Block.__call__  # in decoding steps: model/decoding/compiled.py compiles it

    def embed_tokens(self, tokens: Tensor) -> Tensor:
        """Ids [B, T] -> [B, T, D] * sqrt(D)."""
        # Rounded to the weights' dtype first, as in training: 45.2548 is 45.25 in bfloat16.
        factor = torch.tensor(self.config.width**0.5, dtype=self.embed.weight.dtype)
        return self.embed(tokens) * factor

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        masks: tuple[Tensor, Tensor],
        cache: KVCache | None = None,
        only: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Embeddings [B, T, D] -> normalised hidden states [B, T, D].

        positions int [B, T]; masks: bool [B, T, S] of the local layers (0, 2, 4, ...) and of the global ones.
        With a cache, x continues what is in it, and S counts that too. only: the one position of each row [B]
        whose hidden state is wanted, and its mask [B, 1, S]. Then the last block computes no other, as no
        block after it needs them: T becomes 1.
        """
        rope = rope_angles(positions, self.config.head_dim, self.config.rope_theta)  # once for all layers
        caches = [None] * len(self.layers) if cache is None else cache.of_layers()
        run = Block.__call__ if cache is None or cache.new_slots is None else self.run_step
        *blocks, last = self.layers
        for i, block in enumerate(blocks):
            x = run(block, x, rope, masks[i % 2], caches[i])
        position, mask = (None, masks[len(blocks) % 2]) if only is None else only
        return self.norm(run(last, x, rope, mask, caches[-1], position))

    def logits(self, hidden: Tensor, first: int = 0, last: int | None = None) -> Tensor:
        """Hidden [..., D] -> float32 logits of the ids first to last - 1, by default of all.

        The head is tied: its rows are those of the embedding, and a range of ids reads only its own.
        """
        logits = F.linear(hidden, self.embed.weight[first:last]).float()
        cap = self.config.final_cap
        return logits if cap is None else torch.tanh(logits / cap) * cap
