"""Store weights of an ONNX graph in int8, with one scale per output channel."""

from __future__ import annotations

from collections.abc import Mapping

import onnx
from onnx import helper, numpy_helper

from fwl_export.errors import ExportError
from fwl_export.precision.int8 import Int8Weight


def store_int8(model: onnx.ModelProto, weights: Mapping[str, Int8Weight]) -> None:
    """Replace each weight by its int8 form and a DequantizeLinear node.

    The exporter renames and transposes weights, so they are found by their values.

    Args:
      model: The model to change in place. Its weights must have the values that
        `Int8Weight.dequantized` returns.
      weights: The weights to replace; the names serve for messages only.

    Raises:
      ExportError: A weight is not in the graph.
    """
    wanted: dict[tuple[tuple[int, ...], bytes], Int8Weight] = {}
    for weight in weights.values():
        for form in (weight, weight.transposed):
            dense = form.dequantized()
            wanted.setdefault((dense.shape, dense.tobytes()), form)
    found: set[bytes] = set()
    nodes: list[onnx.NodeProto] = []
    initializers: list[onnx.TensorProto] = []
    for tensor in model.graph.initializer:
        stored: Int8Weight | None = None
        if tensor.data_type == onnx.TensorProto.FLOAT and len(tensor.dims) == 2:
            key = (tuple(tensor.dims), numpy_helper.to_array(tensor).tobytes())
            stored = wanted.get(key)
        if stored is None:
            initializers.append(tensor)
            continue
        found |= {stored.values.tobytes(), stored.transposed.values.tobytes()}
        names = (f"{tensor.name}.int8", f"{tensor.name}.scale")
        initializers.append(numpy_helper.from_array(stored.values, names[0]))
        initializers.append(numpy_helper.from_array(stored.scale, names[1]))
        nodes.append(
            helper.make_node(
                "DequantizeLinear", names, [tensor.name], f"{tensor.name}.dequantize",
                axis=stored.channels,
            )
        )  # fmt: skip
    for name, weight in weights.items():
        if weight.values.tobytes() not in found:
            raise ExportError(
                f"weight '{name}' cannot be stored in int8: the traced graph has no matrix with "
                "its values"
            )
    nodes += model.graph.node
    del model.graph.initializer[:], model.graph.node[:]
    model.graph.initializer.extend(initializers)
    model.graph.node.extend(nodes)
