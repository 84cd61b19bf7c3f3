"""Explain NaN and infinity: the first tensor that has them, and the numbers that led to it.

The calls are made again until one is not finite, and that call token by token. The step that fails
is run with every tensor of the ONNX graph as an output. The first tensor in graph order that is not
finite where PyTorch in float64 is finite is the cause: what comes later only inherits it. Whether
PyTorch's number is larger than the tensor's type can hold decides whose fault it is.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fwl_export.bisect.expose import call_inputs, expose_all, open_probe
from fwl_export.bisect.finding import NODE, RANGE, Finding, Overflow
from fwl_export.bisect.locate import counterparts, traced
from fwl_export.bisect.steps import as_types, reference_calls
from fwl_export.bundle.manifest import Bundle
from fwl_export.bundle.state import PAST, Array, State, zeros
from fwl_export.errors import NotFiniteError
from fwl_export.model.traced_graph import Operation, TracedGraph
from fwl_export.parity.candidates import Candidate
from fwl_export.parity.schedule import ScheduledCall
from fwl_export.runtimes import Session
from fwl_export.runtimes.base import Call
from fwl_export.runtimes.not_finite import HALF_PRECISIONS

if TYPE_CHECKING:
    import onnx


class _Step(NamedTuple):
    """A call of the model whose output is not finite.

    Attributes:
      of: Call of the session that led to it.
      call: The model's inputs other than the state.
      past: State before the call, in the session's dtypes.
      row: Row that is not finite.
      token: Index in the session's call of the first token after which it is not.
      position: Tokens that the row had read before that token.
    """

    of: ScheduledCall
    call: Call
    past: State
    row: int
    token: int
    position: int


class _Wrong(NamedTuple):
    """A tensor that is not finite although it should be.

    Attributes:
      name: Its name in the ONNX graph.
      node: The node that computes it.
      place: Index of the first such element.
      value: Value of that element.
      right: Value in PyTorch in float64, or None if PyTorch has no such tensor.
      dtype: Dtype of the tensor.
    """

    name: str
    node: onnx.NodeProto
    place: tuple[int, ...]
    value: float
    right: float | None
    dtype: np.dtype[Any]


@dataclass(frozen=True)
class NotFiniteSearch:
    """The search for the first tensor that is not finite.

    Attributes:
      bundle: Bundle under check.
      candidate: Candidate that failed.
      graph: PyTorch's traced graph.
      session: Fresh session of the candidate, with as many rows as the calls.
      threads: Threads of the candidate's runtime.
    """

    bundle: Bundle
    candidate: Candidate
    graph: TracedGraph
    session: Session
    threads: int | None

    def run(self, calls: Iterable[ScheduledCall], folder: Path) -> Finding | None:
        """Return the cause, or None if the calls stay finite.

        Args:
          calls: Calls of the case, up to the one that failed.
          folder: Folder to write an ONNX file to.
        """
        made = list(calls)
        step = self._free_running(made) or self._teacher_forced(made)
        if isinstance(step, Finding) or step is None:
            return step
        return self._explained(step, folder / "exposed.onnx")

    def _free_running(self, calls: Iterable[ScheduledCall]) -> _Step | None:
        session = self.session.another(self.session.batch)
        for call in calls:
            call.prepare(session)
            before = session.state
            if not _is_finite(session, call):
                session.state = before
                return _one_by_one(session, call)
        return None

    def _teacher_forced(self, calls: Iterable[ScheduledCall]) -> _Step | Finding | None:
        session = self.session.another(self.session.batch)
        for expected in reference_calls(self.bundle, calls, session.batch):
            given = as_types(session, expected.past)
            for name, array in given.items():
                if array.dtype.kind == "f" and not np.isfinite(array).all():
                    return _too_large_state(expected.call, name, array, expected.past[name])
            session.state = given
            if not _is_finite(session, expected.call):
                session.state = given
                return _one_by_one(session, expected.call)
        return None

    def _explained(self, step: _Step, path: Path) -> Finding | None:
        import onnx
        from onnx import numpy_helper

        source = self.bundle.model_files()
        model = expose_all(source, path)
        inputs = call_inputs(step.call, step.past)
        probe = open_probe(self.candidate, path, self.threads)
        found = probe.run(inputs)
        # What is infinite with a fresh state too, such as a mask, is so by design.
        fresh = probe.run(call_inputs(step.call, zeros(self.session.specs, len(step.call.lengths))))
        by_design = {n for n, a in fresh.items() if not np.isfinite(_floats(a)).all()}
        exact = traced(self.bundle, self.graph, step.call, step.past)
        names = counterparts(self.graph, model)
        whole = onnx.load(str(source))
        weights = {t.name: numpy_helper.to_array(t) for t in whole.graph.initializer}
        values = {**weights, **inputs, **found}
        names = {name: right for name, right in names.items() if right in exact}
        wrong = _first_wrong(model, values, exact, names, by_design, step.call.lengths)
        if wrong is None:
            return None
        producers = {name: node for node in model.graph.node for name in node.output}
        return self._finding(step, wrong, values, names, set(weights), producers)

    def _finding(
        self,
        step: _Step,
        wrong: _Wrong,
        values: Mapping[str, Array],
        names: Mapping[str, str],
        weights: set[str],
        producers: Mapping[str, onnx.NodeProto],
    ) -> Finding:
        operations = {operation.name: operation for operation in self.graph.operations}
        operation = operations.get(names.get(wrong.name, "")) or _operation_before(
            wrong.node, producers, names, operations
        )
        read = {n: values[n] for n in wrong.node.input if n in values and values[n].size}
        floats = {n: a for n, a in read.items() if a.dtype.kind == "f"}
        broken = [n for n, a in floats.items() if not np.isfinite(a).all()]
        largest = {n: float(np.abs(a[np.isfinite(a)]).max(initial=0)) for n, a in floats.items()}
        name = max(largest, key=largest.__getitem__, default="")
        limit = float(np.finfo(wrong.dtype).max)
        overflow = Overflow(
            wrong.dtype.name,
            limit,
            list(wrong.place),
            wrong.value,
            wrong.right,
            name,
            largest.get(name, 0.0),
        )
        node = wrong.node
        weights_broken = [n for n in broken if n in weights]
        fault, note = self._fault(wrong, overflow, weights_broken)
        return Finding(
            NODE if weights_broken or not fault else RANGE,
            step.of.step,
            step.of.tokens_read,
            step.of.ids.shape[1],
            wrong.name,
            module=operation.scope if operation else "",
            operation=str(operation) if operation else "",
            node=node.name or node.output[0],
            op_type=f"{node.domain}::{node.op_type}" if node.domain else node.op_type,
            wrong_weights=weights_broken,
            fault=fault,
            note=note,
            overflow=overflow,
            row=step.row,
            token=step.position,
            token_id=int(step.of.ids[step.row, step.token]),
        )

    def _fault(self, wrong: _Wrong, overflow: Overflow, weights: list[str]) -> tuple[str, str]:
        """Return whose fault it is, and a note in words."""
        kind, precision = overflow.dtype, self.bundle.manifest.precision
        if weights:
            return "file", "the weights in the file are not finite"
        if kind == "float16" and precision not in HALF_PRECISIONS:
            return "file", f"the bundle is {precision}, but the file computes this in {kind}"
        too_large = [abs(wrong.right)] if wrong.right is not None else []
        if wrong.node.op_type == "Cast":
            too_large.append(overflow.largest_input)
        if max(too_large, default=0.0) > overflow.largest:
            return "range", (
                f"the number is right but too large for {kind}; compute this part in float32: "
                "`fwl-export precision` finds a policy that keeps it there"
            )
        if overflow.largest_input**2 > overflow.largest:
            return "range", (
                f"the result would fit into {kind}, but numbers on the way to it, such as products "
                "of the inputs, are too large for it; compute this part in float32"
            )
        return "", f"the inputs and the result fit into {kind}, so its range does not explain it"


def _is_finite(session: Session, call: ScheduledCall) -> bool:
    """Make a call; returns whether its logits and the state after it are finite."""
    try:
        call.feed(session)
    except NotFiniteError:
        return False
    return _wrong_row(session.peek()) is None


def _wrong_row(state: State) -> int | None:
    """Return a row of a state that is not finite, or None."""
    for array in state.values():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            return int(np.argwhere(~np.isfinite(array))[0][0])
    return None


def _one_by_one(session: Session, call: ScheduledCall) -> _Step | None:
    """Read the tokens of a call one by one; returns the step that is not finite, or None."""
    session.learning_rate_scale = call.scale
    for token in range(call.ids.shape[1]):
        lengths = (token < call.lengths).astype(np.int64)
        one = slice(token, token + 1)
        before, positions = session.state, session.positions
        try:
            session.feed(call.ids[:, one], call.weights[:, one], lengths, last_only=True)
            row = _wrong_row(session.peek())
        except NotFiniteError as error:
            row = error.row
        if row is not None:
            step = Call(
                np.ascontiguousarray(call.ids[:, one]),
                np.ascontiguousarray(call.weights[:, one], np.float32),
                lengths,
                np.zeros((len(lengths), 1), np.int64),
                call.scale.astype(np.float32),
            )
            return _Step(call, step, before, row, token, positions[row])
    return None


def _first_wrong(
    model: onnx.ModelProto,
    values: Mapping[str, Array],
    exact: State,
    names: Mapping[str, str],
    by_design: set[str],
    lengths: Array,
) -> _Wrong | None:
    """Return the first tensor in graph order that is not finite where PyTorch's is.

    Args:
      model: The ONNX model.
      values: All tensors of the ONNX graph by name, with weights and inputs.
      exact: PyTorch's tensors in float64 by name.
      names: Names in PyTorch's graph by name in the ONNX graph.
      by_design: Names of tensors that need not be finite where PyTorch has no such tensor.
      lengths: Number of tokens of each row, [B]; rows without any do not count.
    """
    for node in model.graph.node:
        for name in node.output:
            value = values.get(name)
            if value is None or value.dtype.kind != "f" or np.isfinite(value).all():
                continue
            right = exact.get(names.get(name, ""))
            if right is not None and right.shape == value.shape:
                wrong = ~np.isfinite(value) & np.isfinite(right)
            else:
                right = None
                counts = name not in by_design and _reads_finite(node, values)
                wrong = ~np.isfinite(value) & counts
            if value.ndim and len(value) == len(lengths) and wrong.shape == value.shape:
                wrong[lengths == 0] = False
            if wrong.any():
                index = tuple(int(i) for i in np.argwhere(wrong)[0])
                true = None if right is None else float(right[index])
                return _Wrong(name, node, index, float(value[index]), true, value.dtype)
    return None


def _operation_before(
    node: onnx.NodeProto,
    producers: Mapping[str, onnx.NodeProto],
    names: Mapping[str, str],
    operations: Mapping[str, Operation],
) -> Operation | None:
    """Return the nearest operation of PyTorch's graph that a node depends on, or None."""
    waiting, seen = deque(node.input), set(node.output)
    while waiting:
        name = waiting.popleft()
        if found := operations.get(names.get(name, "")):
            return found
        if name in producers and name not in seen:
            waiting.extend(producers[name].input)
        seen.add(name)
    return None


def _floats(array: Array) -> Array:
    """Return an array, or zeros if it holds whole numbers or truth values."""
    return array if array.dtype.kind == "f" else np.zeros(1)


def _reads_finite(node: onnx.NodeProto, values: Mapping[str, Array]) -> bool:
    read = (values[name] for name in node.input if name in values)
    return all(np.isfinite(_floats(array)).all() for array in read)


def _too_large_state(call: ScheduledCall, name: str, given: Array, right: Array) -> Finding:
    """Return the finding about a state of the reference that the candidate's types cannot hold."""
    index = tuple(int(i) for i in np.argwhere(~np.isfinite(given))[0])
    value, true = float(given[index]), float(right[index])
    limit = float(np.finfo(given.dtype).max)
    return Finding(
        RANGE,
        call.step,
        call.tokens_read,
        call.ids.shape[1],
        PAST + name,
        fault="range",
        note="the state of PyTorch in float64 before this call has a number too large for "
        f"{given.dtype}",
        overflow=Overflow(given.dtype.name, limit, list(index), value, true, "", 0.0),
        row=index[0],
    )
