"""The op in PyTorch: `torch.ops.fwl.linear_attention_update`, which torch.export can trace."""

from __future__ import annotations

import torch
from torch import Tensor

from fwl_export.errors import ShapeError
from fwl_export.op import cuda
from fwl_export.op.spec import ACTIVATION_TYPES, DOMAIN, INPUTS, LOG_ZERO, NAME, check_shapes

# Tokens per chunk. The masked product within a chunk grows with the square of its length; at 128
# it is still small compared with the update of the state.
_CHUNK = 128


def linear_attention_update(
    query: Tensor, key: Tensor, value: Tensor, decay: Tensor, past_state: Tensor
) -> tuple[Tensor, Tensor]:
    """Update the state token by token with `key (outer) value`, then read it with `query`.

    Args:
      query: [B, T, Dk] read vectors; float32, float16 or bfloat16 (float64 for checks).
      key: [B, T, Dk] write keys, with query's dtype.
      value: [B, T, Dv] write values, unnormalized, with query's dtype.
      decay: [B, T] float32 factors in [0, 1] of the state, applied before the token's own write.
      past_state: [B, Dk, Dv] float32 state before the first token.

    Returns:
      Output [B, T, Dv] and present state [B, Dk, Dv] after the last token, both float32. With
      float64 inputs everything is float64.

    Raises:
      ShapeError: Shapes or dtypes disagree, or B or T is 0.
    """
    _check(query, key, value, decay, past_state)
    return torch.ops.fwl.linear_attention_update(query, key, value, decay, past_state)


@torch.library.custom_op(f"{DOMAIN}::linear_attention_update", mutates_args=())
def _op(
    query: Tensor, key: Tensor, value: Tensor, decay: Tensor, past_state: Tensor
) -> tuple[Tensor, Tensor]:
    _check(query, key, value, decay, past_state)
    return run_chunked(query, key, value, decay, past_state)


@_op.register_kernel("cuda")
def _(
    query: Tensor, key: Tensor, value: Tensor, decay: Tensor, past_state: Tensor
) -> tuple[Tensor, Tensor]:
    _check(query, key, value, decay, past_state)
    if query.dtype != torch.float64 and cuda.has_kernels(query.device):
        return cuda.linear_attention_update(query, key, value, decay, past_state)
    return run_chunked(query, key, value, decay, past_state)


def run_chunked(
    query: Tensor, key: Tensor, value: Tensor, decay: Tensor, past_state: Tensor
) -> tuple[Tensor, Tensor]:
    """Run the op in PyTorch's own operators, on any device, without checks.

    For arguments and results see `linear_attention_update`.
    """
    state = past_state.clone()
    wide = state.dtype
    outputs = []
    for start in range(0, query.shape[1], _CHUNK):
        part = slice(start, start + _CHUNK)
        q, k, v = (x[:, part].to(wide) for x in (query, key, value))
        fade = decay_products(decay[:, part])
        within = (q @ k.transpose(1, 2)) * fade[:, :, 1:]
        outputs.append(within @ v + (q @ state) * fade[:, :, :1])
        kept = k * fade[:, -1, 1:, None]
        state = state * fade[:, -1, 0, None, None] + kept.transpose(1, 2) @ v
    return torch.cat(outputs, 1), state


@_op.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, decay: Tensor, past_state: Tensor
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(value, dtype=past_state.dtype), torch.empty_like(past_state)


def decay_products(decay: Tensor) -> Tensor:
    """Return how much of each earlier write is left at each token.

    The logs of the decays are summed along each column. Taking differences of one running sum
    would be cheaper but lose precision. This way is exact where the decay is 0 or 1, and precise
    everywhere else.

    Args:
      decay: [B, T] factors d_1 ... d_T in [0, 1].

    Returns:
      [B, T, T + 1]. Entry (i, 0) is the product of d_1 ... d_i: what is left of the past state at
      token i. Entry (i, j) is the product of d_{j+1} ... d_i: what is left of write j at token i;
      0 where j > i.
    """
    length = decay.shape[1]
    log = torch.log(decay).clamp_min(LOG_ZERO)
    token = torch.arange(1, length + 1, device=decay.device)
    write = torch.arange(length + 1, device=decay.device)
    later = token[:, None] > write
    total = torch.cumsum(torch.where(later, log[:, :, None], 0.0), 1)
    return torch.where(token[:, None] >= write, torch.exp(total), 0.0)


# float64 is for checks only; no exported model uses it.
_TYPES = (*(getattr(torch, name) for name in ACTIVATION_TYPES), torch.float64)


def _check(query: Tensor, key: Tensor, value: Tensor, decay: Tensor, past_state: Tensor) -> None:
    tensors = dict(
        zip((a.name for a in INPUTS), (query, key, value, decay, past_state), strict=True)
    )
    check_shapes({name: tuple(tensor.shape) for name, tensor in tensors.items()})
    if query.dtype not in _TYPES:
        raise ShapeError(
            f"{DOMAIN}::{NAME}: 'query' is {query.dtype}; expected one of "
            f"{', '.join(map(str, _TYPES))}"
        )
    state_type = torch.float64 if query.dtype == torch.float64 else torch.float32
    for argument in INPUTS:
        expected = query.dtype if argument.dtype == "T" else state_type
        if tensors[argument.name].dtype != expected:
            raise ShapeError(
                f"{DOMAIN}::{NAME}: '{argument.name}' is {tensors[argument.name].dtype}; "
                f"expected {expected}"
            )
