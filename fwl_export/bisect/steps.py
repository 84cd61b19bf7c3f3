"""The first call at which a candidate goes wrong, and whether it was given the right state.

PyTorch in float64 reads the calls of a case. The candidate makes every call twice:
*teacher-forced*, with its state set to the reference's before the call, and *free-running*, with
its own state. If the teacher-forced call is wrong, the fault is inside the call. If only the
free-running call is wrong, the state that is carried from call to call is at fault.

`check` compares large tensors at some calls only; here everything is compared after every call.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
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
      call: The model's inputs other than the state.
      past: State before the call, in float64.
      outputs: Logits [B, P, V], zero at padding, and the state after the call, by name.
    """

    call: Call
    past: State
    outputs: State


@dataclass(frozen=True)
class Expected:
    """A call of a session, and what PyTorch in float64 made of it.

    Attributes:
      call: The call.
      past: State before the call, after rows were reset, copied or moved.
      outputs: Logits [B, P, V], zero at padding, and the state after the call, by name.
      steps: Calls of the model that it led to; a session splits a call at an anchor.
    """

    call: ScheduledCall
    past: State
    outputs: State
    steps: Sequence[Step]


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
      expected: The call, and what is right.
      earlier: State of the reference before the call before it, or None if it is the first.
      teacher_forced: Whether it went wrong even though it started from the reference's state.
      before_the_call: Whether the state was wrong already when rows had been reset, copied or moved
        before the call.
      outside: Outputs outside their budgets by name, logits first.
      found: Outputs of the candidate, or empty if it raised an exception.
      carried: State from which the candidate made the call.
      failure: Message of the exception the candidate raised, or "".
      judge: Says which outputs are outside their budgets.
    """

    expected: Expected
    earlier: State | None
    teacher_forced: bool
    before_the_call: bool
    outside: Mapping[str, Outside]
    found: State
    carried: State
    failure: str
    judge: Judge


class Judge:
    """Judges outputs by what PyTorch in the candidate's precision got wrong in the same calls.

    As in `check`, the budget of a tensor is a multiple of the largest error of all calls.
    """

    def __init__(self, precision: str, horizon_tokens: float, largest_call: int) -> None:
        """Start with no errors measured.

        Args:
          precision: Precision of the candidate.
          horizon_tokens: Tokens over which the fast weights remember, see `budgets`.
          largest_call: Largest T of the calls.
        """
        self._precision = precision
        # In one call, rounding errors of the decay add up over that call only.
        self._horizon_tokens = {
            True: min(horizon_tokens, largest_call) if horizon_tokens else 0.0,
            False: horizon_tokens,
        }
        self._own: dict[tuple[bool, str], Error] = {}
        self._share: dict[tuple[bool, str], float] = {}

    def measure_own(self, own: State, expected: State, teacher_forced: bool) -> None:
        """Count what PyTorch in the candidate's precision made of a call."""
        for name, error in measure(own, expected).items():
            key = (teacher_forced, name)
            last = self._own.get(key, error)
            self._own[key] = replace(
                error,
                max_abs=max(error.max_abs, last.max_abs),
                relative_rms=max(error.relative_rms, last.relative_rms),
            )
            share = error.max_abs / error.scale if error.scale else 0.0
            self._share[key] = max(share, self._share.get(key, 0.0))

    def outside(
        self, found: State, expected: State, tokens_read: int, teacher_forced: bool
    ) -> dict[str, Outside]:
        """Return the outputs that are outside their budgets, by name.

        Args:
          found: Outputs of the candidate.
          expected: Outputs of PyTorch in float64; other outputs of the candidate are not judged.
          tokens_read: Tokens the first row has read.
          teacher_forced: Whether the call was made from the reference's state.
        """
        result = {}
        for name, error in measure(found, expected).items():
            own = self._own[teacher_forced, name]
            if teacher_forced:  # the fast weights themselves grow, and so do their errors
                own = replace(own, max_abs=self._share[teacher_forced, name] * error.scale)
            (budget,) = budgets(
                tolerance_for(name),
                [replace(own, scale=error.scale)],
                [tokens_read],
                self._precision,
                self._horizon_tokens[teacher_forced],
            )
            if budget.use(error) > 1:
                result[name] = Outside(error, budget)
        return result


def first_wrong_call(
    bundle: Bundle,
    calls: Iterable[ScheduledCall],
    candidate: Session,
    own: Session,
    horizon_tokens: float,
) -> Suspect | None:
    """Make calls until one of the candidate goes wrong; None if none does.

    Args:
      bundle: Bundle that holds its checkpoint.
      calls: Calls of a case.
      candidate: Session with as many rows as the calls.
      own: PyTorch in the candidate's precision. Budgets are multiples of its error.
      horizon_tokens: Tokens over which the fast weights remember, see `budgets`.
    """
    made = list(calls)
    judge = _judge(bundle, made, own.another(candidate.batch), horizon_tokens)
    free_running = candidate.another(candidate.batch)
    teacher_forced = candidate.another(candidate.batch)
    earlier: State | None = None
    for expected in reference_calls(bundle, made, candidate.batch):
        suspect = _Attempt(expected, earlier, judge).suspect(free_running, teacher_forced)
        if suspect:
            return suspect
        earlier = expected.past
    return None


def _judge(
    bundle: Bundle, calls: Sequence[ScheduledCall], own: Session, horizon_tokens: float
) -> Judge:
    """Make the calls in PyTorch in the candidate's precision, to measure what is usual."""
    largest = max((call.ids.shape[1] for call in calls), default=1)
    judge = Judge(bundle.manifest.precision, horizon_tokens, largest)
    forced = own.another(own.batch)
    for expected in reference_calls(bundle, calls, own.batch):
        call = expected.call
        call.prepare(own)
        judge.measure_own(made_by(own, call), expected.outputs, False)
        forced.state = as_types(forced, expected.past)
        judge.measure_own(made_by(forced, call), expected.outputs, True)
    return judge


@dataclass(frozen=True)
class _Attempt:
    """One call, made by the candidate's two sessions."""

    expected: Expected
    earlier: State | None
    judge: Judge

    def suspect(self, free_running: Session, teacher_forced: Session) -> Suspect | None:
        """Make the call in both sessions; returns what is wrong, or None."""
        call, past = self.expected.call, self.expected.past
        try:
            call.prepare(free_running)
            carried = free_running.state
        except Exception as error:  # runtimes raise exceptions of any type
            return self._suspect(False, True, {}, {}, {}, _text(error))
        if call.prepares and (outside := self._outside(carried, past, False)):
            return self._suspect(False, True, outside, carried, carried, "")
        given = as_types(teacher_forced, past)
        for session, state, forced in (
            (teacher_forced, given, True),
            (free_running, carried, False),
        ):
            try:
                if forced:
                    session.state = state
                found = made_by(session, call)
            except Exception as error:  # runtimes raise exceptions of any type
                return self._suspect(forced, False, {}, {}, state, _text(error))
            if outside := self._outside(found, self.expected.outputs, forced):
                return self._suspect(forced, False, outside, found, state, "")
        return None

    def _outside(self, found: State, expected: State, forced: bool) -> dict[str, Outside]:
        return self.judge.outside(found, expected, self.expected.call.tokens_read, forced)

    def _suspect(
        self,
        forced: bool,
        before_the_call: bool,
        outside: Mapping[str, Outside],
        found: State,
        carried: State,
        failure: str,
    ) -> Suspect:
        return Suspect(
            self.expected,
            self.earlier,
            forced,
            before_the_call,
            outside,
            found,
            carried,
            failure,
            self.judge,
        )


def reference_calls(
    bundle: Bundle, calls: Iterable[ScheduledCall], rows: int
) -> Iterator[Expected]:
    """Yield what PyTorch in float64 makes of the calls."""
    from fwl_export.runtimes.torch import TorchRunner, load_model

    manifest = bundle.manifest
    model = load_model(bundle, "fp64")
    recorder = Recorder(TorchRunner(model))
    config = manifest.config
    interval = config.fast_weights.anchor_interval
    spec = SessionSpec(model.specs, config.vocab_size, manifest.max_tokens, interval)
    session = Session(recorder, spec, rows)
    for call in calls:
        call.prepare(session)
        recorder.calls.clear()
        past = session.state
        outputs = made_by(session, call)
        steps = [
            Step(made, before, {LOGITS: real_logits(logits, made), **after})
            for made, before, logits, after in recorder.calls
        ]
        yield Expected(call, past, outputs, steps)


def made_by(session: Session, call: ScheduledCall) -> State:
    """Make a call; returns logits [B, P, V], zero at padding, and the state, by name."""
    logits = call.feed(session)
    real = call.wanted < call.lengths[:, None]
    logits = np.where(real[..., None], logits, np.zeros((), logits.dtype))
    return {LOGITS: logits, **session.state}


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


def as_types(session: Session, state: State) -> State:
    """Return a state rounded to the dtypes of a session."""
    with np.errstate(over="ignore"):
        return {spec.name: state[spec.name].astype(spec.dtype) for spec in session.specs}


def real_logits(logits: Array, call: Call) -> Array:
    """Return logits [B, P, V] of a call of the model, with zeros at padding."""
    real = call.logit_positions < call.lengths[:, None]
    return np.where(real[..., None], logits, np.zeros((), logits.dtype))


def _text(error: Exception) -> str:
    return str(error) or type(error).__name__
