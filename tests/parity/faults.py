"""Faults to plant in a bundle's ONNX file.

The manifest is updated to match the broken file, so only checking what it computes finds the fault.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper

from fwl_export.bundle.manifest import MODEL_DATA_FILE, MODEL_FILE, Bundle, read_bundle
from fwl_export.op.spec import DOMAIN

Fault = Callable[[onnx.ModelProto], None]

_END = np.iinfo(np.int64).max


def broken_bundle(source: Path, target: Path, fault: Fault) -> Bundle:
    """Copy a bundle to `target`, plant the fault there, and record the new hashes."""
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
    """Change one element of the initializer whose name ends with `name`."""

    def plant(model: onnx.ModelProto) -> None:
        (tensor,) = [t for t in model.graph.initializer if t.name.endswith(name)]
        values = numpy_helper.to_array(tensor).copy()
        values[index] = values[index] * factor + added
        tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))

    return plant


def unnamed_weight(shape: tuple[int, ...], index: tuple[int, ...], factor: float) -> Fault:
    """Change one element of the first matrix of a shape.

    For transposed weights, which the exporter renames.
    """

    def plant(model: onnx.ModelProto) -> None:
        tensor = next(t for t in model.graph.initializer if tuple(t.dims) == shape)
        assert tensor.name.startswith("val_")
        weight(tensor.name, index, factor)(model)

    return plant


def negated_value(node: int) -> Fault:
    """Flip the sign of the value that an update writes."""

    def plant(model: onnx.ModelProto) -> None:
        _wrap_input(model, updates(model)[node], 2, "Neg")

    return plant


def added_instead(node: int) -> Fault:
    """Add the step that is read from an update, instead of subtracting it."""

    def plant(model: onnx.ModelProto) -> None:
        name = updates(model)[node].output[0]
        while True:  # follow the scaled step to the subtraction
            (user,) = [n for n in model.graph.node if name in n.input]
            if user.op_type == "Sub":
                user.op_type = "Add"
                return
            assert user.op_type in ("Mul", "Cast"), user.op_type
            name = user.output[0]

    return plant


def ignored_decay(node: int) -> Fault:
    """Give an update a decay of 1 for every token."""

    def plant(model: onnx.ModelProto) -> None:
        update = updates(model)[node]
        _insert_before(model, update, "Div", [update.input[3]] * 2, "ones")
        update.input[3] = "ones"

    return plant


def ignored_scale() -> Fault:
    """Use 1 as the scale of the step sizes, whatever the input says."""

    def plant(model: onnx.ModelProto) -> None:
        (node,) = [n for n in model.graph.node if "learning_rate_scale" in n.input]
        zero = _constant(model, "power", np.array(0, np.float32))
        _insert_before(model, node, "Pow", ["learning_rate_scale", zero], "ones")
        node.input[0] = "ones"

    return plant


def pending_of_padding(state: str) -> Fault:
    """Take a pending tensor from the last token of the call, even where that is padding."""

    def plant(model: onnx.ModelProto) -> None:
        choose = producer(model, f"present.{state}")
        gather = producer(model, choose.input[1])
        assert (choose.op_type, gather.op_type) == ("Where", "GatherND")
        last = _constant(model, "last", np.array(-1, np.int64))
        _insert_before(model, choose, "Gather", [gather.input[0], last], "of_last", axis=1)
        choose.input[1] = "of_last"

    return plant


def rolled_rows(state: str, share: float = 1.0) -> Fault:
    """Give each row the state of the row before it, or add a share of that state."""

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
    """Return the past value of a state tensor as its present value."""

    def plant(model: onnx.ModelProto) -> None:
        _rename_output(model, f"present.{state}")
        model.graph.node.append(
            helper.make_node("Identity", [f"past.{state}"], [f"present.{state}"])
        )

    return plant


def rounded_to_half(state: str) -> Fault:
    """Round a state tensor to half precision."""

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


def updates(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    return [n for n in model.graph.node if n.domain == DOMAIN]


def producer(model: onnx.ModelProto, name: str) -> onnx.NodeProto:
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
    """Rename the tensor of a graph output, so that a new node can compute the output."""
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
    """Add nodes that roll a tensor by one place along an axis, so that the last comes first."""
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


def wrong_epsilon(module: str, epsilon: float) -> Fault:
    """Give one norm another epsilon."""

    def plant(model: onnx.ModelProto) -> None:
        node = node_in(model, module, "Add")
        node.input[1] = _constant(model, "epsilon", np.array(epsilon, np.float32))

    return plant


def swapped(op: str, producer: str) -> Fault:
    """Swap the operands of the first `op` that reads the output of a `producer` operator."""

    def plant(model: onnx.ModelProto) -> None:
        made = {
            name for node in model.graph.node if node.op_type == producer for name in node.output
        }
        node = next(n for n in model.graph.node if n.op_type == op and made & set(n.input))
        node.input[0], node.input[1] = node.input[1], node.input[0]

    return plant


def swapped_query_and_key(update: int) -> Fault:
    """Read with the key and write with the query."""

    def plant(model: onnx.ModelProto) -> None:
        node = updates(model)[update]
        node.input[0], node.input[1] = node.input[1], node.input[0]

    return plant


def half_product(weight_name: str) -> Fault:
    """Multiply with a weight, and accumulate the product, in half precision."""

    def plant(model: onnx.ModelProto) -> None:
        node = next(
            n
            for n in model.graph.node
            if n.op_type == "MatMul" and n.input[1].endswith(weight_name)
        )
        half, whole = onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT
        for index, name in enumerate(list(node.input)):
            _insert_before(model, node, "Cast", [name], f"half.{index}", to=half)
            node.input[index] = f"half.{index}"
        output = node.output[0]
        node.output[0] = "half.product"
        place = next(i for i, n in enumerate(model.graph.node) if n == node) + 1
        model.graph.node.insert(
            place, helper.make_node("Cast", ["half.product"], [output], to=whole)
        )

    return plant


def through_half(name: str, factor: float) -> Fault:
    """Pass a float32 tensor through half precision, times a factor that is taken back after it.

    Where the tensor is above 65504 / factor, it becomes infinite.

    Args:
      name: Name of the tensor.
      factor: Power of two, so that nothing else is rounded but to half precision.
    """

    def plant(model: onnx.ModelProto) -> None:
        right = _rename_output(model, name)
        half, whole = onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT
        up = _constant(model, f"{name}.factor", np.array(factor, np.float32))
        down = _constant(model, f"{name}.inverse", np.array(1 / factor, np.float32))
        place = next(i for i, n in enumerate(model.graph.node) if right in n.output) + 1
        chain = (
            ("Mul", [right, up], f"{name}.scaled", {}),
            ("Cast", [f"{name}.scaled"], f"{name}.half", {"to": half}),
            ("Cast", [f"{name}.half"], f"{name}.whole", {"to": whole}),
            ("Mul", [f"{name}.whole", down], name, {}),
        )
        for number, (op, inputs, output, attributes) in enumerate(chain):
            node = helper.make_node(op, inputs, [output], **attributes)
            model.graph.node.insert(place + number, node)
        for node in list(model.graph.node)[place + len(chain) :]:
            for index, read in enumerate(node.input):
                if read == right:
                    node.input[index] = name

    return plant


def update_through_half(update: int, factor: float) -> Fault:
    """Pass what is read from the fast weights through half precision before the step scales it."""

    def plant(model: onnx.ModelProto) -> None:
        through_half(updates(model)[update].output[0], factor)(model)

    return plant


def scores_through_half(factor: float) -> Fault:
    """Pass the first layer's attention scores through half precision."""

    def plant(model: onnx.ModelProto) -> None:
        softmax = next(n for n in model.graph.node if n.op_type == "Softmax")
        masked = producer(model, softmax.input[0])
        assert masked.op_type == "Add"
        through_half(masked.input[0], factor)(model)

    return plant


def missing_cast() -> Fault:
    """Leave the rotary angles in half precision, as if their cast to float32 were missing."""

    def plant(model: onnx.ModelProto) -> None:
        (cosine,) = [n for n in model.graph.node if n.op_type == "Cos"]
        angle = cosine.input[0]
        scaled = producer(model, angle)
        half, whole = onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT
        scaled.output[0] = "whole.angle"
        _insert_before(model, cosine, "Cast", ["whole.angle"], "half.angle", to=half)
        _insert_before(model, cosine, "Cast", ["half.angle"], angle, to=whole)

    return plant


def scaled_input(op: str, source: str, factor: float) -> Fault:
    """Multiply the first input of the first `op` whose second input is the weight `source`."""

    def plant(model: onnx.ModelProto) -> None:
        node = next(n for n in model.graph.node if n.op_type == op and n.input[1].endswith(source))
        name = _constant(model, "factor", np.array(factor, np.float32))
        _insert_before(model, node, "Mul", [node.input[0], name], "scaled")
        node.input[0] = "scaled"

    return plant


def shifted_whole_number(op: str, user: str, index: int, by: int) -> Fault:
    """Add `by` to the constant input of the first `op` whose output a `user` operator reads."""

    def plant(model: onnx.ModelProto) -> None:
        users = [n for n in model.graph.node if n.op_type == user]
        taken = {name for node in users for name in node.input}
        node = next(n for n in model.graph.node if n.op_type == op and n.output[0] in taken)
        number = next(t for t in model.graph.initializer if t.name == node.input[index])
        value = numpy_helper.to_array(number) + by
        node.input[index] = _constant(model, "shifted", value)

    return plant


def wrong_slot() -> Fault:
    """Write keys and values one slot further in the ring buffers."""

    def plant(model: onnx.ModelProto) -> None:
        slot = [n for n in model.graph.node if n.op_type == "Mod"][1]
        one = _constant(model, "one_more", np.array(1, np.int64))
        _insert_before(model, slot, "Add", [slot.input[0], one], "next_slot")
        slot.input[0] = "next_slot"

    return plant


def row_of_no_tokens_moves() -> Fault:
    """Treat a row of length 0 as if it had read a token."""

    def plant(model: onnx.ModelProto) -> None:
        node = next(
            n for n in model.graph.node if n.op_type == "Greater" and n.input[0] == "lengths"
        )
        node.op_type = "GreaterOrEqual"

    return plant


def transposed_weight(module: str) -> Fault:
    """Transpose a square weight."""

    def plant(model: onnx.ModelProto) -> None:
        node = node_in(model, module, "MatMul")
        tensor = next(t for t in model.graph.initializer if t.name == node.input[1])
        tensor.CopyFrom(
            numpy_helper.from_array(numpy_helper.to_array(tensor).T.copy(), tensor.name)
        )

    return plant


def learns_always() -> Fault:
    """Learn from tokens of weight 0, too."""

    def plant(model: onnx.ModelProto) -> None:
        node = next(
            n for n in model.graph.node if n.op_type == "Where" and "label_weights" in n.input
        )
        one = _constant(model, "full_weight", np.array(1, np.float32))
        _insert_before(model, node, "Max", ["label_weights", one], "full_weights")
        node.input[1] = "full_weights"

    return plant


def dropped_bias() -> Fault:
    """Leave out the learned part of the first bias."""

    def plant(model: onnx.ModelProto) -> None:
        total = producer(model, producer(model, "present.fast.up.bias").input[0])
        step = next(
            n for n in model.graph.node if n.op_type == "Mul" and total.output[0] in n.input
        )
        node = next(n for n in model.graph.node if step.output[0] in n.input)
        assert node.op_type == "Sub"
        node.op_type = "Identity"
        del node.input[1]

    return plant


def plain_relu() -> Fault:
    """Leave out the square of the first squared ReLU."""

    def plant(model: onnx.ModelProto) -> None:
        relu = next(n for n in model.graph.node if n.op_type == "Relu")
        node = next(n for n in model.graph.node if relu.output[0] in n.input)
        assert node.op_type == "Pow"
        node.op_type = "Identity"
        del node.input[1]

    return plant


def last_tile_ignored() -> Fault:
    """Make the update's function body ignore the last token of each call."""

    def plant(model: onnx.ModelProto) -> None:
        (body,) = model.functions
        product = next(n for n in body.node if n.output[0] == "present_state").input[1]
        node = next(n for n in body.node if n.output[0] == product)
        value = node.input[1]
        place = list(body.node).index(node)
        tensors = {"from_0": [0], "to_last": [-1], "axis_1": [1], "pads": [0, 0, 0, 0, 1, 0]}
        made = [
            helper.make_node("Constant", [], [name], value=numpy_helper.from_array(np.array(v)))
            for name, v in tensors.items()
        ]
        made.append(helper.make_node("Slice", [value, "from_0", "to_last", "axis_1"], ["cut"]))
        made.append(helper.make_node("Pad", ["cut", "pads"], ["filled"]))
        node.input[1] = "filled"
        for new in reversed(made):
            body.node.insert(place, new)

    return plant


def node_in(model: onnx.ModelProto, module: str, op: str) -> onnx.NodeProto:
    """Return the first node of a type that was traced in a module."""
    for node in model.graph.node:
        scopes = [p.value for p in node.metadata_props if p.key.endswith("name_scopes")]
        if node.op_type == op and scopes and f"'{module}'" in scopes[0]:
            return node
    raise AssertionError(f"no {op} in {module}")
