"""The first call at which a candidate goes wrong, and whether it was given the right state.

PyTorch in float64 reads the schedule. The candidate makes every call twice: *teacher-forced*, with
its state set to the reference's before the call, and *free-running*, with its own state. If the
teacher-forced call is wrong, the fault is inside the model. If only the free-running call is wrong,
the state that is carried from call to call is at fault.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fwl_export.bundle.manifest import Bundle
from fwl_export.bundle.state import Array, State
from fwl_export.parity.compare import Error, Place
from fwl_export.parity.schedule import ScheduledCall
from fwl_export.parity.tolerances import Budget, budgets, tolerance_for
from fwl_export.runtimes import Session, SessionSpec
from fwl_export.runtimes.base import Call, Rows, Runner

LOGITS = "logits"


@dataclass(frozen=True)
class Step:
    """One call of the model, and what PyTorch in float64 made of it.

    Attributes:
      number: of the call in the schedule.
      tokens_read: tokens the first row had read after it.
      call: its inputs beside the state.
      reset: rows that started afresh before it.
      past: the state before, float64.
      outputs: logits [B, T, V], zero at padding, and the state after.
    """

    number: int
    tokens_read: int
    call: Call
    reset: tuple[int, ...]
    past: State
    outputs: State


@dataclass(frozen=True)
class Outside:
    """A tensor that left its budget.

    Attributes:
      error: its distance from float64.
      budget: what that may be.
    """

    error: Error
    budget: Budget

    @property
    def use(self) -> float:
        """How many times the budget."""
        return self.budget.use(self.error)


@dataclass(frozen=True)
class Suspect:
    """The first call that went wrong.

    Attributes:
      step: the call.
      before: the one before it; None if it is the first.
      teacher_forced: whether it went wrong with the right state.
      outside: outputs outside their budgets, by name, logits first.
      found: what the candidate returned; empty if it raised.
      failure: what the candidate raised; empty: nothing.
    """

    step: Step
    before: Step | None
    teacher_forced: bool
    outside: Mapping[str, Outside]
    found: State
    failure: str


def first_wrong_step(
    bundle: Bundle,
    calls: Iterable[ScheduledCall],
    candidate: Session,
    own: Session,
    horizon_tokens: float,
    advance: Callable[[int], None],
) -> Suspect | None:
    """Read until a call of the candidate goes wrong.

    Args:
      bundle: holds its checkpoint.
      calls: of the schedule.
      candidate: of as many rows as the calls.
      own: PyTorch in the candidate's precision: what that costs is the measure of the budgets.
      horizon_tokens: tokens that the sums remember, see `budgets`.
      advance: called with the number of tokens the first row has moved.
    """
    precision = bundle.manifest.precision
    rows = candidate.batch
    teacher_forced, free = (_Judge(own.another(rows), precision, horizon_tokens) for _ in range(2))
    free_candidate = candidate.another(rows)
    before: Step | None = None
    runs = ((teacher_forced, candidate, True), (free, free_candidate, False))
    for step in reference_steps(bundle, calls, rows):
        for judge, session, is_teacher_forced in runs:
            found = fed(session, step, is_teacher_forced)
            outside = judge.outside(found, step, is_teacher_forced)
            if isinstance(found, str):
                return Suspect(step, before, is_teacher_forced, {}, {}, found)
            if outside:
                return Suspect(step, before, is_teacher_forced, outside, found, "")
        advance(step.tokens_read - (before.tokens_read if before else 0))
        before = step
    return None


def reference_steps(bundle: Bundle, calls: Iterable[ScheduledCall], rows: int) -> Iterator[Step]:
    """Yield the calls of the model that a schedule makes; a session splits some at anchors."""
    from fwl_export.runtimes.torch import TorchRunner, load_model

    manifest = bundle.manifest
    model = load_model(bundle, "fp64")
    recorder = _Recorder(TorchRunner(model))
    config = manifest.config
    interval = config.fast_weights.anchor_interval
    spec = SessionSpec(model.specs, config.vocab_size, manifest.max_tokens, interval)
    session = Session(recorder, spec, rows)
    for scheduled in calls:
        if scheduled.reset:
            session.reset(scheduled.reset)
        recorder.calls.clear()
        session.learning_rate_scale = scheduled.scale
        session.feed(scheduled.ids, scheduled.weights, scheduled.lengths)
        for index, (call, past, logits, present) in enumerate(recorder.calls):
            reset = () if index else scheduled.reset
            outputs = {LOGITS: _real(logits, call), **present}
            yield Step(scheduled.step, scheduled.tokens_read, call, reset, past, outputs)


def measure(found: Mapping[str, Array], expected: Mapping[str, Array]) -> dict[str, Error]:
    """Return the distance of every tensor [B, ...] from the one of that name."""
    return {name: distance(found[name], right, len(right)) for name, right in expected.items()}


def distance(found: Array, expected: Array, rows: int = 1) -> Error:
    """Return the distance of a tensor from what is right, as `compare.TensorSum` counts it.

    Args:
      found: any shape; infinities and NaN that both have are equal.
      expected: of the same shape.
      rows: that count on their own, along the first axis.
    """
    if expected.size == 0:
        return Error(0.0, 0.0, 0.0, None)
    values, right = (x.astype(np.float64).reshape(rows, -1) for x in (found, expected))
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        difference = np.abs(values - right)
        if not np.isfinite(right).all():
            same = (values == right) | (np.isnan(values) & np.isnan(right))
            difference[same], right = 0, np.where(np.isfinite(right), right, 0)
        squares, of_right = (np.einsum("ij,ij->i", x, x) for x in (difference, right))
        ratios = np.where(squares == 0, 0, np.sqrt(squares / of_right))
    flat = int(np.argmax(difference))  # of NaN if there is one
    index = tuple(int(i) for i in np.unravel_index(flat, expected.shape))
    place = Place(0, 0, index, float(found.reshape(-1)[flat]), float(expected.reshape(-1)[flat]))
    largest, rms = float(difference.reshape(-1)[flat]), float(ratios.max())
    return Error(
        largest if np.isfinite(largest) else np.inf,
        rms if np.isfinite(rms) else np.inf,
        float(np.abs(right).max()),
        place,
    )


def fed(session: Session, step: Step, teacher_forced: bool) -> State | str:
    """Return the outputs of a session for a step, or what it raised."""
    try:
        if teacher_forced:
            session.state = as_types(session, step.past)
        elif step.reset:
            session.reset(step.reset)
        call = step.call
        session.learning_rate_scale = call.learning_rate_scale
        logits = session.feed(call.input_ids, call.label_weights, call.lengths)
        return {LOGITS: _real(logits, call), **session.state}
    except Exception as error:  # a runtime may raise anything
        return str(error) or type(error).__name__


def as_types(session: Session, state: State) -> State:
    """Return a state rounded to the types of a session."""
    with np.errstate(over="ignore"):
        return {spec.name: state[spec.name].astype(spec.dtype) for spec in session.specs}


class _Judge:
    """Judges one step after the other; the budget is what PyTorch has been off by so far."""

    def __init__(self, own: Session, precision: str, horizon_tokens: float) -> None:
        self._own = own
        self._precision = precision
        self._horizon_tokens = horizon_tokens
        self._largest: dict[str, Error] = {}

    def outside(self, found: State | str, step: Step, teacher_forced: bool) -> dict[str, Outside]:
        own = fed(self._own, step, teacher_forced)
        assert not isinstance(own, str), own
        for name, error in measure(own, step.outputs).items():
            last = self._largest.get(name, error)
            self._largest[name] = replace(
                error,
                max_abs=max(error.max_abs, last.max_abs),
                relative_rms=max(error.relative_rms, last.relative_rms),
            )
        if isinstance(found, str):
            return {}
        outside = {}
        for name, error in measure(found, step.outputs).items():
            own_errors, tokens_read = [self._largest[name]], [step.tokens_read]
            row = tolerance_for(name)
            (budget,) = budgets(row, own_errors, tokens_read, self._precision, self._horizon_tokens)
            if budget.use(error) > 1:
                outside[name] = Outside(error, budget)
        return outside


class _Recorder:
    """A runner that keeps what its calls took and returned."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self.calls: list[tuple[Call, State, Array, State]] = []

    def another(self) -> Runner:
        return _Recorder(self._runner.another())

    def new_buffers(self, batch: int) -> Any:
        return self._runner.new_buffers(batch)

    def run(self, call: Call, past: Any, present: Any) -> Array:
        rows = range(len(call.lengths))
        before = self._runner.read(past, rows)
        logits = self._runner.run(call, past, present)
        self.calls.append((call, before, logits, self._runner.read(present, rows)))
        return logits

    def read(self, buffers: Any, rows: Rows) -> State:
        return self._runner.read(buffers, rows)

    def write(self, buffers: Any, state: Mapping[str, Array], rows: Sequence[int]) -> None:
        self._runner.write(buffers, state, rows)

    def release(self, buffers: Any) -> None:
        self._runner.release(buffers)


def _real(logits: Array, call: Call) -> Array:
    """Return logits with zeros at padding, where they mean nothing."""
    real = np.arange(call.input_ids.shape[1]) < call.lengths[:, None]
    return np.where(real[..., None], logits, 0)
