"""Choose the dtype of each computation in a model with half-precision weights.

Sums, norms and softmax are computed in float32. A matrix product is computed in the dtype of its
weight, because a float32 model may have some weights in half precision
(`fwl_export.precision.policy`).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """Return x in float32 if its dtype is float16 or bfloat16, else unchanged."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def product(x: Tensor, weight: Tensor) -> Tensor:
    """Return x W in the dtype of x, computed in that of W: [..., n], [n, m] -> [..., m]."""
    return (x.to(weight.dtype) @ weight).to(x.dtype)


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return x W^T + b, with dtypes as in `product`: [..., n], [m, n], [m] -> [..., m]."""
    if x.dtype == weight.dtype:
        return F.linear(x, weight, bias)
    return product(x, weight.T) + bias
