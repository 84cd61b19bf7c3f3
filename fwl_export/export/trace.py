"""Trace the streaming model to an ONNX graph with `fwl::LinearAttentionUpdate` nodes."""

from __future__ import annotations

import contextlib
import io
import logging
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import onnx
import onnx_ir
import torch
from onnx.external_data_helper import load_external_data_for_tensor
from torch import Tensor

from fwl_export.bundle.state import PAST, PRESENT, TensorSpec
from fwl_export.errors import ExportError
from fwl_export.export.graph import traced_graph
from fwl_export.export.scopes import named_scopes
from fwl_export.export.weights_int8 import store_int8
from fwl_export.model.language_model import FWLModel
from fwl_export.model.streaming import INPUTS, OUTPUTS, StreamingModel
from fwl_export.op.onnx_function import append_function
from fwl_export.op.spec import DOMAIN, NAME, NODE_ATTRIBUTES, VERSION
from fwl_export.precision.policy import PrecisionPolicy, int8_weights, streaming_model

# One fast-weight update for each dense layer of the Fast Weight Layer.
UPDATES_PER_MODEL = 2

# 21 and 22 are untested. From 23 on, torch emits the Attention op, which TensorRT-RTX rejects for
# some head sizes; with 26 and 27, it silently declares opset 18.
SUPPORTED_OPSETS = (20,)

# The tracer takes sizes of 1 for constants: rows, tokens, and tokens but the last one are more.
_TRACED_TOKENS = 3

# Bytes of a tensor from which it goes into the file beside the ONNX file.
_SMALLEST_OUTSIDE = 1024

# What the exporter records about its own run, which includes source paths of this machine.
_PRIVATE_METADATA = ("pkg.torch.onnx.stack_trace", "pkg.torch.onnx.fx_node")


def export_onnx(
    model: FWLModel,
    path: Path,
    precision: str | PrecisionPolicy,
    max_tokens: int,
    opset: int,
    progress: Callable[[str], None] = lambda message: None,
) -> list[TensorSpec]:
    """Write the streaming model as an ONNX file, with its weights and traced graph beside it.

    Args:
      model: The float32 model.
      path: Path of the .onnx file to write. The weights go to the same name plus ".data", the
        graph of PyTorch's operators (see `TracedGraph`) to the same name with ".graph.json".
      precision: "fp32" or "fp16", or a policy.
      max_tokens: Largest number of tokens per call.
      opset: ONNX opset of the standard operators.
      progress: Called with a line of text about what is being done.

    Returns:
      The state tensors, in the order of the graph's inputs and outputs.

    Raises:
      ExportError: The opset is not supported, or the written file fails a check.
      ConfigError: The policy belongs to another model.
    """
    if opset not in SUPPORTED_OPSETS:
        raise ExportError(
            f"opset {opset} is not supported; expected {', '.join(map(str, SUPPORTED_OPSETS))}"
        )
    streaming = streaming_model(model, precision, max_tokens, _symbolic_update)
    program = _trace(streaming.eval(), opset, progress)
    progress("writing the ONNX file and its weights")
    is_int8 = isinstance(precision, PrecisionPolicy) and precision.target == "int8w"
    proto = program.model_proto if is_int8 else _without_weights(program, path)
    append_function(proto)
    if isinstance(precision, PrecisionPolicy) and is_int8:
        store_int8(proto, int8_weights(model, precision))
    for node in [*proto.graph.node, *(n for f in proto.functions for n in f.node)]:
        public = [p for p in node.metadata_props if p.key not in _PRIVATE_METADATA]
        del node.metadata_props[:]
        node.metadata_props.extend(public)
    _keep_integers(proto, path.parent)
    if is_int8:
        onnx.save(
            proto,
            str(path),
            save_as_external_data=True,
            location=path.name + ".data",
            size_threshold=_SMALLEST_OUTSIDE,
        )
    else:
        onnx.save(proto, str(path))
    values = ([v.name for v in side] for side in (proto.graph.input, proto.graph.output))
    assert program.exported_program is not None
    traced_graph(program.exported_program, *values).write(path.with_suffix(".graph.json"))
    progress("checking the ONNX file")
    check_onnx(path, streaming.specs, opset)
    return streaming.specs


def _keep_integers(model: onnx.ModelProto, folder: Path) -> None:
    """Keep int64 constants in the ONNX file, since shapes follow from some of them.

    Shape inference then needs no weights. They are stored as numbers, not as bytes, because onnx
    moves only bytes into another file.
    """
    for tensor in model.graph.initializer:
        if tensor.data_type == onnx.TensorProto.INT64:
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
                load_external_data_for_tensor(tensor, str(folder))
                tensor.data_location = onnx.TensorProto.DEFAULT
                del tensor.external_data[:]
            numbers = onnx.numpy_helper.to_array(tensor).ravel()
            tensor.ClearField("raw_data")
            tensor.ClearField("int64_data")
            tensor.int64_data.extend(numbers.tolist())


def _without_weights(program: torch.onnx.ONNXProgram, path: Path) -> onnx.ModelProto:
    """Write the weights beside an ONNX file one by one; returns the model, which refers to them.

    A model with its weights inside would be a second copy of them in memory.
    """
    onnx_ir.save(
        program.model,
        path,
        external_data=path.name + ".data",
        size_threshold_bytes=_SMALLEST_OUTSIDE,
    )
    return onnx.load(str(path), load_external_data=False)


def check_onnx(path: Path, specs: Sequence[TensorSpec], opset: int) -> None:
    """Check that a written file is valid ONNX with the expected opset, updates, inputs and state.

    Args:
      path: Path of the .onnx file.
      specs: The state tensors; each must be an input and an output of one shape and type.
      opset: The opset that the file must declare.

    Raises:
      ExportError: The file fails a check.
    """
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except onnx.checker.ValidationError as error:
        raise ExportError(f"{path.name} is not a valid ONNX model: {error}") from None
    proto = onnx.load(str(path), load_external_data=False)
    declared = {o.domain: o.version for o in proto.opset_import}
    if declared.get("", declared.get("ai.onnx")) != opset or declared.get(DOMAIN) != VERSION:
        raise ExportError(
            f"{path.name} declares the opsets {declared}; expected opset {opset}, and version "
            f"{VERSION} of domain '{DOMAIN}'"
        )
    found = count_updates(proto)
    if found != UPDATES_PER_MODEL:
        raise ExportError(
            f"{path.name} has {found} {DOMAIN}::{NAME} nodes; expected {UPDATES_PER_MODEL}"
        )
    inputs = {i.name: _shape_and_type(i) for i in proto.graph.input}
    outputs = {o.name: _shape_and_type(o) for o in proto.graph.output}
    # The exporter may silently turn a dynamic axis into a constant; such a model would reject calls
    # of other sizes.
    if inputs.get("input_ids") != "int64 [batch, tokens]":
        raise ExportError(
            f"{path.name} takes 'input_ids' as {inputs.get('input_ids')}; expected int64 [batch, "
            "tokens] with both axes dynamic"
        )
    for spec in specs:
        past, present = inputs.get(PAST + spec.name), outputs.get(PRESENT + spec.name)
        if past is None or past != present:
            raise ExportError(
                f"{path.name}: state '{spec.name}' goes in as {past} and comes out as {present}"
            )


def count_updates(proto: onnx.ModelProto) -> int:
    """Return the number of `fwl::LinearAttentionUpdate` nodes of a model."""
    return sum(n.domain == DOMAIN and n.op_type == NAME for n in proto.graph.node)


def _trace(
    streaming: StreamingModel, opset: int, progress: Callable[[str], None]
) -> torch.onnx.ONNXProgram:
    batch = torch.export.Dim("batch", min=1, max=4096)
    # The ring buffers are sized by the largest T of a call.
    largest = max(streaming.max_tokens, _TRACED_TOKENS)
    tokens = torch.export.Dim("tokens", min=1, max=largest)
    arguments = (*example_inputs(2, _TRACED_TOKENS), *_example_state(streaming.specs, 2))
    names = [spec.name for spec in streaming.specs]
    dynamic = (
        {0: batch, 1: tokens},
        {0: batch, 1: tokens},
        {0: batch},
        {0: batch, 1: torch.export.Dim("positions", min=1, max=largest)},
        {0: batch},
        tuple({0: batch} for _ in names),
    )
    steps = contextlib.redirect_stdout(_Steps(progress))
    with _quiet(), torch.no_grad(), named_scopes(streaming), steps:
        program = torch.onnx.export(
            streaming,
            arguments,
            dynamo=True,
            opset_version=opset,
            dynamic_shapes=dynamic,
            input_names=[*INPUTS, *(PAST + n for n in names)],
            output_names=[*OUTPUTS, *(PRESENT + n for n in names)],
            verbose=True,
        )
    assert program is not None
    return program


class _Steps(io.StringIO):
    """Reports the steps of the exporter, which it prints: each takes seconds to minutes."""

    _WORDS: ClassVar = {
        "Obtain model graph": "tracing the model (10 s or more; grows with its layers)",
        "Run decomposition": "decomposing its operators",
        "Translate the graph": "translating it to ONNX",
        "Optimize the ONNX": "simplifying the graph",
    }

    def __init__(self, progress: Callable[[str], None]) -> None:
        super().__init__()
        self._progress = progress
        self._stdout = sys.stdout

    def write(self, text: str) -> int:
        """Report the step that a line names, if it begins."""
        for start, words in self._WORDS.items():
            if start in text and text.rstrip().endswith("..."):
                with contextlib.redirect_stdout(self._stdout):
                    self._progress(words)
        return len(text)


def example_inputs(batch: int, length: int) -> tuple[Tensor, ...]:
    """Return the inputs of a call that reads token 0 everywhere, without the state; see `INPUTS`.

    Args:
      batch: Number of rows, B.
      length: Number of tokens per row, T.
    """
    return (
        torch.zeros(batch, length, dtype=torch.int64),
        torch.ones(batch, length),
        torch.full((batch,), length),
        torch.arange(length).repeat(batch, 1),
        torch.ones(batch),
    )


def _example_state(specs: Sequence[TensorSpec], batch: int) -> list[Tensor]:
    return [torch.zeros(batch, *spec.shape, dtype=getattr(torch, spec.dtype)) for spec in specs]


def _symbolic_update(
    query: Tensor, key: Tensor, value: Tensor, decay: Tensor, past_state: Tensor
) -> tuple[Tensor, Tensor]:
    """Stand for the op while tracing: emit one opaque node instead of the op's own operators."""
    emit: Callable[..., Sequence[Tensor]] = torch.onnx.ops.symbolic_multi_out
    output, present_state = emit(
        f"{DOMAIN}::{NAME}",
        (query, key, value, decay, past_state),
        NODE_ATTRIBUTES,
        dtypes=(past_state.dtype, past_state.dtype),
        shapes=(value.shape, past_state.shape),
        version=VERSION,
    )
    return output, present_state


def _shape_and_type(value: onnx.ValueInfoProto) -> str:
    tensor = value.type.tensor_type
    sizes = [d.dim_param or str(d.dim_value) for d in tensor.shape.dim]
    kind = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)).name
    return f"{kind} [{', '.join(sizes)}]"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter's warnings about packages and axis names, which do not matter here."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
