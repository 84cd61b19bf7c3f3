"""The op's body in standard ONNX operators, for runtimes without our kernel."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from fwl_export.op.spec import DOMAIN, INPUTS, LOG_ZERO, NAME, NODE_ATTRIBUTES, OUTPUTS


def function_body(opset: int) -> onnx.FunctionProto:
    """Return the model-local function that computes the op, for activations of any type.

    The body computes in float32 with explicit casts: strongly typed TensorRT networks insert none.
    In half precision, thousands of small updates of the state would round to nothing, and sums over
    the tokens would overflow.

    Args:
      opset: Version of ONNX's standard operators; must equal the model's.
    """
    body = _Body()
    query = body("Cast", "query", to=TensorProto.FLOAT)
    key = body("Cast", "key", to=TensorProto.FLOAT)
    value = body("Cast", "value", to=TensorProto.FLOAT)
    fade = _decay_products(body)
    of_past = body("Slice", fade, body.ints(0), body.ints(1), body.ints(2))  # [B, T, 1]
    of_writes = body("Slice", fade, body.ints(1), body.ints(_END), body.ints(2))  # [B, T, T]

    key_t = body("Transpose", key, perm=[0, 2, 1])
    scores = body("Mul", body("MatMul", query, key_t), of_writes)
    from_past = body("Mul", body("MatMul", query, "past_state"), of_past)
    body("Add", body("MatMul", scores, value), from_past, output="output")

    last_of_past = body("Slice", of_past, body.ints(-1), body.ints(_END), body.ints(1))
    last_of_writes = body("Slice", of_writes, body.ints(-1), body.ints(_END), body.ints(1))
    written = body("MatMul", body("Mul", key_t, last_of_writes), value)
    body("Add", body("Mul", "past_state", last_of_past), written, output="present_state")
    return helper.make_function(
        DOMAIN,
        NAME,
        [a.name for a in INPUTS],
        [a.name for a in OUTPUTS],
        body.nodes,
        [helper.make_opsetid("", opset)],
        attributes=list(NODE_ATTRIBUTES),
    )


def append_function(model: onnx.ModelProto) -> None:
    """Add the op's body to a model that has nodes of the op.

    Args:
      model: ONNX model, changed in place.
    """
    opset = next(o.version for o in model.opset_import if o.domain in ("", "ai.onnx"))
    model.functions.append(function_body(opset))


_END = np.iinfo(np.int64).max


def _decay_products(body: _Body) -> str:
    """Add nodes that compute what `torch_op.decay_products` does: decay [B, T] -> [B, T, T + 1]."""
    length = body("Squeeze", body("Shape", "decay", start=1, end=2))
    one = body.constant(np.array(1, np.int64))
    zero = body.constant(np.array(0, np.int64))
    stop = body("Add", length, one)
    token = body("Unsqueeze", body("Range", one, stop, one), body.ints(1))  # [T, 1]
    write = body("Unsqueeze", body("Range", zero, stop, one), body.ints(0))  # [1, T + 1]
    nothing = body.constant(np.array(0, np.float32))
    log = body("Max", body("Log", "decay"), body.constant(np.array(LOG_ZERO, np.float32)))
    column = body("Unsqueeze", log, body.ints(2))  # [B, T, 1]
    masked = body("Where", body("Greater", token, write), column, nothing)
    total = body("CumSum", masked, one)
    return body("Where", body("GreaterOrEqual", token, write), body("Exp", total), nothing)


class _Body:
    """Collects nodes. A call adds a node and returns the name of its output."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self._constants: dict[tuple[str, bytes, tuple[int, ...]], str] = {}

    def __call__(self, op: str, *inputs: str, output: str = "", **attributes: Any) -> str:
        output = output or f"{op.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(inputs), [output], **attributes))
        return output

    def constant(self, value: npt.NDArray[np.generic]) -> str:
        key = (str(value.dtype), value.tobytes(), value.shape)
        if key not in self._constants:
            self._constants[key] = self("Constant", value=numpy_helper.from_array(value))
        return self._constants[key]

    def ints(self, *values: int) -> str:
        return self.constant(np.array(values, np.int64))
