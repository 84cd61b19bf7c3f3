"""The op's cases, rounded to a type of activations, and what the reference makes of them."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import numpy.typing as npt

from fwl_export.op.cases import Case
from fwl_export.op.reference import linear_attention_update
from fwl_export.op.spec import INPUTS
from tests.tolerances import assert_close

Array = npt.NDArray[np.generic]

_NUMPY_TYPES = {
    "float64": np.float64,
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
}


def rounded_inputs(case: Case, activation_type: str) -> dict[str, Array]:
    """Return the case's inputs in the spec's order and types; float64 makes all float64."""
    arrays = case.arrays()
    state_type = "float64" if activation_type == "float64" else "float32"
    return {
        a.name: arrays[a.name].astype(
            _NUMPY_TYPES[activation_type if a.dtype == "T" else state_type]
        )
        for a in INPUTS
    }


def assert_matches_reference(
    activation_type: str, inputs: dict[str, Array], output: npt.ArrayLike, state: npt.ArrayLike
) -> None:
    """Compare output and state with the reference on the same, rounded inputs."""
    expected_output, expected_state = linear_attention_update(
        *(np.asarray(a, dtype=np.float64) for a in inputs.values())
    )
    state_type = "float64" if activation_type == "float64" else "float32"
    assert_close(f"op.output.{activation_type}", output, expected_output, "output")
    assert_close(f"op.state.{state_type}", state, expected_state, "present_state")
