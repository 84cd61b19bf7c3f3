"""Drive sessions side by side over calls and measure how far they are from a reference.

Free-running (mode "free"), a session carries its own state from the first call to the last, so an
error in one call affects everything after it. Teacher-forced (mode "forced"), a second session of
the same runtime is given the reference's state before every call, so only the error of a single
step remains. Both are measured in one pass, and only running statistics are kept.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Final, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from fwl_export.bundle.state import Array, State, TensorSpec
from fwl_export.errors import NotFiniteError
from fwl_export.parity.compare import Error, Prediction, PredictionSum, TensorSum
from fwl_export.parity.schedule import ScheduledCall
from fwl_export.runtimes import Session

LOGITS = "logits"

FREE_RUNNING, TEACHER_FORCED = "free", "forced"
MODES = (FREE_RUNNING, TEACHER_FORCED)
NOT_FINITE: Final = "not finite"  # kind of a failure
MODE_NAMES = {FREE_RUNNING: "free-running", TEACHER_FORCED: "teacher-forced"}

# Every call overwrites these tensors, so an error may be gone after the next call: they are
# compared after each. Caches and fast weights persist; they are compared at the comparison points.
COMPARED_EVERY_CALL = ("position", "pending.")


class RunKey(NamedTuple):
    """Name of a session, and the mode it runs in."""

    name: str
    mode: str


@dataclass(frozen=True)
class Failure:
    """Why a session failed.

    Attributes:
      runtime: Name of the session.
      step: Number of the call that failed.
      tokens_read: Tokens the first row would have read after that call.
      message: Description of what happened.
      kind: Kind of failure: "not finite", "not repeatable", wrong "shape" of an output, or any
        other "error".
      tensor: Name of the tensor at fault ("logits" or a state tensor), or None.
      row: Row at fault, or None if it is not known.
      token: Tokens that the row had read before the one at fault, or None.
      token_in_call: Index of that token in the call, or None.
      token_id: Id of that token, or None.
      token_text: Text of that token; "" if it is not known.
    """

    runtime: str
    step: int
    tokens_read: int
    message: str
    kind: Literal["not finite", "not repeatable", "shape", "error"] = "error"
    tensor: str | None = None
    row: int | None = None
    token: int | None = None
    token_in_call: int | None = None
    token_id: int | None = None
    token_text: str = ""

    @property
    def is_not_finite(self) -> bool:
        """Whether a value was NaN or infinite."""
        return self.kind == NOT_FINITE

    @property
    def place(self) -> str:
        """Where a value was not finite, in words."""
        if self.token is None:
            return f"not finite up to token {self.tokens_read}"
        text = f", text {self.token_text!r}" if self.token_text else ""
        return f"not finite at token {self.token} of row {self.row} (id {self.token_id}{text})"

    @property
    def brief_place(self) -> str:
        """Where a value was not finite, in 40 columns at most."""
        if self.token is None:
            return f"up to token {self.tokens_read}"
        shown = repr(self.token_text[:8]) if self.token_text else f"id {self.token_id}"
        return f"at token {self.token} of row {self.row} ({shown})"

    @property
    def sentence(self) -> str:
        """What happened, with the place if it is known."""
        return self.message if self.token is None else f"{self.place}: {self.message}"


@dataclass
class RunDrift:
    """How far a session is from the reference, at each comparison point.

    Attributes:
      tokens_read: Tokens the first row had read at each point.
      errors: Errors by tensor, "logits" first, one per point. Logits, position and pending tensors
        are compared after every call, and an error covers all calls since the previous point. The
        rest of the state is compared at the point only.
      ulp: Histogram of all differences by tensor, see `ulp_histogram`. Integers have none.
      dtypes: Dtypes of the session's tensors by name.
      predictions: Distance of the predictions since the previous point, one per point.
      failure: Why it did not get to the end; None if it did, or stopped at its limit.
      stopped: Whether it stopped at the limit the user set.
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
    """Measurements of all sessions over the same calls.

    Attributes:
      runs: Measurements by session and mode.
      failure: Failure of the reference, which ends the measurement, or None.
      calls: Number of calls that the reference made.
      largest_call: Largest T of those calls.
    """

    runs: dict[RunKey, RunDrift]
    failure: Failure | None = None
    calls: int = 0
    largest_call: int = 0


def measure_drift(
    reference: tuple[str, Session],
    sessions: Mapping[str, Session],
    calls: Iterable[ScheduledCall],
    limits: Mapping[str, int] | None = None,
    needed: Collection[str] | None = None,
    modes: Collection[str] = MODES,
    advance: Callable[[int], None] = lambda tokens: None,
    observe: Callable[[ScheduledCall, Sequence[int]], None] = lambda call, before: None,
    keep: Callable[[ScheduledCall, Output], None] = lambda call, output: None,
    taking_turns: bool = False,
) -> Drift:
    """Feed every session the same calls and compare its logits and states with the reference's.

    A session that raises, or whose output has the wrong shape or is not finite, drops out with a
    `Failure`; the others continue.

    Args:
      reference: Name and session of the reference, whose results count as correct.
      sessions: Fresh sessions by name, with as many rows as the calls.
      calls: Calls to make, for example those of a `Case`.
      limits: Tokens after which a session stops, by its name.
      needed: Names of the sessions of which one at least must be running; default: all.
      modes: Modes to measure: "free", "forced" or both.
      advance: Called with the number of tokens that the first row has moved on.
      observe: Called with every call that was made, and the tokens that each row had read before.
      keep: Called with every call and the reference's output.
      taking_turns: Whether the two modes of a session take turns, which needs less memory.
    """
    runs = [
        _CandidateRun(RunKey(name, mode), session, reference[1], taking_turns)
        for name, session in sessions.items()
        for mode in modes
    ]
    drift = Drift({run.key: run.drift for run in runs})
    wanted = set(sessions if needed is None else needed)
    tokens_read = 0
    # The reference computes one call ahead: it shares the cores with the runs, but no state.
    steps = _reference_steps(*reference, calls, (limits or {}).values())
    workers = 1 if taking_turns else min(os.cpu_count() or 1, max(len(runs), 1))
    with ThreadPoolExecutor(1) as ahead, ThreadPoolExecutor(workers) as pool:
        upcoming = ahead.submit(next, steps, None)
        while (step := upcoming.result()) is not None:
            call, before, positions, right = step
            going = [run for run in runs if run.going]
            if not wanted & {run.key.name for run in going}:
                break
            if isinstance(right, Failure):
                drift.failure = right
                break
            upcoming = ahead.submit(next, steps, None)
            keep(call, right)
            # Runtimes release the GIL while they compute, and the runs share nothing.
            step_of = partial(_CandidateRun.step, call=call, before=_Casts(before), right=right)
            list(pool.map(step_of, going))
            for run in going:
                limit = (limits or {}).get(run.key.name, np.inf)
                if call.compare_state and call.tokens_read >= limit:
                    run.stop()
            observe(call, positions)
            drift.calls += 1
            drift.largest_call = max(drift.largest_call, call.ids.shape[1])
            advance(call.tokens_read - tokens_read)
            tokens_read = call.tokens_read
    return drift


def _reference_steps(
    name: str, session: Session, calls: Iterable[ScheduledCall], stops: Collection[int]
) -> Iterator[tuple[ScheduledCall, State, list[int], Output | Failure]]:
    """Yield each call, the state and the positions before it, and the output or failure.

    The state is empty where teacher-forced sessions do not make the call. A call after which a
    session stops is compared.
    """
    for planned in calls:
        stops = [stop for stop in stops if stop > 0]
        ends = any(planned.tokens_read >= stop for stop in stops)
        call = replace(planned, compare_state=True, forced=True) if ends else planned
        stops = [stop for stop in stops if planned.tokens_read < stop]
        call.prepare(session)
        before, positions = session.state if call.forced else {}, session.positions
        right = _feed(name, session, call, keep=True)
        yield call, before, positions, right
        if isinstance(right, Failure):
            return


class Output(NamedTuple):
    """What a call returned.

    Attributes:
      logits: Logits, [B, P, V].
      state: State after it, or the part to compare.
    """

    logits: Array
    state: State


class _Casts:
    """A state in the dtypes of several sessions; each cast is computed once."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._done: dict[tuple[str, str], Array] = {}

    def to(self, session: Session) -> State:
        """Return the state in the dtypes of a session."""
        longer = [s for s in session.specs if self._state[s.name].shape[1:] != s.shape]
        if longer and (longer[0].name, longer[0].dtype) not in self._done:
            self._pad(longer)
        return {spec.name: self._cast(spec) for spec in session.specs}

    def _cast(self, spec: TensorSpec) -> Array:
        key = (spec.name, spec.dtype)
        if key not in self._done:
            with np.errstate(over="ignore"):  # an infinity in float16 is reported as a failure
                self._done[key] = self._state[spec.name].astype(spec.dtype, copy=False)
        return self._done[key]

    def _pad(self, specs: Sequence[TensorSpec]) -> None:
        """Cast tensors of which the reference has the first slots only; the others are empty."""
        rows = len(self._state[specs[0].name])
        # Mapped, and not NumPy's: its pages take memory only where they are written.
        size = sum(rows * spec.bytes_per_row for spec in specs)
        private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if os.name == "posix" else {}
        block = np.frombuffer(mmap.mmap(-1, size, **private), np.uint8)
        at = 0
        for spec in specs:
            end = at + rows * spec.bytes_per_row
            whole = block[at:end].view(spec.dtype).reshape(rows, *spec.shape)
            array = self._state[spec.name]
            with np.errstate(over="ignore"):  # as in `_cast`
                whole[_part(array)] = array
            self._done[spec.name, spec.dtype] = whole
            at = end


class _CandidateRun:
    """One session in one mode, driven through the calls, and its measurements."""

    def __init__(
        self, key: RunKey, session: Session, reference: Session, taking_turns: bool = False
    ) -> None:
        self.key = key
        if key.mode == TEACHER_FORCED:  # each mode has its own state
            session = session.taking_turns() if taking_turns else session.another(session.batch)
        self.session = session
        self.drift = RunDrift()
        self.going = True
        self._sums: _Sums | None = None
        self._last: tuple[Array, Array] | None = None  # logits of the call before, and a copy
        if wrong := _other_state(session, reference):
            self._fail(Failure(key.name, 0, 0, wrong, "shape"))
        self.drift.dtypes = {spec.name: spec.dtype for spec in session.specs}

    def step(self, call: ScheduledCall, before: _Casts, right: Output) -> None:
        """Make a call and compare its output.

        Args:
          call: Call to make.
          before: Reference's state before the call.
          right: Reference's output of the call.
        """
        if self.key.mode == TEACHER_FORCED and not call.forced:
            return
        found = self._feed(call, before)
        if isinstance(found, Failure):
            self._fail(found)
            return
        if self._last and not np.array_equal(*self._last):
            message = "it has changed the logits that the call before returned"
            at = (self.key.name, call.step, call.tokens_read)
            self._fail(Failure(*at, message, "not repeatable", LOGITS))
            return
        self._last = found.logits, found.logits.copy()
        self.drift.dtypes[LOGITS] = str(found.logits.dtype)
        self._sums = self._sums or _Sums(self.session)
        self._sums.add(found, right, call)
        if call.compare_state:
            self._sums.finish(self.drift)
            self.drift.tokens_read.append(call.tokens_read)
            self._sums = None

    def stop(self) -> None:
        """Stop at the limit the user set."""
        self.drift.stopped = self.going
        self.going = False

    def _feed(self, call: ScheduledCall, before: _Casts) -> Output | Failure:
        if self.key.mode == FREE_RUNNING:
            try:
                call.prepare(self.session)
            except Exception as error:  # runtimes raise exceptions of any type
                return Failure(self.key.name, call.step, call.tokens_read, _text(error))
            return _feed(self.key.name, self.session, call)
        state = before.to(self.session)
        if wrong := _not_finite(state):
            kind = state[wrong.tensor].dtype
            message = f"{wrong.message}: the reference's value is too large for {kind}"
            at = (self.key.name, call.step, call.tokens_read)
            return Failure(*at, message, NOT_FINITE, wrong.tensor, wrong.row)
        try:
            self.session.write_rows(range(self.session.batch), state)
        except Exception as error:  # runtimes raise exceptions of any type; the others continue
            return Failure(self.key.name, call.step, call.tokens_read, _text(error))
        return _feed(self.key.name, self.session, call)

    def _fail(self, failure: Failure) -> None:
        self.drift.failure = failure
        self.going = False


class _Sums:
    """The statistics of one run since the previous comparison point."""

    def __init__(self, session: Session) -> None:
        names = [LOGITS, *(spec.name for spec in session.specs)]
        self._tensors = {name: TensorSum(session.batch) for name in names}
        self._predictions = PredictionSum()

    def add(self, candidate: Output, reference: Output, call: ScheduledCall) -> None:
        """Add the differences of one call."""
        at = (call.step, call.tokens_read)
        for row, (length, wanted) in enumerate(zip(call.lengths, call.wanted, strict=True)):
            real = wanted < length
            places = wanted[real]
            found, expected = candidate.logits[row][real], reference.logits[row][real]
            self._tensors[LOGITS].add(
                row, found, expected, *at, places=places + int(call.positions[row])
            )
            self._predictions.add(found, expected, call.labels[row, places])
            for name, tensor in reference.state.items():
                if _is_compared(name, call):
                    found = candidate.state[name][row]
                    _add(self._tensors[name], row, found, tensor[row], at)

    def finish(self, drift: RunDrift) -> None:
        """Append the statistics to the drift of the run."""
        for name, total in self._tensors.items():
            drift.errors.setdefault(name, []).append(total.result())
            if total.ulp is not None:
                drift.ulp[name] = drift.ulp.get(name, 0) + total.ulp
        drift.predictions.append(self._predictions.result())


def _add(total: TensorSum, row: int, found: Array, expected: Array, at: tuple[int, int]) -> None:
    """Compare a row of a state tensor, of which the reference may have the first slots only."""
    if found.shape != expected.shape:
        part = _part(expected)
        rest = found[:, expected.shape[1] :]
        if rest.any():  # a slot that should be empty
            whole = np.zeros(found.shape, expected.dtype)
            whole[part] = expected
            expected = whole
        else:
            total.add_equal(rest.size)
            found = found[part]
    total.add(row, found, expected, *at)


def _part(array: Array) -> tuple[slice, ...]:
    """Return the index of the first elements, as many as an array has, in a larger array."""
    return tuple(slice(0, size) for size in array.shape)


def _is_compared(tensor: str, call: ScheduledCall) -> bool:
    return call.compare_state or tensor.startswith(COMPARED_EVERY_CALL)


def _other_state(session: Session, reference: Session) -> str:
    """Return how the state tensors of a session differ from the reference's, or ""."""
    found, expected = (
        {spec.name: (s.batch, *spec.shape) for spec in s.specs} for s in (session, reference)
    )
    # A reference for short texts has fewer slots in its ring buffers.
    wrong = (n for n in {**expected, **found} if not _fits(n, found.get(n), expected.get(n)))
    name = next(wrong, None)
    if name is None:
        return ""
    return (
        f"state '{name}' has shape {found.get(name)}, but {expected.get(name)} in the reference; "
        "compare runtimes of the same bundle"
    )


def _fits(name: str, found: tuple[int, ...] | None, expected: tuple[int, ...] | None) -> bool:
    if found == expected or found is None or expected is None or not name.startswith("cache."):
        return found == expected
    return found[:2] + found[3:] == expected[:2] + expected[3:] and found[2] > expected[2]


def _feed(name: str, session: Session, call: ScheduledCall, keep: bool = False) -> Output | Failure:
    """Return the output of a session for a call, or its failure.

    Args:
      name: Name of the session.
      session: Session that makes the call.
      call: Call to make.
      keep: Whether to copy what is compared of the state, so that it outlives the next call.
    """
    at = (name, call.step, call.tokens_read)
    try:
        logits = call.feed(session)
        output = Output(logits, session.peek())
    except NotFiniteError as error:
        return _where(
            Failure(*at, error.cause or str(error), NOT_FINITE, error.tensor), call, error
        )
    except Exception as error:  # runtimes raise exceptions of any type; the others continue
        return Failure(*at, _text(error))
    shapes = {LOGITS: (*call.wanted.shape, session.vocab_size)}
    shapes |= {spec.name: (session.batch, *spec.shape) for spec in session.specs}
    for tensor, expected in shapes.items():
        array = output.logits if tensor == LOGITS else output.state[tensor]
        if array.shape != expected:
            message = f"{tensor} has shape {list(array.shape)}; expected {list(expected)}"
            return Failure(*at, message, "shape", tensor)
    if wrong := _not_finite(output.state):
        return Failure(*at, wrong.message, NOT_FINITE, wrong.tensor, wrong.row)
    if keep:
        kept = {n: array.copy() for n, array in output.state.items() if _is_compared(n, call)}
        return Output(logits, kept)
    return output


def output_of(name: str, session: Session, call: ScheduledCall) -> Output | Failure:
    """Prepare the rows of a session for a call, and make it; returns the output or the failure.

    Args:
      name: Name of the session.
      session: Session that makes the call.
      call: Call to make.
    """
    try:
        call.prepare(session)
    except Exception as error:  # runtimes raise exceptions of any type
        return Failure(name, call.step, call.tokens_read, _text(error))
    return _feed(name, session, call)


def _text(error: Exception) -> str:
    return str(error) or type(error).__name__


def _where(failure: Failure, call: ScheduledCall, error: NotFiniteError) -> Failure:
    """Return the failure with the row and token that an error names."""
    if error.row is None or error.token is None:
        return failure
    return replace(
        failure,
        row=error.row,
        token=error.position,
        token_in_call=error.token,
        token_id=int(call.ids[error.row, error.token]),
    )


class _NotFinite(NamedTuple):
    tensor: str
    row: int
    message: str


def _not_finite(state: State) -> _NotFinite | None:
    """Return the first state tensor that is not finite, and where."""
    for name, array in state.items():
        # A sum is not finite if a term is not, and is taken at a fraction of the cost.
        wide = np.float64 if array.dtype.itemsize > 4 else np.float32
        with np.errstate(over="ignore", invalid="ignore"):
            suspect = array.dtype.kind == "f" and not np.isfinite(array.sum(dtype=wide))
        if suspect and not np.isfinite(array).all():
            row, *index = np.argwhere(~np.isfinite(array))[0].tolist()
            value = array[(row, *index)]
            message = f"state '{name}' is {value} in row {row}, element {index}"
            return _NotFinite(name, row, message)
    return None
