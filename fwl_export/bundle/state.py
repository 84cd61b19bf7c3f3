"""Recurrent state as named arrays of fixed size: one row of the batch is one session.

A row of zeros is a fresh session. The same names, in the same order, are the inputs
`past.<name>` and the outputs `present.<name>` of every exported model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fwl_export.errors import StateError

PAST = "past."
PRESENT = "present."

Array = npt.NDArray[Any]
State = dict[str, Array]


@dataclass(frozen=True)
class InputSpec:
    """One input of the model other than the state.

    Attributes:
      name: Name of the input in the ONNX file.
      axes: One symbol per axis: B rows, T tokens of the call, P positions whose logits are wanted.
      dtype: NumPy's name of the type, e.g. "int64".
    """

    name: str
    axes: tuple[str, ...]
    dtype: str


# The one list of these inputs, in the model's order: `runtimes.base.Call` has a field for each, and
# tools/generate_op_header.py writes plugins/model_inputs.h from it.
INPUTS = (
    InputSpec("input_ids", ("B", "T"), "int64"),
    InputSpec("label_weights", ("B", "T"), "float32"),
    InputSpec("lengths", ("B",), "int64"),
    InputSpec("logit_positions", ("B", "P"), "int64"),
    InputSpec("learning_rate_scale", ("B",), "float32"),
)


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of the state.

    Attributes:
      name: without `past.` or `present.`.
      shape: of one row.
      dtype: numpy's name, e.g. "float32".
    """

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def bytes_per_row(self) -> int:
        """Memory of one session's share."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready data."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> TensorSpec:
        """Read what `to_dict` wrote."""
        return cls(str(data["name"]), tuple(int(n) for n in data["shape"]), str(data["dtype"]))


def zeros(specs: Sequence[TensorSpec], batch: int) -> State:
    """Return `batch` fresh rows."""
    return {s.name: np.zeros((batch, *s.shape), s.dtype) for s in specs}


def check(specs: Sequence[TensorSpec], state: Mapping[str, Array], batch: int) -> None:
    """Check that a state fits the model it is given to.

    Raises:
      StateError: a tensor is missing, unknown, or of another shape or type.
    """
    expected = {spec.name: spec for spec in specs}
    for name in state:
        if name not in expected:
            raise StateError(
                f"state has a tensor '{name}' that this model does not know; was it saved from "
                "another model? `fwl-export inspect` lists the model's state"
            )
    for spec in specs:
        array = state.get(spec.name)
        if array is None:
            raise StateError(
                f"state lacks the tensor '{spec.name}'; was it saved from another model? "
                "`fwl-export inspect` lists the model's state"
            )
        if array.shape != (batch, *spec.shape) or array.dtype != np.dtype(spec.dtype):
            raise StateError(
                f"state '{spec.name}' is {array.dtype} {list(array.shape)}, but the model says "
                f"{spec.dtype} {[batch, *spec.shape]}; was it saved from another model? "
                "`fwl-export inspect` lists the model's state"
            )


def check_finite(state: Mapping[str, Array]) -> None:
    """Check that a state can be gone on from.

    Raises:
      StateError: a tensor holds NaN or infinite values.
    """
    for name, array in state.items():
        if not np.isfinite(array).all():
            raise StateError(f"state '{name}' holds NaN or infinite values; do not use it")
