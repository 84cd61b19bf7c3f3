"""Recurrent state: named arrays of fixed size, with one row of the batch per text.

A row of zeros is the fresh state, in which nothing was read yet. Every exported model has the
state's tensors, in the same order, as inputs `past.<name>` and outputs `present.<name>`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypedDict

import numpy as np
import numpy.typing as npt

from fwl_export.errors import StateError
from fwl_export.json_files import Name, Size

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


class StoredSpec(TypedDict):
    """A `TensorSpec` in a file.

    Attributes:
      name: See `TensorSpec`.
      shape: See `TensorSpec`.
      dtype: See `TensorSpec`.
    """

    name: Name
    shape: list[Size]
    dtype: Literal["float16", "float32", "float64", "int64"]


@dataclass(frozen=True)
class TensorSpec:
    """Name, shape and dtype of one tensor of the state.

    Attributes:
      name: Name without `past.` or `present.`, e.g. "fast.up.kernel".
      shape: Shape of one row, without the batch axis.
      dtype: NumPy's name of the dtype, e.g. "float32".
    """

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def bytes_per_row(self) -> int:
        """Size of one row of this tensor, in bytes."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    def to_dict(self) -> dict[str, Any]:
        """Return the spec as data for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> TensorSpec:
        """Read what `to_dict` wrote."""
        return cls(str(data["name"]), tuple(int(n) for n in data["shape"]), str(data["dtype"]))


def zeros(specs: Sequence[TensorSpec], batch: int) -> State:
    """Return `batch` rows in the fresh state: arrays [batch, ...] of zeros by name."""
    return {s.name: np.zeros((batch, *s.shape), s.dtype) for s in specs}


def check(specs: Sequence[TensorSpec], state: Mapping[str, Array], batch: int) -> None:
    """Check that a state fits a model.

    Args:
      specs: Specs of the model's state.
      state: Arrays by name, which should be [batch, ...].
      batch: Expected number of rows.

    Raises:
      StateError: A tensor is missing or unknown, or has another shape or dtype.
    """
    given: Any = state
    if not isinstance(given, Mapping):
        kind = type(given).__name__
        raise StateError(f"the state is a {kind}; expected arrays by name, as read_rows returns")
    expected = {spec.name: spec for spec in specs}
    for name in state:
        if name not in expected:
            raise StateError(
                f"state has a tensor '{name}' that this model does not know; was it saved from "
                "another model? `fwl-export inspect` lists the model's state"
            )
    for spec in specs:
        array: Any = state.get(spec.name)
        if array is None:
            raise StateError(
                f"state lacks the tensor '{spec.name}'; was it saved from another model? "
                "`fwl-export inspect` lists the model's state"
            )
        if not isinstance(array, np.ndarray):
            kind = type(array).__name__
            raise StateError(f"state '{spec.name}' is a {kind}; expected a NumPy array")
        if array.shape != (batch, *spec.shape) or array.dtype != np.dtype(spec.dtype):
            raise StateError(
                f"state '{spec.name}' is {array.dtype} {list(array.shape)}, but the model says "
                f"{spec.dtype} {[batch, *spec.shape]}; was it saved from another model? "
                "`fwl-export inspect` lists the model's state"
            )


def check_finite(state: Mapping[str, Array]) -> None:
    """Check that a state has finite values only, so that a session can continue from it.

    Raises:
      StateError: A tensor has NaN or infinite values.
    """
    for name, array in state.items():
        if not np.isfinite(array).all():
            raise StateError(f"state '{name}' holds NaN or infinite values; do not use it")
