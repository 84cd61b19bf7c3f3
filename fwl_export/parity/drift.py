"""Drive sessions side by side over calls and measure how far they are from a reference.

In mode "free" every session carries its own state from the first call to the last, so what a
runtime gets wrong once goes on to act on everything after it. In mode "forced" a second session
of the same runtime gets the reference's state before every call, so only the error of one step is
left. Both are measured in one pass, and nothing is kept but sums.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from fwl_export.bundle.state import Array, State
from fwl_export.errors import NotFiniteError
from fwl_export.parity.compare import Error, Prediction, PredictionSum, TensorSum
from fwl_export.parity.schedule import ScheduledCall
from fwl_export.runtimes import Session

LOGITS = "logits"

FREE_RUNNING, TEACHER_FORCED = "free", "forced"
MODES = (FREE_RUNNING, TEACHER_FORCED)

# Every call writes these anew: what is wrong after one call may be gone after the next, so they
# are compared after each. Caches and sums remember; they are compared at the comparison points.
_COMPARED_EVERY_CALL = ("position", "pending.")


class RunKey(NamedTuple):
    """A runtime in one of the modes."""

    name: str
    mode: str


@dataclass(frozen=True)
class Failure:
    """A runtime that could not go on.

    Attributes:
      runtime: its name.
      step: number of the call.
      tokens_read: tokens the first row would have read after that call.
      message: what happened.
      kind: "not finite", "shape" of an output, or another "error".
      tensor: "logits" or the name in the state, where it is one tensor's fault.
    """

    runtime: str
    step: int
    tokens_read: int
    message: str
    kind: Literal["not finite", "shape", "error"] = "error"
    tensor: str | None = None


@dataclass
class RunDrift:
    """How far a runtime is from the reference, at one comparison point after the other.

    Attributes:
      tokens_read: tokens the first row had read where the state was compared.
      errors: by tensor, "logits" first, one entry per point. Logits, position and pending tensors
        are compared after every call, and an entry is over all since the point before; the rest
        of the state is compared at the point.
      ulp: histogram of all differences by tensor; none for whole numbers.
      dtypes: of the runtime's tensors.
      predictions: of all calls since the point before.
      failure: why it did not get to the end; None if it did, or stopped by wish.
      stopped: whether it stopped by wish.
    """

    tokens_read: list[int] = field(default_factory=list)
    errors: dict[str, list[Error]] = field(default_factory=dict)
    ulp: dict[str, npt.NDArray[np.int64]] = field(default_factory=dict)
    dtypes: dict[str, str] = field(default_factory=dict)
    predictions: list[Prediction] = field(default_factory=list)
    failure: Failure | None = None
    stopped: bool = False


@dataclass
class Drift:
    """What a run over calls measured.

    Attributes:
      runs: the measurements by runtime and mode.
      failure: of the reference, which ends the run.
      calls: number of calls that the reference made.
      largest_call: the largest T among them.
    """

    runs: dict[RunKey, RunDrift]
    failure: Failure | None = None
    calls: int = 0
    largest_call: int = 0


def measure_drift(
    reference: tuple[str, Session],
    runtimes: Mapping[str, Session],
    calls: Iterable[ScheduledCall],
    limits: Mapping[str, int] | None = None,
    needed: Collection[str] | None = None,
    modes: Collection[str] = MODES,
    advance: Callable[[int], None] = lambda tokens: None,
) -> Drift:
    """Feed every session the same calls and compare logits and states with the reference's.

    A session that raises, or whose output or state has another shape or is not finite, is left
    behind with a `Failure`; the others go on.

    Args:
      reference: name and session of what counts as right.
      runtimes: fresh sessions by name, of as many rows as the calls.
      calls: e.g. those of a `Case`.
      limits: tokens after which a runtime is not asked to go on, by name.
      needed: names of the runtimes without which the run ends; default: all.
      modes: "free", "forced" or both.
      advance: called with the number of tokens the first row has moved, for a progress bar.
    """
    name, session = reference
    runs = [
        _CandidateRun(
            runtime, mode, given if mode == FREE_RUNNING else given.another(given.batch), session
        )
        for runtime, given in runtimes.items()
        for mode in modes
    ]
    drift = Drift({RunKey(run.runtime, run.mode): run.drift for run in runs})
    wanted = set(runtimes if needed is None else needed)
    tokens_read = 0
    # The reference is one call ahead of the runs: they share the cores, and not its state.
    steps = _reference_steps(name, session, calls)
    workers = min(os.cpu_count() or 1, max(len(runs), 1))
    with ThreadPoolExecutor(1) as ahead, ThreadPoolExecutor(workers) as pool:
        upcoming = ahead.submit(next, steps, None)
        while (step := upcoming.result()) is not None:
            call, before, right = step
            going = [run for run in runs if run.going]
            if not wanted & {run.runtime for run in going}:
                break
            if isinstance(right, Failure):
                drift.failure = right
                break
            upcoming = ahead.submit(next, steps, None)
            # Runtimes leave Python's lock while they compute, and no run knows of another.
            list(
                pool.map(
                    partial(_CandidateRun.step, call=call, before=_Casts(before), right=right),
                    going,
                )
            )
            for run in going:
                if call.compare_state and call.tokens_read >= (limits or {}).get(
                    run.runtime, np.inf
                ):
                    run.stop()
            drift.calls += 1
            drift.largest_call = max(drift.largest_call, call.ids.shape[1])
            advance(call.tokens_read - tokens_read)
            tokens_read = call.tokens_read
    return drift


def _reference_steps(
    name: str, session: Session, calls: Iterable[ScheduledCall]
) -> Iterator[tuple[ScheduledCall, State, _Output | Failure]]:
    """Yield each call, the state before it, and what the reference makes of it."""
    before = session.state
    for call in calls:
        if call.reset:
            session.reset(call.reset)
            before = session.state
        right = _feed(name, session, call, keep=True)
        yield call, before, right
        if isinstance(right, Failure):
            return
        before = right.state


class _Output(NamedTuple):
    """What one call of one session returned: logits [B, T, V] and the state after it."""

    logits: Array
    state: State


class _Casts:
    """A state in other types, each computed once."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._done: dict[tuple[str, str], Array] = {}

    def to(self, session: Session) -> State:
        return {spec.name: self._cast(spec.name, spec.dtype) for spec in session.specs}

    def _cast(self, name: str, dtype: str) -> Array:
        if (name, dtype) not in self._done:
            with np.errstate(over="ignore"):  # float16's infinity is told as a failure
                self._done[name, dtype] = self._state[name].astype(dtype, copy=False)
        return self._done[name, dtype]


class _CandidateRun:
    """One runtime in one mode, and what its differences add up to since the last point."""

    def __init__(self, runtime: str, mode: str, session: Session, reference: Session) -> None:
        self.runtime, self.mode = runtime, mode
        self.session = session
        self.drift = RunDrift()
        self.going = True
        self._sums: _Sums | None = None
        if wrong := _other_state(session, reference):
            self._fail(Failure(runtime, 0, 0, wrong, "shape"))
        self.drift.dtypes = {spec.name: spec.dtype for spec in session.specs}

    def step(self, call: ScheduledCall, before: _Casts, right: _Output) -> None:
        found = self._feed(call, before)
        if isinstance(found, Failure):
            self._fail(found)
            return
        self.drift.dtypes[LOGITS] = str(found.logits.dtype)
        self._sums = self._sums or _Sums(self.session)
        self._sums.add(found, right, call)
        if call.compare_state:
            self._sums.finish(self.drift)
            self.drift.tokens_read.append(call.tokens_read)
            self._sums = None

    def stop(self) -> None:
        self.drift.stopped = self.going
        self.going = False

    def _feed(self, call: ScheduledCall, before: _Casts) -> _Output | Failure:
        if self.mode == FREE_RUNNING:
            if call.reset:
                self.session.reset(call.reset)
            return _feed(self.runtime, self.session, call)
        state = before.to(self.session)
        if wrong := _not_finite(state):
            tensor, message = wrong
            message = f"{message}: the reference's value is beyond {state[tensor].dtype}"
            return Failure(self.runtime, call.step, call.tokens_read, message, "not finite", tensor)
        try:
            self.session.write_rows(range(self.session.batch), state)
        except Exception as error:  # a runtime may raise anything; the others go on without it
            return Failure(self.runtime, call.step, call.tokens_read, _text(error))
        return _feed(self.runtime, self.session, call)

    def _fail(self, failure: Failure) -> None:
        self.drift.failure = failure
        self.going = False


class _Sums:
    def __init__(self, session: Session) -> None:
        names = [LOGITS, *(spec.name for spec in session.specs)]
        self._tensors = {name: TensorSum(session.batch) for name in names}
        self._predictions = PredictionSum()

    def add(self, candidate: _Output, reference: _Output, call: ScheduledCall) -> None:
        at = (call.step, call.tokens_read)
        for row, length in enumerate(call.lengths):
            real = (row, slice(0, int(length)))
            found, expected = candidate.logits[real], reference.logits[real]
            place = int(call.positions[row])
            self._tensors[LOGITS].add(row, found, expected, *at, offset=place)
            self._predictions.add(found, expected, call.labels[real])
            for name, tensor in reference.state.items():
                if call.compare_state or name.startswith(_COMPARED_EVERY_CALL):
                    self._tensors[name].add(row, candidate.state[name][row], tensor[row], *at)

    def finish(self, drift: RunDrift) -> None:
        for name, total in self._tensors.items():
            drift.errors.setdefault(name, []).append(total.result())
            if total.ulp is not None:
                drift.ulp[name] = drift.ulp.get(name, 0) + total.ulp
        drift.predictions.append(self._predictions.result())


def _other_state(session: Session, reference: Session) -> str:
    """Return in what the state of a session differs from the reference's, or ""."""
    found, expected = (
        {spec.name: (s.batch, *spec.shape) for spec in s.specs} for s in (session, reference)
    )
    if found == expected:
        return ""
    name = next(n for n in {**expected, **found} if found.get(n) != expected.get(n))
    return (
        f"state '{name}' is {found.get(name)}, but {expected.get(name)} in the reference; "
        "compare runtimes of one bundle"
    )


def _feed(
    name: str, session: Session, call: ScheduledCall, keep: bool = False
) -> _Output | Failure:
    """Return what a session made of a call, or what went wrong.

    Args:
      name: of the runtime.
      session: which reads it.
      call: what it reads.
      keep: the state outlives the session's next call.
    """
    at = (name, call.step, call.tokens_read)
    try:
        session.learning_rate_scale = call.scale
        logits = session.feed(call.ids, call.weights, call.lengths)
        output = _Output(logits, session.state if keep else session.peek())
    except NotFiniteError as error:
        return Failure(*at, str(error), "not finite", LOGITS)
    except Exception as error:  # a runtime may raise anything; the others go on without it
        return Failure(*at, _text(error))
    shapes = {LOGITS: (*call.ids.shape, session.vocab_size)}
    shapes |= {spec.name: (session.batch, *spec.shape) for spec in session.specs}
    for tensor, expected in shapes.items():
        array = output.logits if tensor == LOGITS else output.state[tensor]
        if array.shape != expected:
            message = f"{tensor} has shape {list(array.shape)}; expected {list(expected)}"
            return Failure(*at, message, "shape", tensor)
    if wrong := _not_finite(output.state):
        return Failure(*at, wrong[1], "not finite", wrong[0])
    return output


def _text(error: Exception) -> str:
    return str(error) or type(error).__name__


def _not_finite(state: State) -> tuple[str, str] | None:
    """Return the first tensor of a state that is not finite, and a sentence about it."""
    for name, array in state.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            row, *index = np.argwhere(~np.isfinite(array))[0].tolist()
            value = array[(row, *index)]
            return name, f"state '{name}' is {value} in row {row}, element {index}"
    return None
