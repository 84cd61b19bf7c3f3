"""Run a candidate with every tensor of its ONNX graph as an output."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from fwl_export.bundle.onnx_file import external_data_locations
from fwl_export.bundle.state import PAST, State
from fwl_export.errors import ConfigError, FwlError
from fwl_export.parity.candidates import Candidate
from fwl_export.runtimes.base import Call
from fwl_export.runtimes.registry import RUNTIMES

if TYPE_CHECKING:
    import onnx

GRAPH_RUNTIMES = tuple(name for name, runtime in RUNTIMES.items() if runtime.runs_graph)


class Probe(Protocol):
    """An ONNX file that is loaded in a candidate's runtime."""

    def run(self, inputs: Mapping[str, Any]) -> State:
        """Return the graph's outputs by name."""


def check_candidate(candidate: Candidate) -> None:
    """Refuse a candidate whose runtime cannot return intermediate tensors.

    Raises:
      ConfigError: The runtime cannot; the message says what to do instead.
    """
    if candidate.runtime in GRAPH_RUNTIMES:
        return
    if candidate.runtime == "tensorrt":
        raise ConfigError(
            f"'{candidate.name}' cannot run here: reading the tensors inside an engine needs a GPU "
            "and an engine that was built with them as outputs, which is not supported yet. Bisect "
            "the same ONNX file with onnxruntime or onnx-reference instead; if they find nothing, "
            "the ONNX file is right and the engine is at fault"
        )
    raise ConfigError(
        f"'{candidate.name}' does not run an ONNX graph; expected {' or '.join(GRAPH_RUNTIMES)}, "
        "optionally with options such as onnxruntime:no-plugin"
    )


def call_inputs(call: Call, past: State) -> dict[str, Any]:
    """Return the inputs of the ONNX graph by name; `past` must have the graph's dtypes."""
    return vars(call) | {PAST + name: array for name, array in past.items()}


def expose_all(source: Path, target: Path) -> onnx.ModelProto:
    """Write a copy of an ONNX file in which every tensor that a node computes is an output.

    Args:
      source: ONNX file to copy. Its external data is copied to the folder of `target`.
      target: ONNX file to write.

    Returns:
      The model as written, without its external data.
    """
    import onnx
    from onnx import helper

    model = onnx.load(str(source), load_external_data=False)
    known = {output.name for output in model.graph.output}
    for node in model.graph.node:
        for name in node.output:
            if name and name not in known:
                model.graph.output.append(helper.make_empty_tensor_value_info(name))
    # Copies instead of links, because runtimes refuse external data outside the model's folder.
    for location in external_data_locations(source):
        shutil.copyfile(source.parent / location, target.parent / location)
    target.write_bytes(model.SerializeToString())
    return model


def open_probe(candidate: Candidate, path: Path, threads: int | None = 1) -> Probe:
    """Load an ONNX file in the runtime of a candidate.

    Raises:
      FwlError: The file cannot be loaded, see `runtimes.onnxruntime.open_file`.
    """
    check_candidate(candidate)
    if candidate.runtime == "onnx-reference":
        return _ReferenceProbe(path)
    return _OnnxRuntimeProbe(path, threads, candidate.arguments)


class _OnnxRuntimeProbe:
    def __init__(self, path: Path, threads: int | None, arguments: Mapping[str, Any]) -> None:
        from fwl_export.runtimes.onnxruntime import open_file

        self._session = open_file(path, threads, **arguments)
        self._names = [output.name for output in self._session.get_outputs()]

    def run(self, inputs: Mapping[str, Any]) -> State:
        wanted = {i.name for i in self._session.get_inputs()}
        try:
            values = self._session.run(
                self._names, {name: array for name, array in inputs.items() if name in wanted}
            )
        except Exception as error:  # onnxruntime's exceptions have no narrower common base class
            raise FwlError(f"ONNX Runtime cannot run the graph: {error}") from None
        return dict(zip(self._names, values, strict=True))


class _ReferenceProbe:
    def __init__(self, path: Path) -> None:
        import onnx
        from onnx.reference import ReferenceEvaluator

        self._evaluator = ReferenceEvaluator(onnx.load(str(path)))

    def run(self, inputs: Mapping[str, Any]) -> State:
        names = self._evaluator.output_names
        taken = {name: inputs[name] for name in self._evaluator.input_names}
        try:
            with np.errstate(all="ignore"):
                values = self._evaluator.run(None, taken)
        except Exception as error:  # each operator raises its own exceptions
            raise FwlError(f"ONNX's reference evaluator cannot run the graph: {error}") from None
        return {name: np.asarray(v) for name, v in zip(names, values, strict=True)}
