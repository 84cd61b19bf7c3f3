"""The first tensor of an ONNX graph that is not what PyTorch computes."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fwl_export.bisect.steps import Outside, distance
from fwl_export.bundle.state import Array, State
from fwl_export.model.traced_graph import Operation, TracedGraph
from fwl_export.parity.tolerances import Tolerance, budgets

if TYPE_CHECKING:
    import onnx


_SCOPES = "pkg.torch.onnx.name_scopes"

INTERMEDIATE = Tolerance(
    "",
    8,
    10,
    6,
    1,
    "one call from the right state, so no drift; but PyTorch is measured on this call alone, where "
    "it can be lucky, and a difference of nearly equal numbers is rounded coarsely",
)


@dataclass(frozen=True)
class Located:
    """The first tensor, in the order of the graph, that left its budget.

    Attributes:
      tensor: its name in the ONNX graph.
      outside: its distance from PyTorch in float64.
      operation: of PyTorch, that computes it.
      nodes: of the ONNX graph, that compute it from tensors that are right: one, or the few that
        one operator of PyTorch became.
      inputs: names of the tensors that these take, without weights and constants.
      foreign: names of those nodes that the exporter did not write.
    """

    tensor: str
    outside: Outside
    operation: Operation
    nodes: Sequence[onnx.NodeProto]
    inputs: Sequence[str]
    foreign: Sequence[str]


@dataclass(frozen=True)
class Comparison:
    """All tensors of a call.

    Attributes:
      matched: how many tensors that nodes compute have a counterpart in PyTorch.
      total: how many there are.
      outside: those outside their budgets, in the order of the graph.
      largest_use: share of a budget that the furthest tensor takes.
    """

    matched: int
    total: int
    outside: Mapping[str, Outside]
    largest_use: float


def counterparts(graph: TracedGraph, model: onnx.ModelProto) -> dict[str, str]:
    """Return the name in PyTorch's graph of every tensor of the ONNX graph that has one.

    The exporter keeps the names; graph outputs are renamed.
    """
    traced = {operation.name for operation in graph.operations}
    names = [name for node in model.graph.node for name in node.output if name]
    names += [tensor.name for tensor in model.graph.initializer]
    found = {name: name for name in names if name in traced}
    # The parts of a split are results of their own: its name and a number in the ONNX graph.
    for operation in graph.operations:
        if operation.target == "operator.getitem":
            whole, index = operation.arguments
            found[f"{whole['ref']}_split_{index}"] = operation.name
    written = set(names)
    return found | {name: right for name, right in graph.outputs.items() if name in written}


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
    """Compare the tensors that nodes compute.

    Args:
      model: the ONNX graph.
      names: see `counterparts`.
      found: tensors of the candidate, by name in the ONNX graph.
      own: of PyTorch in the candidate's precision, by name in its graph.
      exact: of PyTorch in float64.
      precision: "fp32" or "fp16".
      tokens_read: tokens the first row has read.
      horizon_tokens: see `budgets`.
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
    """Return the first tensor outside its budget, and the nodes that compute it."""
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
    """Yield names of weights and constants that nodes take and that are not PyTorch's.

    Args:
      model: with its weights loaded.
      nodes: of it.
      exact: PyTorch's tensors by name, parameters as "model.<path>" among them.
    """
    from onnx import numpy_helper

    used = {name for node in nodes for name in node.input}
    for tensor in model.graph.initializer:
        if tensor.name in used and (right := exact.get(tensor.name)) is not None:
            value = numpy_helper.to_array(tensor)
            rounded = right.astype(value.dtype)
            # What the exporter folds into a weight is computed in its type: a few roundings.
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


_EXACT = Tolerance("", 1, 1, 0, 0, "whole numbers and truths: nothing is rounded")


def _noted(node: onnx.NodeProto) -> bool:
    """Return whether the exporter noted where a node comes from."""
    for entry in node.metadata_props:
        if entry.key == _SCOPES:
            return bool(ast.literal_eval(entry.value))
    return False
