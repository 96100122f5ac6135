"""SigLIP vision encoder (arXiv 2303.15343): patches -> transformer -> one feature per patch.

Axes: B batch, P patches, N heads, H head dim, D width.
"""

import math

import torch.nn.functional as F
from torch import Tensor, nn

from model.attention import attend
from model.config import VisionConfig


class Attention(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.attend = attend  # or what model/seam.py puts in its place
        self.heads = config.heads
        self.q_proj = nn.Linear(config.width, config.width)
        self.k_proj = nn.Linear(config.width, config.width)
        self.v_proj = nn.Linear(config.width, config.width)
        self.out_proj = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        heads = (self.heads, -1)
        q = self.q_proj(x).unflatten(-1, heads)  # [B, P, N, H]
        k = self.k_proj(x).unflatten(-1, heads).transpose(1, 2)  # [B, N, P, H]
        v = self.v_proj(x).unflatten(-1, heads).transpose(1, 2)  # [B, N, P, H]
        out = self.attend(q, k, v, mask=None, scale=q.shape[-1] ** -0.5)  # every patch reads every patch
        return self.out_proj(out.flatten(-2))  # [B, P, D]


class MLP(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.width, config.mlp)
        self.fc2 = nn.Linear(config.mlp, config.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Block(nn.Module):
    """A pre-norm transformer block, with LayerNorm and biases where Gemma has neither."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.attn = Attention(config)
        self.norm2 = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def resample_positions(positions: Tensor, tokens: int) -> Tensor:
    """Position embeddings [P, D] of a square grid of patches -> those of a grid of `tokens` patches.

    Bilinear; the corners of the two grids coincide. big_vision starts training at another resolution in this
    way (`resample_posemb` of its ViT).
    """
    if len(positions) == tokens:
        return positions
    old, new = math.isqrt(len(positions)), math.isqrt(tokens)
    grid = positions.double().T.unflatten(1, (old, old))  # [D, old, old]
    grid = F.interpolate(grid[None], (new, new), mode="bilinear", align_corners=True)
    return grid[0].flatten(1).T.float().contiguous()  # [tokens, D]


class SigLIP(nn.Module):
    """Only the tower: no class token and no pooling, as PaliGemma reads the patches themselves."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        # The stride is the kernel's size: one linear map of each patch, as patches do not overlap.
        self.patch_embedding = nn.Conv2d(
            config.channels, config.width, kernel_size=config.patch_size, stride=config.patch_size
        )
        self.position_embedding = nn.Embedding(config.tokens, config.width)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width, eps=config.norm_eps)

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, 3, S, S] in [-1, 1] -> features [B, P, D], patches row by row from the top left."""
        x = self.patch_embedding(images)  # [B, D, S / patch, S / patch]
        x = x.flatten(2).transpose(1, 2)  # [B, P, D]
        x = x + self.position_embedding.weight  # [P, D], for every image
        for block in self.layers:
            x = block(x)
        return self.norm(x)
