"""State as named arrays: fresh rows, sizes, and errors that name the tensor."""

from __future__ import annotations

import re

import numpy as np
import pytest

from fwl_export.bundle import state as states
from fwl_export.bundle.state import TensorSpec
from fwl_export.errors import StateError

SPECS = [TensorSpec("position", (), "int64"), TensorSpec("fast.up.kernel", (2, 3), "float32")]


def some_state(rows: int) -> states.State:
    state = states.zeros(SPECS, rows)
    for array in state.values():
        np.copyto(array, np.arange(1, rows + 1).reshape(-1, *[1] * (array.ndim - 1)))
    return state


def test_zeros_keep_order_shape_and_type() -> None:
    state = states.zeros(SPECS, 4)
    assert list(state) == ["position", "fast.up.kernel"]
    assert state["position"].shape == (4,)
    assert state["position"].dtype == np.int64
    assert state["fast.up.kernel"].shape == (4, 2, 3)


def test_bytes_per_row() -> None:
    assert [spec.bytes_per_row for spec in SPECS] == [8, 24]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"other": np.zeros(2)}, "state has a tensor 'other' that this model does not know"),
        ({"position": None}, "state lacks the tensor 'position'"),
        (
            {"fast.up.kernel": np.zeros((2, 3, 3), np.float32)},
            "state 'fast.up.kernel' is float32 [2, 3, 3], but the model says float32 [2, 2, 3]",
        ),
        (
            {"fast.up.kernel": np.zeros((2, 2, 3), np.float16)},
            "is float16 [2, 2, 3], but the model says float32",
        ),
    ],
)
def test_a_foreign_state_is_named(change: dict[str, np.ndarray | None], message: str) -> None:
    state = {k: v for k, v in {**some_state(2), **change}.items() if v is not None}
    with pytest.raises(StateError, match=re.escape(message)):
        states.check(SPECS, state, 2)
