"""Faults of an ONNX file that show in some uses only: one batch size, one length, far positions.

Each function returns a `Fault` that changes a model. `faults` has those that show in any use.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
from onnx import helper, numpy_helper

from tests.parity.faults import Fault, producer, updates


class Added:
    """Nodes that a fault adds to a graph, in front of one node.

    Attributes:
      place: Index of the node that they precede.
    """

    def __init__(self, model: onnx.ModelProto, place: int) -> None:
        self._model = model
        self._count = 0
        self.place = place

    def node(self, op: str, *inputs: str, output: str = "", **attributes: object) -> str:
        """Add a node and return the name of its output."""
        self._count += 1
        name = output or f"fault.{self._count}"
        made = helper.make_node(op, inputs, [name], name=f"node.{name}", **attributes)
        self._model.graph.node.insert(self.place, made)
        self.place += 1
        return name

    def constant(self, value: object, dtype: object = np.int64) -> str:
        """Add a constant and return its name."""
        name = f"fault.constant.{len(self._model.graph.initializer)}"
        self._model.graph.initializer.append(
            numpy_helper.from_array(np.array(value, dtype), name)  # type: ignore[arg-type]
        )
        return name

    def number(self, value: float) -> str:
        """Add a float32 constant and return its name."""
        return self.constant(value, np.float32)

    def size(self, axis: int) -> str:
        """Return the name of B (axis 0) or T (axis 1) of the call."""
        return self.node("Gather", self.node("Shape", "input_ids"), self.constant(axis))

    def by_row(self, values: str, rank: int) -> str:
        """Return values of each row, [B], with as many axes as `rank`."""
        return self.node("Reshape", values, self.constant([-1] + [1] * (rank - 1)))


# A change takes the nodes to add to and the name of a tensor, and returns the name of another.
Change = Callable[[Added, str], str]
# A condition returns the name of a bool tensor: one value, or one for each row.
Condition = Callable[[Added, int], str]


def tokens(op: str, count: int) -> Condition:
    """T compared with a number, by an ONNX operator such as Equal."""
    return lambda add, rank: add.node(op, add.size(1), add.constant(count))


def rows(op: str, count: int) -> Condition:
    """B compared with a number."""
    return lambda add, rank: add.node(op, add.size(0), add.constant(count))


def multiple(of: int) -> Condition:
    """T is a multiple of a number."""

    def condition(add: Added, rank: int) -> str:
        left = add.node("Mod", add.size(1), add.constant(of))
        return add.node("Equal", left, add.constant(0))

    return condition


def position(op: str, count: int) -> Condition:
    """The position of a row compared with a number."""

    def condition(add: Added, rank: int) -> str:
        return add.by_row(add.node(op, "past.position", add.constant(count)), rank)

    return condition


def padded(add: Added, rank: int) -> str:
    """Whether a row has fewer tokens than the call is long, but not none."""
    some = add.node("Greater", "lengths", add.constant(0))
    fewer = add.node("Less", "lengths", add.size(1))
    return add.by_row(add.node("And", some, fewer), rank)


def row_number(number: int) -> Condition:
    """Whether a row has a number."""

    def condition(add: Added, rank: int) -> str:
        counted = add.node("Range", add.constant(0), add.size(0), add.constant(1))
        return add.by_row(add.node("Equal", counted, add.constant(number)), rank)

    return condition


def every(*conditions: Condition) -> Condition:
    """All of several conditions."""

    def condition(add: Added, rank: int) -> str:
        first, *others = (each(add, rank) for each in conditions)
        for other in others:
            first = add.node("And", first, other)
        return first

    return condition


def where(condition: Condition, rank: int, change: Change) -> Change:
    """Apply a change where a condition holds."""

    def changed(add: Added, name: str) -> str:
        return add.node("Where", condition(add, rank), change(add, name), name)

    return changed


def times(factor: float) -> Change:
    return lambda add, name: add.node("Mul", name, add.number(factor))


def at_most(limit: float) -> Change:
    return lambda add, name: add.node("Min", name, add.number(limit))


def squared(add: Added, name: str) -> str:
    return add.node("Mul", name, name)


def of_row_0(add: Added, name: str) -> str:
    """Give every row the values of the first."""
    first = add.node("Gather", name, add.constant([0]), axis=0)
    return add.node("Expand", first, add.node("Shape", name))


def from_row_before(share: float) -> Change:
    """Add a share of the row before to each row, and of the last row to the first."""

    def changed(add: Added, name: str) -> str:
        zero, end, last = (add.constant([n]) for n in (0, np.iinfo(np.int64).max, -1))
        tail = add.node("Slice", name, last, end, zero)
        rest = add.node("Slice", name, zero, last, zero)
        before = add.node("Concat", tail, rest, axis=0)
        return add.node("Add", name, times(share)(add, before))

    return changed


def computed(find: Callable[[onnx.ModelProto], str], change: Change) -> Fault:
    """Change a tensor right after it was computed; `find` returns its name."""

    def plant(model: onnx.ModelProto) -> None:
        name = find(model)
        made = producer(model, name)
        made.output[list(made.output).index(name)] = f"{name}.right"
        place = list(model.graph.node).index(made) + 1
        _give_name(model, change(Added(model, place), f"{name}.right"), name)

    return plant


def _give_name(model: onnx.ModelProto, given: str, name: str) -> None:
    node = producer(model, given)
    node.output[list(node.output).index(given)] = name


def read(name: str, change: Change) -> Fault:
    """Change an input of the model before anything reads it."""

    def plant(model: onnx.ModelProto) -> None:
        users = [node for node in model.graph.node if name in node.input]
        changed = change(Added(model, 0), name)
        for node in users:
            node.input[list(node.input).index(name)] = changed

    return plant


def operand(find: Callable[[onnx.ModelProto], onnx.NodeProto], index: int, change: Change) -> Fault:
    """Change what one node reads as its input `index`."""

    def plant(model: onnx.ModelProto) -> None:
        node = find(model)
        added = Added(model, list(model.graph.node).index(node))
        changed = change(added, node.input[index])
        model.graph.node[added.place].input[index] = changed

    return plant


def written(update: int = 0) -> Callable[[onnx.ModelProto], str]:
    """Return a function that finds the values which an update writes, [B, T, Dv]."""
    return lambda model: str(updates(model)[update].input[2])


def decay(model: onnx.ModelProto) -> str:
    """Return the name of the decay, [B, T]."""
    return str(updates(model)[0].input[3])


def state(name: str) -> Callable[[onnx.ModelProto], str]:
    return lambda model: f"present.{name}"


def row_changed(weight: str, row: int, factor: float) -> Fault:
    """Scale one row of a weight whose name ends with `weight`."""

    def plant(model: onnx.ModelProto) -> None:
        tensor = next(t for t in model.graph.initializer if t.name.endswith(weight))
        values = numpy_helper.to_array(tensor).copy()
        values[row] *= factor
        tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))

    return plant


def labels_of_their_own(row: int, factor: float) -> Fault:
    """Look labels up in a copy of the unembedding, one row of which is wrong."""

    def plant(model: onnx.ModelProto) -> None:
        node = next(
            n for n in model.graph.node if n.op_type == "Gather" and "unembed" in n.input[0]
        )
        tensor = next(t for t in model.graph.initializer if t.name == node.input[0])
        values = numpy_helper.to_array(tensor).copy()
        values[row] *= factor
        model.graph.initializer.append(numpy_helper.from_array(values, "fault.labels"))
        node.input[0] = "fault.labels"

    return plant


def ids_read(change: Change) -> Fault:
    """Change the ids that the embedding is looked up with."""
    return operand(
        lambda model: next(n for n in model.graph.node if n.input[0].endswith("embedding.weight")),
        1,
        change,
    )


def rotary(change: Change) -> Fault:
    """Change the positions from which the rotary angles are computed."""
    return operand(_rotary, 0, change)


def _rotary(model: onnx.ModelProto) -> onnx.NodeProto:
    return next(n for n in model.graph.node if any("rotary_cycles" in i for i in n.input))


def rotary_in_float32(model: onnx.ModelProto) -> None:
    """Multiply position and rotary cycles in float32."""
    node = _rotary(model)
    added = Added(model, list(model.graph.node).index(node))
    whole, half = onnx.TensorProto.INT64, onnx.TensorProto.FLOAT
    factors = [added.node("Cast", name, to=half) for name in node.input]
    model.graph.node.remove(node)
    product = added.node("Mul", *factors)
    added.node("Cast", product, output=node.output[0], to=whole)


def modulo(number: int) -> Change:
    return lambda add, name: add.node("Mod", name, add.constant(number))


def through(kind: int, back: int = onnx.TensorProto.INT64) -> Change:
    """Cast to another type and back."""
    return lambda add, name: add.node("Cast", add.node("Cast", name, to=kind), to=back)


def slot_written(change: Change) -> Fault:
    """Change the position whose slot in the ring buffers is written."""
    return operand(lambda m: [n for n in m.graph.node if n.op_type == "Mod"][1], 0, change)


def window(change: Change) -> Fault:
    """Change the width of the attention window."""

    def find(model: onnx.ModelProto) -> onnx.NodeProto:
        made = [n for n in model.graph.node if n.op_type == "Greater"]
        limits = {name for node in made for name in node.input}
        return next(n for n in model.graph.node if n.op_type == "Sub" and n.output[0] in limits)

    return operand(find, 1, change)


def anchored(change: Change) -> Fault:
    """Change the position, modulo the interval, that decides whether the anchor moves."""

    def find(model: onnx.ModelProto) -> onnx.NodeProto:
        remainders = {
            n.output[0]
            for n in model.graph.node
            if n.op_type == "Mod" and n.input[0] == "past.position"
        }
        return next(
            n for n in model.graph.node if n.op_type == "Equal" and remainders & set(n.input)
        )

    return operand(find, 0, change)


def in_the_body(op: str, count: int, factor: float) -> Fault:
    """Scale what the update's function body adds to the state where T fulfils a comparison."""

    def plant(model: onnx.ModelProto) -> None:
        (body,) = model.functions
        place = next(i for i, n in enumerate(body.node) if n.output[0] == "present_state")
        made: list[onnx.NodeProto] = []

        def add(op: str, *inputs: str, **attributes: object) -> str:
            name = f"fault.body.{len(made)}"
            made.append(helper.make_node(op, inputs, [name], **attributes))
            return name

        def constant(value: object) -> str:
            return add("Constant", value=numpy_helper.from_array(np.array(value)))

        size = add("Gather", add("Shape", "decay"), constant(1))
        wrong = add(op, size, constant(count))
        scale = add("Where", wrong, constant(np.float32(factor)), constant(np.float32(1)))
        body.node[place].input[1] = add("Mul", body.node[place].input[1], scale)
        for node in reversed(made):
            body.node.insert(place, node)

    return plant


def element_negated(weight: str) -> Fault:
    """Flip the sign of the largest element of a weight whose name ends with `weight`."""

    def plant(model: onnx.ModelProto) -> None:
        tensor = next(t for t in model.graph.initializer if t.name.endswith(weight))
        values = numpy_helper.to_array(tensor).copy()
        largest = np.unravel_index(np.abs(values).argmax(), values.shape)
        values[largest] *= -1
        tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))

    return plant
