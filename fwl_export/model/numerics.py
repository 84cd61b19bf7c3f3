"""Half-precision models keep sums, norms and softmax in float32; this says where.

A matrix product is computed in the type of its weight: a float32 model may hold some weights in
half precision (`fwl_export.precision.policy`).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """Return x in float32 if it is of a half-precision type, else as it is."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def product(x: Tensor, weight: Tensor) -> Tensor:
    """Return x W in the type of x, computed in that of W: [..., n], [n, m] -> [..., m]."""
    return (x.to(weight.dtype) @ weight).to(x.dtype)


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return x W^T + b, the product as in `product`: [..., n], [m, n], [m] -> [..., m]."""
    if x.dtype == weight.dtype:
        return F.linear(x, weight, bias)
    return product(x, weight.T) + bias
