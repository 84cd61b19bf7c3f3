"""Find the first tensor of an ONNX graph that differs from what PyTorch computes."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fwl_export.bisect.expose import call_inputs
from fwl_export.bisect.steps import Outside, distance
from fwl_export.bundle.manifest import Bundle
from fwl_export.bundle.state import PAST, Array, State
from fwl_export.model.traced_graph import Operation, TracedGraph
from fwl_export.parity.tolerances import Tolerance, budgets
from fwl_export.runtimes.base import Call

if TYPE_CHECKING:
    import onnx


_SCOPES = "pkg.torch.onnx.name_scopes"

INTERMEDIATE = Tolerance(
    "",
    8,
    10,
    6,
    1,
    "one call from the reference's state, so there is no drift; but PyTorch's own error is that of "
    "this call alone and can be small by chance, and subtracting nearly equal numbers amplifies "
    "roundings",
)


@dataclass(frozen=True)
class Located:
    """The first tensor in graph order that is outside its budget.

    Attributes:
      tensor: Name of the tensor in the ONNX graph.
      outside: Error of the tensor against PyTorch in float64, and its budget.
      operation: PyTorch operation that computes the tensor.
      nodes: ONNX nodes that compute it from correct tensors. There is one, or the few that a
        single PyTorch operator was exported to.
      inputs: Names of the tensors that the nodes read, without weights and constants.
      foreign: Names of those nodes that the exporter did not write.
    """

    tensor: str
    outside: Outside
    operation: Operation
    nodes: Sequence[onnx.NodeProto]
    inputs: Sequence[str]
    foreign: Sequence[str]


@dataclass(frozen=True)
class Comparison:
    """Comparison of all tensors of one call.

    Attributes:
      matched: Number of tensors that have a counterpart in PyTorch's graph.
      total: Number of tensors that the nodes compute.
      outside: Tensors outside their budgets by name, in graph order.
      largest_use: Largest error divided by its budget.
    """

    matched: int
    total: int
    outside: Mapping[str, Outside]
    largest_use: float


def counterparts(graph: TracedGraph, model: onnx.ModelProto) -> dict[str, str]:
    """Return, for each tensor of the ONNX graph that has one, its name in PyTorch's graph.

    The exporter keeps PyTorch's names, except those of the graph's outputs.
    """
    traced = {operation.name for operation in graph.operations}
    names = [name for node in model.graph.node for name in node.output if name]
    names += [tensor.name for tensor in model.graph.initializer]
    found = {name: name for name in names if name in traced}
    # In PyTorch's graph each part of a split is an operation of its own. In the ONNX graph its name
    # is that of the split, then its number.
    for operation in graph.operations:
        if operation.target == "operator.getitem":
            whole, index = operation.arguments
            found[f"{whole['ref']}_split_{index}"] = operation.name
    written = set(names)
    return found | {name: right for name, right in graph.outputs.items() if name in written}


def traced(
    bundle: Bundle, graph: TracedGraph, call: Call, past: State, precision: str | None = "fp64"
) -> State:
    """Return PyTorch's tensors of a call, with parameters, by their ONNX names.

    Args:
      bundle: Bundle that holds its checkpoint.
      graph: PyTorch's traced graph.
      call: The call.
      past: State before it, in the dtypes of that precision, or in any of float64.
      precision: Precision to compute in; None means the bundle's own.
    """
    import torch

    from fwl_export.runtimes.torch import load_model

    model = load_model(bundle, precision).model
    parameters: dict[str, torch.Tensor] = dict(model.named_parameters())
    parameters |= dict(model.named_buffers())
    kind = torch.float64 if precision == "fp64" else next(iter(parameters.values())).dtype
    inputs = {
        name: torch.from_numpy(np.ascontiguousarray(array))
        for name, array in call_inputs(call, past).items()
    }
    if precision == "fp64":
        state = {PAST + name for name in past}
        inputs = {
            name: tensor.double() if name in state and tensor.is_floating_point() else tensor
            for name, tensor in inputs.items()
        }
    values = graph.run(parameters, inputs, kind)
    values |= {f"model.{name}": tensor for name, tensor in parameters.items()}
    return {name: tensor.detach().numpy() for name, tensor in values.items()}


def compare(
    model: onnx.ModelProto,
    names: Mapping[str, str],
    found: State,
    own: State,
    exact: State,
    precision: str,
    tokens_read: int,
    horizon_tokens: float,
) -> Comparison:
    """Compare the tensors that nodes compute with PyTorch's.

    Args:
      model: Model with the ONNX graph.
      names: Names in PyTorch's graph by name in the ONNX graph, see `counterparts`.
      found: Tensors of the candidate by name in the ONNX graph.
      own: Tensors of PyTorch in the candidate's precision by name in PyTorch's graph.
      exact: Tensors of PyTorch in float64 by name in PyTorch's graph.
      precision: Precision of the candidate, "fp32" or "fp16".
      tokens_read: Tokens the first row has read.
      horizon_tokens: Tokens over which the fast weights remember, see `budgets`.
    """
    outside: dict[str, Outside] = {}
    matched = total = 0
    largest = 0.0
    for node in model.graph.node:
        for name in node.output:
            total += bool(name)
            right = exact.get(names.get(name, ""))
            if right is None or right.shape != found[name].shape:
                continue
            matched += 1
            measured = _measured(
                found[name], own[names[name]], right, precision, tokens_read, horizon_tokens
            )
            largest = max(largest, measured.use)
            if measured.use > 1:
                outside[name] = measured
    return Comparison(matched, total, outside, largest)


def locate(
    model: onnx.ModelProto,
    graph: TracedGraph,
    names: Mapping[str, str],
    comparison: Comparison,
) -> Located:
    """Return the first tensor outside its budget and the nodes that compute it.

    Args:
      model: Model with the ONNX graph.
      graph: PyTorch's traced graph.
      names: Names in PyTorch's graph by name in the ONNX graph, see `counterparts`.
      comparison: Comparison with at least one tensor outside its budget.
    """
    tensor = next(iter(comparison.outside))
    weights = {t.name for t in model.graph.initializer}
    producers = {name: node for node in model.graph.node for name in node.output if name}
    taken: dict[int, onnx.NodeProto] = {}
    inputs: list[str] = []
    waiting = [tensor]
    while waiting:
        name = waiting.pop()
        node = producers.get(name)
        if node is None or (name != tensor and name in names):
            if name and name not in weights and name not in inputs:
                inputs.append(name)
        elif id(node) not in taken:
            taken[id(node)] = node
            waiting += reversed(node.input)
    nodes = [node for node in model.graph.node if id(node) in taken]
    operation = next(o for o in graph.operations if o.name == names[tensor])
    foreign = [node.name or node.output[0] for node in nodes if not _noted(node)]
    return Located(tensor, comparison.outside[tensor], operation, nodes, inputs, foreign)


def wrong_weights(
    model: onnx.ModelProto, nodes: Sequence[onnx.NodeProto], exact: State
) -> Iterator[str]:
    """Yield the names of the nodes' weights and constants that differ from PyTorch's.

    Args:
      model: Model with its weights loaded.
      nodes: Nodes of the model.
      exact: PyTorch's tensors by name; parameters are named "model.<path>".
    """
    from onnx import numpy_helper

    used = {name for node in nodes for name in node.input}
    for tensor in model.graph.initializer:
        if tensor.name in used and (right := exact.get(tensor.name)) is not None:
            value = numpy_helper.to_array(tensor)
            rounded = right.astype(value.dtype)
            # The exporter folds constants into weights in the weight's dtype: a few roundings.
            if value.shape != rounded.shape or not np.allclose(
                value.astype(np.float64),
                rounded.astype(np.float64),
                rtol=4 * np.finfo(value.dtype).eps if value.dtype.kind == "f" else 0,
                atol=0,
            ):
                yield tensor.name


def _measured(
    found: Array, own: Array, exact: Array, precision: str, tokens_read: int, horizon_tokens: float
) -> Outside:
    error, of_own = (distance(value, exact) for value in (found, own))
    if exact.dtype.kind == "f":
        (budget,) = budgets(INTERMEDIATE, [of_own], [tokens_read], precision, horizon_tokens)
    else:
        (budget,) = budgets(_EXACT, [of_own], [tokens_read], precision, horizon_tokens)
    return Outside(error, budget)


_EXACT = Tolerance("", 1, 1, 0, 0, "integers and booleans: nothing is rounded")


def _noted(node: onnx.NodeProto) -> bool:
    """Return whether the node says which module it comes from, as the exporter's nodes do."""
    for entry in node.metadata_props:
        if entry.key == _SCOPES:
            return bool(ast.literal_eval(entry.value))
    return False
