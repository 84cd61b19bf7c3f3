"""The ONNX function body against the reference, in ONNX Runtime and in ONNX's own evaluator."""

from __future__ import annotations

import functools

import numpy as np
import onnx
import pytest
from onnx import TensorProto
from onnx.reference import ReferenceEvaluator

from fwl_export.op.cases import BEYOND_HALF, CASES, Case
from fwl_export.op.onnx_function import function_body
from fwl_export.op.spec import (
    ACTIVATION_TYPES,
    DOMAIN,
    INPUTS,
    NAME,
    NODE_ATTRIBUTES,
    OUTPUTS,
)
from tests.op.helpers import (
    assert_matches_reference,
    one_node_model,
    rounded_inputs,
)

OPSET = 20


@pytest.mark.parametrize("activation_type", ["float32", "float16"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_onnxruntime_matches_reference(case: Case, activation_type: str) -> None:
    _assert_session_matches(_session(activation_type, OPSET), case, activation_type)


@pytest.mark.parametrize("activation_type", ["float32", "float16"])
def test_sums_beyond_half_precision(activation_type: str) -> None:
    inputs = rounded_inputs(BEYOND_HALF, activation_type)
    output, state = _session(activation_type, OPSET).run(None, inputs)
    assert_matches_reference(activation_type, inputs, output, state, "beyond_half")


@pytest.mark.parametrize("opset", [18, 21, 22])
def test_body_takes_the_opset_of_the_model(opset: int) -> None:
    model = one_node_model("float32", opset)
    assert [(o.domain, o.version) for o in model.functions[0].opset_import] == [("", opset)]
    for case in CASES:
        _assert_session_matches(_session("float32", opset), case, "float32")


# The evaluator takes log(0) of the decay with NumPy, which warns.
@pytest.mark.filterwarnings("ignore:divide by zero encountered in log:RuntimeWarning")
@pytest.mark.parametrize("activation_type", ACTIVATION_TYPES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_reference_evaluator_matches_reference(case: Case, activation_type: str) -> None:
    inputs = rounded_inputs(case, activation_type)
    output, state = ReferenceEvaluator(one_node_model(activation_type, OPSET)).run(None, inputs)
    assert output.dtype == np.float32
    assert state.dtype == np.float32
    assert_matches_reference(activation_type, inputs, output, state)


@pytest.mark.parametrize("activation_type", ACTIVATION_TYPES)
def test_body_is_strictly_typed(activation_type: str) -> None:
    # With the declared outputs removed, types and shapes come from the body alone.
    model = one_node_model(activation_type, OPSET)
    for output in model.graph.output:
        output.type.Clear()
    inferred = onnx.shape_inference.infer_shapes(
        model, check_type=True, strict_mode=True, data_prop=True
    )
    types = {o.name: o.type.tensor_type.elem_type for o in inferred.graph.output}
    assert types == {
        "output": TensorProto.FLOAT,
        "present_state": TensorProto.FLOAT,
    }


@pytest.mark.parametrize("activation_type", ACTIVATION_TYPES)
def test_model_with_the_body_passes_the_full_check(activation_type: str) -> None:
    onnx.checker.check_model(one_node_model(activation_type, OPSET), full_check=True)


def test_signature_is_the_specs() -> None:
    body = function_body(OPSET)
    assert (body.domain, body.name) == (DOMAIN, NAME)
    assert list(body.input) == [a.name for a in INPUTS]
    assert list(body.output) == [a.name for a in OUTPUTS]
    # Strict runtimes refuse attributes of the node that the function does not declare.
    assert set(body.attribute) == set(NODE_ATTRIBUTES)


def test_body_uses_standard_operators_only() -> None:
    assert {node.domain for node in function_body(OPSET).node} == {""}


def test_a_wrong_sign_in_the_body_is_found() -> None:
    model = one_node_model("float32", OPSET)
    adds = [
        n for n in model.functions[0].node if n.op_type == "Add" and "present_state" in n.output
    ]
    adds[0].op_type = "Sub"
    case = next(c for c in CASES if c.name == "one_token")
    inputs = rounded_inputs(case, "float32")
    output, state = ReferenceEvaluator(model).run(None, inputs)
    with pytest.raises(AssertionError, match="present_state"):
        assert_matches_reference("float32", inputs, output, state)


def _assert_session_matches(session, case: Case, activation_type: str) -> None:
    inputs = rounded_inputs(case, activation_type)
    output, state = session.run(None, inputs)
    assert output.dtype == np.float32
    assert state.dtype == np.float32
    assert_matches_reference(activation_type, inputs, output, state)


@functools.cache
def _session(activation_type: str, opset: int):
    """Return a session for cases of any size: the model's axes are symbolic."""
    ort = pytest.importorskip("onnxruntime")
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(
        one_node_model(activation_type, opset).SerializeToString(),
        options,
        providers=["CPUExecutionProvider"],
    )
