"""Turn the program that torch.onnx traced into the traced graph beside the ONNX file.

`fwl_export.model.traced_graph` explains what that graph is and who runs it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from fwl_export.export.scopes import scope_of
from fwl_export.model.traced_graph import UPDATE, Operation, Source, TracedGraph

# The device and the memory layout of a tensor do not change its values.
_DROPPED = ("device", "layout", "memory_format", "pin_memory")


def traced_graph(
    program: ExportedProgram, inputs: Sequence[str], outputs: Sequence[str]
) -> TracedGraph:
    """Return the graph of a traced program.

    Args:
      program: The traced program, in the PyTorch operators that were translated to ONNX.
      inputs: Names of the ONNX graph's inputs, in order.
      outputs: Names of the ONNX graph's outputs, in order.
    """
    names = iter(inputs)
    sources = {}
    for spec in program.graph_signature.input_specs:
        name = spec.arg.name
        if spec.kind == InputKind.USER_INPUT:
            sources[name] = Source("input", next(names))
        elif spec.kind == InputKind.CONSTANT_TENSOR:
            constant = program.constants[str(spec.target)]
            kind = str(constant.dtype).removeprefix("torch.")
            sources[name] = Source("constant", name, constant.tolist(), kind)
        else:
            sources[name] = Source("parameter", str(spec.target).removeprefix("model."))
    results = [spec.arg.name for spec in program.graph_signature.output_specs]
    operations = [_operation(node) for node in program.graph.nodes if node.op == "call_function"]
    return TracedGraph(
        sources, _needed(operations, results), dict(zip(outputs, results, strict=True))
    )


def _needed(operations: Sequence[Operation], results: Sequence[str]) -> list[Operation]:
    """Return the operations that the results need, without checks of shapes and the like."""
    wanted, needed = set(results), []
    for operation in reversed(operations):
        if operation.name in wanted:
            needed.append(operation)
            wanted.update(operation.references())
    return needed[::-1]


def _operation(node: torch.fx.Node) -> Operation:
    scope = scope_of(node).removeprefix("model.")
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverload):
        namespace = target.namespace
        if namespace == "onnx_symbolic":
            return Operation(node.name, UPDATE, _encode(node.args[0]), {}, scope)
        name = f"{namespace}.{target._schema.name.partition('::')[2]}.{target._overloadname}"
    else:
        name = f"{getattr(target, '__module__', '')}.{target.__name__}".replace(
            "_operator", "operator"
        )
    options = {key: _encode(v) for key, v in node.kwargs.items() if key not in _DROPPED}
    return Operation(node.name, name, _encode(list(node.args)), options, scope)


def _encode(value: Any) -> Any:
    if isinstance(value, torch.fx.Node):
        return {"ref": value.name}
    if isinstance(value, (list, tuple)):
        return [_encode(item) for item in value]
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    if isinstance(value, (torch.device, torch.layout, torch.memory_format)):
        return None
    return value
