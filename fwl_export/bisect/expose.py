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
    """An ONNX file in a candidate's runtime."""

    def run(self, inputs: Mapping[str, Any]) -> State:
        """Return the graph's outputs by name."""


def check_candidate(candidate: Candidate) -> None:
    """Refuse a runtime whose intermediate tensors cannot be had.

    Raises:
      ConfigError: it is one of these; says what to do instead.
    """
    if candidate.runtime in GRAPH_RUNTIMES:
        return
    if candidate.runtime == "tensorrt":
        raise ConfigError(
            f"'{candidate.name}' cannot run here: the tensors inside an engine take a GPU, and an "
            "engine that was built to show them, which is not supported yet; bisect the same ONNX "
            "file with onnxruntime or onnx-reference: what they agree on is not the file's fault"
        )
    raise ConfigError(
        f"'{candidate.name}' runs no ONNX graph; expected {' or '.join(GRAPH_RUNTIMES)}, "
        "with options"
    )


def call_inputs(call: Call, past: State) -> dict[str, Any]:
    """Return the ONNX graph's inputs by name; `past` in its types."""
    return vars(call) | {PAST + name: array for name, array in past.items()}


def expose_all(source: Path, target: Path) -> onnx.ModelProto:
    """Write a copy of an ONNX file whose every tensor is an output.

    Args:
      source: its external data is copied to the folder of `target`.
      target: file to write.

    Returns:
      The graph as written, without external data.
    """
    import onnx
    from onnx import helper

    model = onnx.load(str(source), load_external_data=False)
    known = {output.name for output in model.graph.output}
    for node in model.graph.node:
        for name in node.output:
            if name and name not in known:
                model.graph.output.append(helper.make_empty_tensor_value_info(name))
    # Not links: runtimes refuse data that lies elsewhere.
    for location in external_data_locations(source):
        shutil.copyfile(source.parent / location, target.parent / location)
    target.write_bytes(model.SerializeToString())
    return model


def open_probe(candidate: Candidate, path: Path, threads: int = 1) -> Probe:
    """Load an ONNX file into the runtime of a candidate.

    Raises:
      FwlError: it cannot be loaded, see `runtimes.onnxruntime.open_file`.
    """
    check_candidate(candidate)
    if candidate.runtime == "onnx-reference":
        return _ReferenceProbe(path)
    return _OnnxRuntimeProbe(path, threads, candidate.arguments)


class _OnnxRuntimeProbe:
    def __init__(self, path: Path, threads: int, arguments: Mapping[str, Any]) -> None:
        from fwl_export.runtimes.onnxruntime import open_file

        self._session = open_file(path, threads, **arguments)
        self._names = [output.name for output in self._session.get_outputs()]

    def run(self, inputs: Mapping[str, Any]) -> State:
        wanted = {i.name for i in self._session.get_inputs()}
        try:
            values = self._session.run(
                self._names, {name: array for name, array in inputs.items() if name in wanted}
            )
        except Exception as error:  # onnxruntime's own exceptions share no narrower base
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
        except Exception as error:  # it raises whatever an operator raises
            raise FwlError(f"ONNX's reference evaluator cannot run the graph: {error}") from None
        return {name: np.asarray(v) for name, v in zip(names, values, strict=True)}
