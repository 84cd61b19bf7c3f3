"""Replace a model's calls of local functions by what the functions do.

ONNX allows functions of its own in a file, and ONNX Runtime and TensorRT read them; OpenVINO and
others refuse them. An inlined file has standard operators only, so no kernel of ours can take the
place of the fast-weight update.
"""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx.inliner

from fwl_export.errors import ExportError
from fwl_export.op.spec import DOMAIN


def write_inlined(source: Path, target: Path) -> None:
    """Write a copy of an ONNX file that has no local functions.

    Inputs, outputs, names, metadata and weights stay as they are. Both files share the external
    data, so they must lie in one folder.

    Args:
      source: ONNX file to copy.
      target: ONNX file to write, which may be the same.

    Raises:
      ExportError: The result is not valid, or has other inputs, outputs or operators than expected.
    """
    model = onnx.load(str(source), load_external_data=False)
    inlined = onnx.inliner.inline_local_functions(model)
    standard = [opset for opset in inlined.opset_import if opset.domain != DOMAIN]
    del inlined.opset_import[:]
    inlined.opset_import.extend(standard)
    for node in inlined.graph.node:
        node.name = node.name or f"inlined_{node.output[0]}"  # the functions' nodes have no names
    _largest_by_top_k(inlined.graph)
    foreign = {node.domain for node in inlined.graph.node} - {"", "ai.onnx"}
    if foreign or inlined.functions or _interface(inlined) != _interface(model):
        raise ExportError(
            f"{target.name} was not inlined: it has operators of the domains {sorted(foreign)} and "
            f"{len(inlined.functions)} functions; expected standard operators, and the inputs and "
            f"outputs of {source.name}"
        )
    onnx.save(inlined, str(target))
    try:
        onnx.checker.check_model(str(target))
    except onnx.checker.ValidationError as error:
        raise ExportError(f"{target.name} is not a valid ONNX model: {error}") from None


def _largest_by_top_k(graph: onnx.GraphProto) -> None:
    """Write the largest value of each row as the first of its top values, which is the same number.

    `symbolic_shape_infer` of ONNX Runtime has no rule for ReduceMax with axes as an input, as it is
    since opset 18, and ends there.
    """
    constants = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant":
            constants[node.output[0]] = node.attribute[0].t
    one = "one_value_of_each_row"
    found = False
    for node in graph.node:
        keeps = all(a.i for a in node.attribute if a.name == "keepdims")
        axes = constants.get(node.input[1]) if len(node.input) > 1 else None
        if node.op_type != "ReduceMax" or not keeps or axes is None:
            continue
        if onnx.numpy_helper.to_array(axes).ravel().tolist() == [-1]:
            found = True
            values = [node.output[0], f"{node.output[0]}_at"]
            name = node.name
            new = onnx.helper.make_node("TopK", [node.input[0], one], values, name, axis=-1)
            node.CopyFrom(new)
    if found:
        graph.initializer.append(onnx.helper.make_tensor(one, onnx.TensorProto.INT64, [1], [1]))


def _interface(model: onnx.ModelProto) -> list[bytes]:
    """Return the inputs, outputs and metadata of a model, in order."""
    graph = model.graph
    parts = [*graph.input, *graph.output, *model.metadata_props]
    return [part.SerializeToString(deterministic=True) for part in parts]
