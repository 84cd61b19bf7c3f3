"""Half-precision models keep sums, norms and softmax in float32; this says where."""

from __future__ import annotations

import torch
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """Return x in float32 if it is of a half-precision type, else as it is."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
