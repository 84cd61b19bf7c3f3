"""The traced graph: the PyTorch operators of the exported model as data, which can be run.

The exporter translates a graph of PyTorch operators to ONNX and preserves the tensors' names. It
writes that graph beside the ONNX file, as JSON. `bisect` runs it with the checkpoint's weights, in
float64 too, and compares its tensors with the ONNX file's by name. So `bisect` need not trace the
model again, which takes long. The file holds no paths of the machine that wrote it.
"""

from __future__ import annotations

import json
import operator
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from fwl_export.errors import BundleError
from fwl_export.json_files import Name, Text, check_schema, read_json, shown, typed
from fwl_export.op.spec import DOMAIN, NAME
from fwl_export.op.torch_op import run_chunked

SCHEMA_VERSION = 1
_REMEDY = "export the model again"
UPDATE = f"{DOMAIN}::{NAME}"

_WIDE = (torch.float16, torch.bfloat16, torch.float32)
_OPERATORS = (
    *("add", "sub", "mul", "floordiv", "truediv", "mod", "pow", "neg", "getitem"),
    *("eq", "ne", "lt", "le", "gt", "ge", "and_", "or_"),
)
# Besides PyTorch's core operators and those that compute element by element, the only ones that
# run. PyTorch has others that open files, do not check indices, or hand out memory as it is.
_COMPOSITE = frozenset(
    (
        *("_unsafe_view", "arange", "argsort", "baddbmm", "broadcast_tensors", "broadcast_to"),
        *(
            "chunk",
            "conj",
            "contiguous",
            "convert_element_type",
            "cumprod",
            "detach",
            "dropout",
            "einsum",
            "expand_as",
        ),
        *("flatten", "floor_divide", "group_norm", "instance_norm", "item", "layer_norm", "linear"),
        *("lift_fresh_copy", "linalg_vector_norm", "log_softmax", "logsumexp", "masked_fill"),
        *("matmul", "max", "meshgrid", "min", "movedim", "narrow", "new_full", "new_ones"),
        *("new_zeros", "norm", "numel", "numpy_T", "one_hot", "ones", "ones_like", "outer", "pad"),
        *("repeat_interleave", "reshape", "reshape_as", "rms_norm", "roll", "rsub", "softmax"),
        *("scaled_dot_product_attention", "softplus", "split", "split_with_sizes", "square"),
        *("stack", "std", "t", "take_along_dim", "tensor_split", "tile", "to", "transpose"),
        *("tril", "tril_indices", "triu", "triu_indices", "type_as", "unbind", "unflatten"),
        *("unfold", "unsafe_chunk", "unsafe_split", "view_as", "where", "zeros", "zeros_like"),
    )
)
_CONVERSION = "prims.convert_element_type.default"
_NEVER = ("as_strided", "empty", "empty_strided", "rand", "randn", "randperm")
# The only text arguments that an operator may have.
_TEXT_ARGUMENTS = ("approximate", "reduce", "rounding_mode", "indexing", "equation", "mode")


@dataclass(frozen=True)
class Source:
    """Where an input of the graph comes from.

    Attributes:
      kind: "parameter" for a parameter of the checkpoint's model, "constant", or "input" for an
        input of the ONNX graph.
      name: Path of the parameter in the model, or name of the ONNX graph's input.
      value: Value of a constant, as nested lists.
      dtype: Name of a constant's dtype, e.g. "int64".
    """

    kind: Literal["parameter", "constant", "input"]
    name: Name
    value: Any = None
    dtype: Name = ""


@dataclass(frozen=True)
class Operation:
    """One operator of the graph.

    Attributes:
      name: Name of its result, the same as in the ONNX file.
      target: Name of the operator, e.g. "aten.mul.Tensor", "operator.getitem" or
        "fwl::LinearAttentionUpdate".
      arguments: Positional arguments; {"ref": name} stands for another operator's result.
      options: Keyword arguments, in the same form.
      scope: Path of the module or method that it was traced in.
    """

    name: Name
    target: Name
    arguments: list[Any]
    options: dict[str, Any] = field(default_factory=dict)
    scope: Text = ""

    def references(self) -> Iterator[str]:
        """Yield the names of the results that it takes as arguments."""
        yield from _references(self.arguments)
        yield from _references(list(self.options.values()))

    def __str__(self) -> str:
        return f"{self.target}({', '.join(map(_readable, self.arguments))})"


@dataclass(frozen=True)
class TracedGraph:
    """A model's operators in the order in which they run.

    Attributes:
      sources: Where each input of the graph comes from, by its name in the graph.
      operations: The operators, in order.
      outputs: The name of the result that is each output of the ONNX graph, by the output's name.
    """

    sources: Mapping[Name, Source]
    operations: Sequence[Operation]
    outputs: Mapping[Name, Name]

    def run(
        self, parameters: Mapping[str, Tensor], inputs: Mapping[str, Tensor], dtype: torch.dtype
    ) -> dict[str, Tensor]:
        """Compute every tensor of the graph.

        Args:
          parameters: Parameters of the model, by path.
          inputs: Inputs of the ONNX graph, by name.
          dtype: torch.float64 computes everything in float64, whatever the graph says. With any
            other, each operator computes in the dtype that the graph says.

        Returns:
          All tensors by name: inputs, constants and results.

        Raises:
          BundleError: An operator is not one that runs, or cannot run on these tensors.
        """
        exact = dtype == torch.float64
        values: dict[str, Any] = {}
        for name, source in self.sources.items():
            value = _source_value(source, {"parameter": parameters, "input": inputs})
            values[name] = _widened(value) if exact else value
        with torch.inference_mode():
            for operation in self.operations:
                with _malformed(f"operator '{operation.target}' of '{operation.name}'"):
                    values[operation.name] = _apply(operation, values, exact)
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    def write(self, path: Path) -> None:
        """Write the graph as JSON."""
        data = {
            "schema_version": SCHEMA_VERSION,
            "sources": {name: vars(source) for name, source in self.sources.items()},
            "operations": [vars(operation) for operation in self.operations],
            "outputs": dict(self.outputs),
        }
        path.write_text(json.dumps(data, indent=0, allow_nan=False) + "\n", encoding="utf-8")


def read_graph(path: Path, content: bytes | None = None) -> TracedGraph:
    """Read what `TracedGraph.write` wrote.

    Args:
      path: Path of the file.
      content: Content of the file, if it was read already.

    Raises:
      BundleError: The file has another schema version, or is malformed.
    """
    data = read_json(path, BundleError, _REMEDY, content)
    check_schema(data, SCHEMA_VERSION, path.name, BundleError, _REMEDY)
    graph = typed(data, TracedGraph, f"{path.name} is malformed", BundleError, _REMEDY)
    if problem := next(_problems(graph), None):
        raise BundleError(f"{path.name} is malformed: {problem}; {_REMEDY}")
    return graph


def _problems(graph: TracedGraph) -> Iterator[str]:
    """Yield what would keep a graph from running: names without a value, and unknown dtypes."""
    for name, source in graph.sources.items():
        if source.kind == "constant" and not _is_dtype(source.dtype):
            yield f"constant '{name}' has the dtype {shown(source.dtype)}; expected one of torch's"
    known = set(graph.sources)
    for operation in graph.operations:
        for value in _leaves([operation.arguments, list(operation.options.values())]):
            if isinstance(value, dict) and not _is_code(value):
                yield f"operator '{operation.name}' has the argument {shown(value)}"
        for name in operation.references():
            if name not in known:
                yield f"operator '{operation.name}' takes {shown(name)}, which is not there yet"
        known.add(operation.name)
    for name, result in graph.outputs.items():
        if result not in known:
            yield f"output '{name}' is {shown(result)}, which is not computed"


def _is_dtype(name: str) -> bool:
    return isinstance(getattr(torch, name, None), torch.dtype)


def _is_code(value: dict[str, Any]) -> bool:
    """Return whether an object among an operator's arguments is one that `_decode` knows."""
    (kind, content), *more = value.items() or [("", None)]
    if more or not isinstance(content, str):
        return False
    return kind == "ref" or {
        "dtype": _is_dtype(content),
        "float": content in ("nan", "inf", "-inf"),
    }.get(kind, False)


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, list):
        for item in value:
            yield from _leaves(item)
    else:
        yield value


def _source_value(source: Source, given: Mapping[str, Mapping[str, Tensor]]) -> Tensor:
    if source.kind == "constant":
        with _malformed(f"constant '{source.name}'"):
            return torch.tensor(source.value, dtype=_dtype(source.dtype))
    if source.name not in given[source.kind]:
        raise BundleError(
            f"the traced graph's {source.kind} '{source.name}' does not exist; {_REMEDY}"
        )
    return given[source.kind][source.name]


@contextmanager
def _malformed(what: str) -> Iterator[None]:
    """Turn what Python and PyTorch raise for a part of a graph into a sentence about it."""
    try:
        yield
    except (
        ArithmeticError,
        LookupError,
        MemoryError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        first, _, _ = str(error).partition("\n")
        raise BundleError(
            f"the traced graph is malformed: its {what} cannot be computed "
            f"({type(error).__name__}: {first}); {_REMEDY}"
        ) from None


def _dtype(name: str) -> torch.dtype:
    """Return a dtype by its name; other names of PyTorch's namespace are not looked up.

    Raises:
      BundleError: There is no such dtype.
    """
    if not _is_dtype(name):
        raise BundleError(
            f"the traced graph has the dtype {name!r}, which does not exist; {_REMEDY}"
        )
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def _apply(operation: Operation, values: Mapping[str, Any], exact: bool) -> Any:
    arguments = [_decode(argument, values, exact) for argument in operation.arguments]
    options = {k: _decode(v, values, exact) for k, v in operation.options.items()}
    if operation.target == UPDATE:
        return run_chunked(*arguments)
    return _function(operation.target)(*arguments, **options)


def _decode(value: Any, values: Mapping[str, Any], exact: bool) -> Any:
    if isinstance(value, list):
        return [_decode(item, values, exact) for item in value]
    if not isinstance(value, dict):
        return value
    if "ref" in value:
        return values[value["ref"]]
    if "dtype" in value:
        dtype = _dtype(value["dtype"])
        return torch.float64 if exact and dtype in _WIDE else dtype
    return float(value["float"])


def _function(target: str) -> Any:
    """Return the function of an operator on tensors and numbers.

    Only such operators run: a graph comes with a bundle, which may be malicious.

    Raises:
      BundleError: The name stands for something else.
    """
    namespace, _, name = target.partition(".")
    if namespace == "operator" and name in _OPERATORS:
        return getattr(operator, name)
    if namespace == "torch" and name in ("sym_max", "sym_min", "sym_not"):
        return getattr(torch, name)
    if name in ("view.default", "_unsafe_view.default"):
        return torch.reshape  # the graph does not record the memory layout that a view needs
    packet, _, overload = name.partition(".")
    found = None
    if namespace == "aten" or target == _CONVERSION:
        found = getattr(getattr(getattr(torch.ops, namespace), packet, None), overload, None)
    if not isinstance(found, torch._ops.OpOverload) or not _is_harmless(found, packet):
        raise BundleError(
            f"the traced graph has the operator {shown(target)}, which this fwl-export does not run"
            f"; {_REMEDY} with this version"
        )
    return found


def _is_harmless(found: torch._ops.OpOverload, packet: str) -> bool:
    """Return whether an operator only computes new tensors from its arguments."""
    if packet in _NEVER or found._schema.is_mutable:
        return False
    takes_text = any(
        "str" in str(argument.type) and argument.name not in _TEXT_ARGUMENTS
        for argument in found._schema.arguments
    )
    known = {torch.Tag.core, torch.Tag.pointwise} & {*found.tags} or packet in _COMPOSITE
    return bool(known) and not takes_text


def _widened(value: Tensor) -> Tensor:
    return value.double() if value.dtype in _WIDE else value


def _references(value: Any) -> Iterator[str]:
    if isinstance(value, list):
        for item in value:
            yield from _references(item)
    elif isinstance(value, dict) and "ref" in value:
        yield value["ref"]


def _readable(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_readable, value))}]"
    return str(next(iter(value.values()))) if isinstance(value, dict) else str(value)
