"""Ring buffers for keys and values: fixed capacity, a position per row, a mask from positions.

A session reads without end at constant memory, rows of a batch stand at different positions,
and a row that brings no token keeps its buffers bit for bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

# A finite mask: with -inf, rows that see no key would become NaN. float16 ends at 65504.
_MASKED = {torch.float16: -3e4}
_MASKED_DEFAULT = -1e9


class Ring:
    """Where the tokens of one call go in the ring buffers, and what each may see there.

    Token t of a row goes to slot `(position + t) % capacity`. After the write, a row whose last
    token is at `last` holds position `last - (last - slot) % capacity` in each slot; negative
    means empty. Padding writes back what was there.
    """

    def __init__(self, position: Tensor, lengths: Tensor, steps: Tensor, capacity: int) -> None:
        """Lay out a call.

        Args:
          position: [B] int64, tokens read before.
          lengths: [B] int64 in 0..T, real tokens of each row.
          steps: [T] int64, 0 to T-1.
          capacity: slots of each buffer: T or more, and a window plus T - 1 or more where tokens
            see a window.
        """
        self._slot = torch.remainder(position[:, None] + steps, capacity)[:, None]  # [B, 1, T]
        self._valid = (steps < lengths[:, None])[:, None, :, None]
        last = (position + lengths - 1)[:, None]
        slots = torch.arange(capacity, device=position.device)
        self._held = last - torch.remainder(last - slots, capacity)  # [B, capacity]

    def mask(self, positions: Tensor, window: int, dtype: torch.dtype) -> Tensor:
        """Return the additive mask [B, 1, T, capacity] of queries at `positions` [B, T]."""
        held, query = self._held[:, None], positions[..., None]
        allowed = (held >= 0) & (held <= query) & (held > query - window)
        return float_mask(allowed, dtype)[:, None]

    def write(self, cache: Tensor, new: Tensor) -> Tensor:
        """Return the cache [B, heads, capacity, size] with `new` [B, heads, T, size] written."""
        row = torch.arange(cache.shape[0], device=cache.device)[:, None, None]
        head = torch.arange(cache.shape[1], device=cache.device)[None, :, None]
        index = (row, head, self._slot)
        return cache.index_put(index, torch.where(self._valid, new, cache[index]))


def float_mask(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what to add to attention scores: 0 where allowed, else a large negative number."""
    return torch.where(allowed, 0.0, _MASKED.get(dtype, _MASKED_DEFAULT)).to(dtype)
