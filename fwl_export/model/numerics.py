"""Choose the dtype of each computation in a model with half-precision weights.

Sums, norms and softmax are computed in float32, and what lies between two matrix products is
float32 too. A matrix product is computed in the dtype of its weight, because a float32 model may
have some weights in half precision (`fwl_export.precision.policy`).

float16 ends at 65504, and below 6e-5 it loses digits. Squares, gradients and sums over many tokens
have no natural size, so they are scaled before they become float16, and scaled back in float32.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

UpdateOp = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]

# Stands for the largest value of a row of zeros.
_TINY = 1e-30

_HALF = (torch.float16, torch.bfloat16)


def wide(x: Tensor) -> Tensor:
    """Return x in float32 if its dtype is float16 or bfloat16, else unchanged."""
    return x.float() if x.dtype in _HALF else x


def fitted(x: Tensor, dtype: torch.dtype, largest: float = 1.0) -> tuple[Tensor, Tensor | None]:
    """Return x in a dtype, and the factors that undo its scaling.

    Args:
      x: Rows of any size, [..., n].
      dtype: The dtype to return. Only float16 needs a scaling.
      largest: The largest value of each row after the scaling. With 1, a sum of 60 000 products
        with weights of 1 still fits, and values down to 6e-8 still count.

    Returns:
      x, divided by the factors, in `dtype`; and the factors, [..., 1], or None if all are 1.
    """
    if dtype != torch.float16:
        return x.to(dtype), None
    scale = _largest(x) / largest
    return (wide(x) / scale).to(dtype), scale


def product(x: Tensor, weight: Tensor) -> Tensor:
    """Return x W, computed in the dtype of W, in float32 or better: [..., n], [n, m] -> [..., m].

    Rows of x may have any size, also where W is float16.
    """
    x, scale = fitted(x, weight.dtype)
    result = wide(x @ weight)
    return result if scale is None else result * scale


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x W^T + b, with dtypes as in `product`: [..., n], [m, n], [m] -> [..., m]."""
    if weight.dtype not in _HALF:
        return F.linear(x, weight, bias)
    result = product(x, weight.T)
    return result if bias is None else result + bias


def narrowed(update: UpdateOp, dtype: torch.dtype) -> UpdateOp:
    """Return a fast-weight update whose queries, keys and values are cast to half precision.

    The output is linear in the query, and key and value count by their product only. So all three
    can be scaled to fit.

    Args:
      update: The update, see `fwl_export.op`.
      dtype: The dtype of the queries, keys and values that it is given.
    """

    def run(
        query: Tensor, key: Tensor, value: Tensor, decay: Tensor, past_state: Tensor
    ) -> tuple[Tensor, Tensor]:
        read: Tensor | None = None
        if query.dtype != dtype:
            query, read = fitted(query, dtype)
        key, value = _balanced(key, value, dtype)
        output, present_state = update(query, key, value, decay, past_state)
        return output if read is None else output * read, present_state

    return run


def _balanced(key: Tensor, value: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return key and value in a dtype, scaled so that they have the same largest value."""
    if dtype != torch.float16:
        return key.to(dtype), value.to(dtype)
    ratio = torch.sqrt(_largest(value) / _largest(key))
    return (wide(key) * ratio).to(dtype), (wide(value) / ratio).to(dtype)


def _largest(x: Tensor) -> Tensor:
    """Return the largest absolute value of each row, [..., n] -> [..., 1], in float32."""
    return wide(x).abs().amax(-1, keepdim=True).clamp_min(_TINY)
