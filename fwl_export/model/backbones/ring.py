"""Ring buffers for keys and values: fixed capacity, a position per row, a mask from positions.

With them a session reads without end in constant memory, the rows of a batch may be at different
positions, and a row without tokens keeps its buffers bit for bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

# The mask is finite: with -inf, a row that sees no key would become NaN. float16 ends at 65504.
_MASKED = {torch.float16: -3e4}
_MASKED_DEFAULT = -1e9


class Ring:
    """Where the tokens of one call go in the ring buffers, and what each token may see there.

    Token t of a row goes to slot `(position + t) % capacity`. After the write, a row whose last
    token has position `last` holds in each slot the token of position
    `last - (last - slot) % capacity`; if that is negative, the slot is empty. Padding writes back
    what was there.
    """

    def __init__(self, position: Tensor, lengths: Tensor, steps: Tensor, capacity: int) -> None:
        """Lay out a call.

        Args:
          position: Number of tokens that each row has read before, [B] int64.
          lengths: Number of tokens of each row in this call, [B] int64 in 0..T.
          steps: The numbers 0 to T-1, [T] int64.
          capacity: Number of slots per buffer: at least T, and at least window + T - 1 if tokens
            see only a window.
        """
        self._slot = torch.remainder(position[:, None] + steps, capacity)[:, None]  # [B, 1, T]
        self._valid = (steps < lengths[:, None])[:, None, :, None]
        last = (position + lengths - 1)[:, None]
        slots = torch.arange(capacity, device=position.device)
        self._held = last - torch.remainder(last - slots, capacity)  # [B, capacity]

    def mask(self, positions: Tensor, window: int, dtype: torch.dtype) -> Tensor:
        """Return the additive attention mask, [B, 1, T, capacity].

        Args:
          positions: The positions of the queries, [B, T] int64.
          window: Number of tokens that a query sees, itself included.
          dtype: The dtype of the mask.
        """
        held, query = self._held[:, None], positions[..., None]
        allowed = (held >= 0) & (held <= query) & (held > query - window)
        return float_mask(allowed, dtype)[:, None]

    def write(self, cache: Tensor, new: Tensor) -> Tensor:
        """Return the cache [B, heads, capacity, size] with `new` [B, heads, T, size] written."""
        row = torch.arange(cache.shape[0], device=cache.device)[:, None, None]
        head = torch.arange(cache.shape[1], device=cache.device)[None, :, None]
        # Of one shape, because onnxruntime's symbolic shape inference reads only two of the three.
        index = torch.broadcast_tensors(row, head, self._slot)
        return cache.index_put(index, torch.where(self._valid, new, cache[index]))


def float_mask(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the mask to add to attention scores: 0 where allowed, else a large negative number."""
    return torch.where(allowed, 0.0, _MASKED.get(dtype, _MASKED_DEFAULT)).to(dtype)
