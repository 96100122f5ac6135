"""Static key/value cache: allocated once, filled by the prefill, extended one position a step.

Axes: L layers, B batch, S slots, K kv heads, H head dim.
"""

import torch
from torch import Tensor

from model.config import TextConfig


class KVCache:
    """Room for `slots` positions of every layer, filled from the left.

    Rows of a batch may have different lengths: padding fills a slot, but is not `valid` and has no position.
    """

    def __init__(self, config: TextConfig, batch: int, slots: int, dtype: torch.dtype, device: torch.device):
        shape = (config.layers, batch, config.kv_heads, slots, config.head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros_like(self.keys)
        self.valid = torch.zeros(batch, slots, dtype=torch.bool, device=device)
        self.positions = torch.zeros(batch, slots, dtype=torch.int64, device=device)
        self.length = 0  # slots in use

    def claim(self, valid: Tensor, positions: Tensor) -> None:
        """Take the next T slots for tokens with valid and positions [B, T]; `update` then fills them."""
        start, self.length = self.length, self.length + valid.shape[1]
        if self.length > self.valid.shape[1]:
            raise ValueError(f"the cache has {self.valid.shape[1]} slots, {self.length} are needed")
        self.valid[:, start : self.length] = valid
        self.positions[:, start : self.length] = positions

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k, v [B, K, T, H] into the claimed slots; returns all so far, [B, K, S, H]."""
        claimed = slice(self.length - k.shape[2], self.length)
        self.keys[layer, :, :, claimed] = k
        self.values[layer, :, :, claimed] = v
        return self.keys[layer, :, :, : self.length], self.values[layer, :, :, : self.length]
