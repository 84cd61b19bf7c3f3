"""Faults planted in a bundle's ONNX file.

The manifest is made to fit, so that only a check of what the file computes can find them.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper

from fwl_export.bundle import MODEL_DATA_FILE, MODEL_FILE, Bundle, read_bundle
from fwl_export.op.spec import DOMAIN

Fault = Callable[[onnx.ModelProto], None]

_END = np.iinfo(np.int64).max


def broken_bundle(source: Path, target: Path, fault: Fault) -> Bundle:
    """Copy a bundle, plant the fault, and record the new hashes."""
    shutil.copytree(source, target)
    model = onnx.load(str(target / MODEL_FILE))
    before = model.SerializeToString()
    fault(model)
    assert model.SerializeToString() != before
    (target / MODEL_DATA_FILE).unlink()
    onnx.save(
        model,
        str(target / MODEL_FILE),
        save_as_external_data=True,
        location=MODEL_DATA_FILE,
        size_threshold=1024,
    )
    return read_bundle(target).add_files([MODEL_FILE, MODEL_DATA_FILE])


def weight(name: str, index: tuple[int, ...], factor: float = 1.0, added: float = 0.0) -> Fault:
    """Change one element of an initializer; the name is the end of its own."""

    def plant(model: onnx.ModelProto) -> None:
        (tensor,) = [t for t in model.graph.initializer if t.name.endswith(name)]
        values = numpy_helper.to_array(tensor).copy()
        values[index] = values[index] * factor + added
        tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))

    return plant


def unnamed_weight(shape: tuple[int, ...], index: tuple[int, ...], factor: float) -> Fault:
    """Change one element of the first matrix of a shape: the exporter renames transposed ones."""

    def plant(model: onnx.ModelProto) -> None:
        tensor = next(t for t in model.graph.initializer if tuple(t.dims) == shape)
        assert tensor.name.startswith("val_")
        weight(tensor.name, index, factor)(model)

    return plant


def negated_value(node: int) -> Fault:
    """Flip the sign of what an update writes."""

    def plant(model: onnx.ModelProto) -> None:
        _wrap_input(model, _updates(model)[node], 2, "Neg")

    return plant


def added_instead(node: int) -> Fault:
    """Add the step that is read from an update where it is to be subtracted."""

    def plant(model: onnx.ModelProto) -> None:
        name = _updates(model)[node].output[0]
        while True:  # along the scaled read to the subtraction
            (user,) = [n for n in model.graph.node if name in n.input]
            if user.op_type == "Sub":
                user.op_type = "Add"
                return
            assert user.op_type in ("Mul", "Cast"), user.op_type
            name = user.output[0]

    return plant


def ignored_decay(node: int) -> Fault:
    """Give an update a decay of 1 everywhere."""

    def plant(model: onnx.ModelProto) -> None:
        update = _updates(model)[node]
        _insert_before(model, update, "Div", [update.input[3]] * 2, "ones")
        update.input[3] = "ones"

    return plant


def pending_of_padding(state: str) -> Fault:
    """Take a pending tensor from the last token of the call, even where that is padding."""

    def plant(model: onnx.ModelProto) -> None:
        choose = _producer(model, f"present.{state}")
        gather = _producer(model, choose.input[1])
        assert (choose.op_type, gather.op_type) == ("Where", "GatherND")
        last = _constant(model, "last", np.array(-1, np.int64))
        _insert_before(model, choose, "Gather", [gather.input[0], last], "of_last", axis=1)
        choose.input[1] = "of_last"

    return plant


def rolled_rows(state: str, share: float = 1.0) -> Fault:
    """Give each row (a share of) the state of the row before it."""

    def plant(model: onnx.ModelProto) -> None:
        name = f"present.{state}"
        right = _rename_output(model, name)
        rolled = _roll(model, right, axis=0)
        if share == 1:
            model.graph.node.append(helper.make_node("Identity", [rolled], [name]))
            return
        leak = _constant(model, "leak", np.array(share, np.float32))
        model.graph.node.append(helper.make_node("Mul", [rolled, leak], ["leaked"]))
        model.graph.node.append(helper.make_node("Add", [right, "leaked"], [name]))

    return plant


def shifted_labels() -> Fault:
    """Learn from the token after the right one."""

    def plant(model: onnx.ModelProto) -> None:
        (lookup,) = [
            n for n in model.graph.node if n.op_type == "Gather" and "unembed" in n.input[0]
        ]
        lookup.input[1] = _roll(model, "input_ids", axis=1, before=lookup)

    return plant


def stale(state: str) -> Fault:
    """Return the past of a state tensor as its present."""

    def plant(model: onnx.ModelProto) -> None:
        _rename_output(model, f"present.{state}")
        model.graph.node.append(
            helper.make_node("Identity", [f"past.{state}"], [f"present.{state}"])
        )

    return plant


def rounded_to_half(state: str) -> Fault:
    """Keep a state tensor in half precision."""

    def plant(model: onnx.ModelProto) -> None:
        name = f"present.{state}"
        right = _rename_output(model, name)
        half, whole = onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT
        model.graph.node.append(helper.make_node("Cast", [right], ["half"], to=half))
        model.graph.node.append(helper.make_node("Cast", ["half"], [name], to=whole))

    return plant


def not_a_number(state: str, after: int) -> Fault:
    """Turn a float32 vector of the state to NaN once a row has read more than `after` tokens."""

    def plant(model: onnx.ModelProto) -> None:
        name = f"present.{state}"
        right = _rename_output(model, name)
        limit = _constant(model, "limit", np.array(after, np.int64))
        nan = _constant(model, "nan", np.array(np.nan, np.float32))
        axis = _constant(model, "axis", np.array([1], np.int64))
        nodes = (
            ("Greater", ["present.position", limit], "is_late"),
            ("Unsqueeze", ["is_late", axis], "late_rows"),
            ("Where", ["late_rows", nan, right], name),
        )
        for op, inputs, output in nodes:
            model.graph.node.append(helper.make_node(op, inputs, [output]))

    return plant


def _updates(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    return [n for n in model.graph.node if n.domain == DOMAIN]


def _producer(model: onnx.ModelProto, name: str) -> onnx.NodeProto:
    return next(n for n in model.graph.node if name in n.output)


def _constant(model: onnx.ModelProto, name: str, value: np.ndarray) -> str:
    model.graph.initializer.append(numpy_helper.from_array(value, name))
    return name


def _insert_before(
    model: onnx.ModelProto,
    node: onnx.NodeProto,
    op: str,
    inputs: list[str],
    output: str,
    **attributes: int,
) -> None:
    place = next(i for i, other in enumerate(model.graph.node) if other is node or other == node)
    model.graph.node.insert(place, helper.make_node(op, inputs, [output], **attributes))


def _wrap_input(model: onnx.ModelProto, node: onnx.NodeProto, index: int, op: str) -> None:
    _insert_before(model, node, op, [node.input[index]], "wrapped")
    node.input[index] = "wrapped"


def _rename_output(model: onnx.ModelProto, name: str) -> str:
    """Give a graph output's value another name, so that a new node can take its place."""
    renamed = name + ".right"
    for node in model.graph.node:
        for names in (node.input, node.output):
            for index, found in enumerate(names):
                if found == name:
                    names[index] = renamed
    return renamed


def _roll(
    model: onnx.ModelProto, name: str, axis: int, before: onnx.NodeProto | None = None
) -> str:
    """Add nodes that move everything by one place along an axis: the last comes first."""
    numbers = {"first": 0, "last_one": -1, "end": _END, "axis_of_roll": axis}
    for key, value in numbers.items():
        _constant(model, key, np.array([value], np.int64))
    slices = ("Slice", [name, "last_one", "end", "axis_of_roll"], "tail")
    rest = ("Slice", [name, "first", "last_one", "axis_of_roll"], "rest")
    for op, inputs, output in (slices, rest):
        _add(model, before, op, inputs, output)
    _add(model, before, "Concat", ["tail", "rest"], "rolled", axis=axis)
    return "rolled"


def _add(
    model: onnx.ModelProto,
    before: onnx.NodeProto | None,
    op: str,
    inputs: list[str],
    output: str,
    **attributes: int,
) -> None:
    if before is None:
        model.graph.node.append(helper.make_node(op, inputs, [output], **attributes))
    else:
        _insert_before(model, before, op, inputs, output, **attributes)
