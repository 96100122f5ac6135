"""Static key/value cache: allocated once, filled by the prefill, extended by one position at each step.

Where a CUDA graph or torch.compile wants every step to be the same sequence of operations on the same memory,
however full the cache is, a step reads all slots, through a mask, and which slot it writes is a number on the
device. Elsewhere it reads the slots in use.

Axes: L layers, B batch, T new tokens, S slots, K kv heads, H head dim.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from model.config import TextConfig


class KVCache:
    """Room for `slots` positions of every layer, filled from the left.

    Rows of a batch may have different lengths: padding fills a slot, but is not `valid` and has no position.
    whole: steps read all slots, used or not.
    """

    def __init__(
        self,
        config: TextConfig,
        batch: int,
        slots: int,
        dtype: torch.dtype,
        device: torch.device,
        whole: bool,
    ):
        shape = (config.layers, batch, config.kv_heads, slots, config.head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)  # [L, B, K, S, H]
        self.values = torch.zeros_like(self.keys)
        self._valid = torch.zeros(batch, slots, dtype=torch.bool, device=device)
        self._positions = torch.zeros(batch, slots, dtype=torch.int64, device=device)
        self.last = torch.zeros(batch, 1, dtype=torch.int64, device=device)  # position of the newest token
        # The newest token's slot. A graph would keep a Python number as it was at the capture; this one it
        # reads from memory at every replay.
        self.slot = torch.zeros(1, dtype=torch.int64, device=device)
        self.new_slots: Tensor | None = None  # of the newest tokens; None after the prefill
        self.used = self.prefix = 0  # slots in use, and of the prefix
        self.whole = whole

    def start(self, valid: Tensor, positions: Tensor) -> None:
        """Forget everything, and take the first T slots for tokens with valid and positions [B, T]."""
        T = valid.shape[1]
        self.used = self.prefix = self._room_for(T)
        self.new_slots = None
        self._valid.zero_()[:, :T] = valid
        # A slot that is not valid gets weight 0, but 0 times a NaN left there by an earlier batch is NaN.
        self.values[:, :, :, T:].zero_()
        self._positions[:, :T] = positions
        self.last.copy_(positions.amax(-1, keepdim=True))
        self.slot.fill_(T - 1)

    def extend(self, count: int = 1) -> Tensor:
        """Take the next slots for `count` tokens of every sequence; returns their positions int64 [B, count].

        Several tokens are one each of several branches: all of them have the next position.
        """
        self.used = self._room_for(self.used + count)
        self.new_slots = self.slot + torch.arange(1, count + 1, device=self.slot.device)
        self.slot += count
        self.last += 1
        positions = self.last.expand(-1, count)
        self._valid.index_fill_(1, self.new_slots, True)
        self._positions.index_copy_(1, self.new_slots, positions)
        return positions

    @property
    def slots_read(self) -> int:
        """How many slots, from the left, the newest tokens read: S."""
        return self.keys.shape[3] if self.whole and self.new_slots is not None else self.used

    @property
    def valid(self) -> Tensor:
        """bool [B, S]: the slots that hold a token, neither empty nor padding."""
        return self._valid[:, : self.slots_read]

    @property
    def positions(self) -> Tensor:
        """int64 [B, S]: of the tokens in the slots, from 1; undefined where a slot is not valid."""
        return self._positions[:, : self.slots_read]

    @property
    def is_suffix(self) -> Tensor:
        """bool [B, S]: the slots after the prefix."""
        slots = torch.arange(self.slots_read, device=self.slot.device)
        return (slots >= self.prefix).expand_as(self.valid)

    def _room_for(self, slots: int) -> int:
        if slots > self.keys.shape[3]:
            raise ValueError(f"the cache has {self.keys.shape[3]} slots, {slots} are needed")
        return slots

    def of_layers(self) -> list["LayerCache"]:
        """What each layer writes and reads, as of now."""
        layers = range(len(self.keys))  # indexed: autograd forbids writing to the views that iteration yields
        return [LayerCache(self.keys[i], self.values[i], self.new_slots, self.slots_read) for i in layers]


@dataclass(frozen=True)
class LayerCache:
    """A layer's part of a KVCache. It does not say which layer, so a block compiled for one serves all.

    keys, values [B, K, all slots, H]; new_slots int64 [T]: those of the newest tokens, None in the prefill,
    where T = S; slots_read: S.
    """

    keys: Tensor
    values: Tensor
    new_slots: Tensor | None
    slots_read: int

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k, v [B, K, T, H] into the slots just taken; returns what the queries read, [B, K, S, H]."""
        keys, values = self.keys[:, :, : self.slots_read], self.values[:, :, : self.slots_read]
        if self.new_slots is None:
            keys.copy_(k)
            values.copy_(v)
        else:  # a step, which a graph may replay: the slots are read on the device
            keys.index_copy_(2, self.new_slots, k)
            values.index_copy_(2, self.new_slots, v)
        return keys, values
