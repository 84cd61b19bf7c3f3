"""The op's cases rounded to an activation type, and the comparison with the reference."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper

from fwl_export.op.cases import Case
from fwl_export.op.onnx_function import append_function
from fwl_export.op.reference import linear_attention_update
from fwl_export.op.spec import DOMAIN, INPUTS, NAME, NODE_ATTRIBUTES, OUTPUTS, VERSION, Argument
from tests.tolerances import assert_close

Array = npt.NDArray[np.generic]

ONNX_TYPES = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "bfloat16": TensorProto.BFLOAT16,
}

_NUMPY_TYPES = {
    "float64": np.float64,
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
}


def rounded_inputs(case: Case, activation_type: str) -> dict[str, Array]:
    """Return a case's inputs by name, in the order and with the dtypes of the op's definition.

    Args:
      case: Case whose inputs are float32.
      activation_type: Dtype of query, key and value. With "float64" all inputs are float64.
    """
    arrays = case.arrays()
    state_type = "float64" if activation_type == "float64" else "float32"
    return {
        a.name: arrays[a.name].astype(
            _NUMPY_TYPES[activation_type if a.dtype == "T" else state_type]
        )
        for a in INPUTS
    }


def assert_matches_reference(
    activation_type: str,
    inputs: dict[str, Array],
    output: npt.ArrayLike,
    state: npt.ArrayLike,
    rows: str = "op",
) -> None:
    """Compare output and state with the reference on the same, rounded inputs.

    Args:
      activation_type: Dtype that the inputs were rounded to.
      inputs: Inputs by name, in the op's order.
      output: Output of the implementation under test, [B, T, Dv].
      state: Present state of the implementation under test, [B, Dk, Dv].
      rows: First part of the names of the tolerances to apply, see tests/tolerances.py.
    """
    expected_output, expected_state = linear_attention_update(
        *(np.asarray(a, dtype=np.float64) for a in inputs.values())
    )
    kind = "float64" if activation_type == "float64" else "float32"
    assert_close(f"{rows}.output.{kind}", output, expected_output, "output")
    assert_close(f"{rows}.state.{kind}", state, expected_state, "present_state")


def one_node_model(activation_type: str, opset: int) -> onnx.ModelProto:
    """Return an ONNX model of one node of the op, with the op's function body."""

    def value(argument: Argument) -> onnx.ValueInfoProto:
        kind = ONNX_TYPES[activation_type if argument.dtype == "T" else "float32"]
        return helper.make_tensor_value_info(argument.name, kind, argument.shape)

    node = helper.make_node(
        NAME,
        [a.name for a in INPUTS],
        [a.name for a in OUTPUTS],
        domain=DOMAIN,
        **NODE_ATTRIBUTES,
    )
    graph = helper.make_graph(
        [node], "one_update", [value(a) for a in INPUTS], [value(a) for a in OUTPUTS]
    )
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid(DOMAIN, VERSION)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    append_function(model)
    return model
