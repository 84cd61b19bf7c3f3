"""The op as a plain float64 loop over tokens: slow, and the reference of every implementation."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fwl_export.op.spec import check_shapes

Array = npt.NDArray[np.floating]


def linear_attention_update(
    query: Array, key: Array, value: Array, decay: Array, past_state: Array
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Update the state token by token with `key (outer) value`, then read it with `query`.

    Args:
      query: [B, T, Dk] read vectors.
      key: [B, T, Dk] write keys.
      value: [B, T, Dv] write values.
      decay: [B, T] factors in [0, 1] of the state, applied before the token's own write.
      past_state: [B, Dk, Dv] state before the first token.

    Returns:
      Output [B, T, Dv], and present state [B, Dk, Dv] after the last token; both float64.

    Raises:
      ShapeError: The shapes disagree, or B or T is 0.
    """
    arrays = (query, key, value, decay, past_state)
    names = ("query", "key", "value", "decay", "past_state")
    sizes = check_shapes({n: a.shape for n, a in zip(names, arrays, strict=True)})
    query, key, value, decay, state = (np.asarray(a, dtype=np.float64) for a in arrays)
    output = np.empty((sizes["B"], sizes["T"], sizes["Dv"]))
    for t in range(sizes["T"]):
        written = key[:, t, :, None] * value[:, t, None, :]
        state = decay[:, t, None, None] * state + written
        output[:, t] = np.einsum("bk,bkv->bv", query[:, t], state)
    return output, state
