"""The first call at which a candidate goes wrong, and whether it was given the right state.

PyTorch in float64 reads the schedule. The candidate makes every call twice: *teacher-forced*, with
its state set to the reference's before the call, and *free-running*, with its own state. If the
teacher-forced call is wrong, the fault is inside the model. If only the free-running call is wrong,
the state that is carried from call to call is at fault.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from fwl_export.bisect.runners import Recorder
from fwl_export.bundle.manifest import Bundle
from fwl_export.bundle.state import Array, State
from fwl_export.parity.compare import Error, Place
from fwl_export.parity.schedule import ScheduledCall
from fwl_export.parity.tolerances import Budget, budgets, tolerance_for
from fwl_export.runtimes import Session, SessionSpec
from fwl_export.runtimes.base import Call

LOGITS = "logits"


@dataclass(frozen=True)
class Step:
    """One call of the model, and what PyTorch in float64 made of it.

    Attributes:
      number: Number of the scheduled call that the step belongs to.
      tokens_read: Tokens the first row had read after that call.
      call: The model's inputs other than the state.
      reset: Rows that were reset before the call.
      past: State before the call, in float64.
      outputs: Logits [B, T, V], zero at padding, and the state after the call, by name.
    """

    number: int
    tokens_read: int
    call: Call
    reset: tuple[int, ...]
    past: State
    outputs: State


@dataclass(frozen=True)
class Outside:
    """A tensor whose error is larger than its budget.

    Attributes:
      error: Distance of the tensor from PyTorch in float64.
      budget: Largest error that is allowed.
    """

    error: Error
    budget: Budget

    @property
    def use(self) -> float:
        """Error divided by the budget; more than 1 is outside."""
        return self.budget.use(self.error)


@dataclass(frozen=True)
class Suspect:
    """The first call that went wrong.

    Attributes:
      step: The call that went wrong.
      before: The call before it, or None if it is the first.
      teacher_forced: Whether it went wrong even though it started from the reference's state.
      outside: Outputs outside their budgets by name, logits first.
      found: Outputs of the candidate, or empty if it raised an exception.
      failure: Message of the exception the candidate raised, or "".
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
    """Read until a call of the candidate goes wrong; None if no call does.

    Args:
      bundle: Bundle that holds its checkpoint.
      calls: Scheduled calls to make.
      candidate: Session with as many rows as the calls.
      own: PyTorch in the candidate's precision. Budgets are multiples of its error.
      horizon_tokens: Tokens over which the fast weights remember, see `budgets`.
      advance: Called with the number of tokens that the first row has moved on.
    """
    precision = bundle.manifest.precision
    rows = candidate.batch
    judges = [_Judge(own.another(rows), precision, horizon_tokens) for _ in range(2)]
    free_running = candidate.another(rows)
    before: Step | None = None
    runs = ((judges[0], candidate, True), (judges[1], free_running, False))
    for step in reference_steps(bundle, calls, rows):
        for judge, session, teacher_forced in runs:
            found = fed(session, step, teacher_forced)
            outside = judge.outside(found, step, teacher_forced)
            if isinstance(found, str):
                return Suspect(step, before, teacher_forced, {}, {}, found)
            if outside:
                return Suspect(step, before, teacher_forced, outside, found, "")
        advance(step.tokens_read - (before.tokens_read if before else 0))
        before = step
    return None


def reference_steps(bundle: Bundle, calls: Iterable[ScheduledCall], rows: int) -> Iterator[Step]:
    """Yield the model calls that a schedule leads to.

    There may be more of them than scheduled calls, because a session splits a call at an anchor.
    """
    from fwl_export.runtimes.torch import TorchRunner, load_model

    manifest = bundle.manifest
    model = load_model(bundle, "fp64")
    recorder = Recorder(TorchRunner(model))
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
    """Return the distance of each tensor [B, ...] from the expected tensor of the same name."""
    return {name: distance(found[name], right, len(right)) for name, right in expected.items()}


def distance(found: Array, expected: Array, rows: int = 1) -> Error:
    """Return the distance of a tensor from the expected one, measured as in `compare.TensorSum`.

    Args:
      found: Array of any shape. Infinities and NaN that both arrays have count as equal.
      expected: Array of the same shape.
      rows: Number of rows along the first axis; the relative RMS is that of the worst row.
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
    flat = int(np.argmax(difference))  # NaN wins if there is one
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
    """Return the outputs of a session for a step, or the message of what it raised.

    Args:
      session: Session that makes the call.
      step: Call to make, with the reference's state before it.
      teacher_forced: Whether the session starts from the reference's state instead of its own.
    """
    try:
        if teacher_forced:
            session.state = as_types(session, step.past)
        elif step.reset:
            session.reset(step.reset)
        call = step.call
        session.learning_rate_scale = call.learning_rate_scale
        logits = session.feed(call.input_ids, call.label_weights, call.lengths)
        return {LOGITS: _real(logits, call), **session.state}
    except Exception as error:  # runtimes raise exceptions of any type
        return str(error) or type(error).__name__


def as_types(session: Session, state: State) -> State:
    """Return a state rounded to the dtypes of a session."""
    with np.errstate(over="ignore"):
        return {spec.name: state[spec.name].astype(spec.dtype) for spec in session.specs}


class _Judge:
    """Judges steps in order; budgets are multiples of PyTorch's largest error so far."""

    def __init__(self, own: Session, precision: str, horizon_tokens: float) -> None:
        self._own = own
        self._precision = precision
        self._horizon_tokens = horizon_tokens
        self._largest: dict[str, Error] = {}

    def outside(self, found: State | str, step: Step, teacher_forced: bool) -> dict[str, Outside]:
        """Return the outputs outside their budgets by name, after measuring PyTorch's own error."""
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


def _real(logits: Array, call: Call) -> Array:
    """Return logits with zeros at padding, where they have no meaning."""
    real = np.arange(call.input_ids.shape[1]) < call.lengths[:, None]
    return np.where(real[..., None], logits, 0)
