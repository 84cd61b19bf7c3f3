"""Check a bundle against a recorded trace. PyTorch is not imported.

Each candidate makes the recorded calls with its own state. Its error at a comparison point is taken
from what the trace holds: the largest difference over the stored elements; and, relative to the
norm of the tensor, the larger one of their difference's norm and the difference of the norms. Both
are at most the errors that `check` measures, with the same budgets: what passes there passes here.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from typing import Any

import numpy as np

from fwl_export.bundle.config import different_key
from fwl_export.bundle.manifest import Bundle, Manifest
from fwl_export.bundle.state import Array
from fwl_export.errors import ReportError, ShapeError
from fwl_export.json_files import shown
from fwl_export.parity.candidates import REFERENCE, Candidate, parse_candidates, twin
from fwl_export.parity.cases import CASES, ModelLimits
from fwl_export.parity.check import default_candidates, environment, paths_of
from fwl_export.parity.compare import Error, Place, PredictionSum
from fwl_export.parity.coverage import Coverage
from fwl_export.parity.drift import (
    FREE_RUNNING,
    LOGITS,
    Drift,
    Failure,
    Output,
    RunDrift,
    RunKey,
    output_of,
)
from fwl_export.parity.report.data import CaseRun, Report
from fwl_export.parity.report.worst_place import worst_place
from fwl_export.parity.schedule import ScheduledCall
from fwl_export.parity.tolerances import Tolerance, changed_table
from fwl_export.parity.trace import Norms, Trace, TracedCase, sample_places, sampled
from fwl_export.parity.verdict import CandidateVerdict, RunVerdict, judge
from fwl_export.runtimes import Session

_OWN = "PyTorch"


def check_against(
    bundle: Bundle,
    trace: Trace,
    candidates: str | Sequence[str | Candidate] | None = None,
    *,
    strict: bool = False,
    tolerances: Mapping[str, Any] | None = None,
    name: str = "",
    threads: int = 1,
    decode: Callable[[int], str] | None = None,
    command: str = "",
    advance: Callable[[int], None] = lambda tokens: None,
) -> Report:
    """Make the calls of a trace in every candidate and judge how far each is from float64.

    Args:
      bundle: Bundle of the model that the trace is of.
      trace: Trace, from `read_trace`.
      candidates: Names of runtimes, as in `check_bundle`, in the bundle's precision.
      strict: Whether to halve every budget.
      tolerances: Changes to the table of tolerances, see `changed_table`.
      name: Name of the trace, for the report.
      threads: Threads per runtime.
      decode: Function that returns the text of a token id, for the report.
      command: Shell command that repeats the check, for the report.
      advance: Called with the number of tokens that the first row has moved on, in each case.

    Raises:
      BundleError: The bundle is incomplete or changed.
      ReportError: The trace is of another model, or of a bundle with calls of another size.
      ConfigError: A name or a tolerance is unknown.
    """
    began = time.perf_counter()
    check_origin(bundle.manifest, trace, name)
    table = changed_table(tolerances or {}, strict)
    bundle.model_files()
    coverage = Coverage(ModelLimits.of(bundle.manifest), threads=[str(threads)])
    named = parse_candidates(default_candidates() if candidates is None else candidates)
    lineup = [_open(bundle, each, named, threads) for each in named]
    for traced in trace.cases:
        runs = _run_case(lineup, traced, trace, table, coverage)
        _count(traced, coverage)
        for entry, run in zip(lineup, runs, strict=True):
            entry.runs += [run] if run else []
        advance(traced.case.tokens)
    verdicts = [entry.verdict(bundle) for entry in lineup]
    coverage.paths = paths_of(entry.runtime for entry in lineup if entry.session)
    _say_what_is_left_out(trace, coverage)
    calls = {traced.case.name: traced.calls for traced in trace.cases}
    return Report(
        bundle=bundle.folder.resolve().name,
        model_id=bundle.manifest.model_id,
        precision=bundle.manifest.precision,
        max_tokens=bundle.manifest.max_tokens,
        text=f"{trace.text}, recorded in {name}",
        ids=[],
        tokens=trace.tokens,
        seed=trace.seed,
        reference=REFERENCE,
        strict=strict,
        changed_tolerances=dict(tolerances or {}),
        table=table,
        horizon_tokens=trace.horizon_tokens,
        cases=[CaseRun(t.case, len(t.calls), _largest(t.calls)) for t in trace.cases],
        candidates=verdicts,
        worst=[worst_place(verdict, calls, decode) for verdict in verdicts],
        coverage=coverage.to_dict(),
        baseline=None,
        environment=environment(threads),
        command=command,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        seconds=time.perf_counter() - began,
    )


def check_origin(manifest: Manifest, trace: Trace, name: str) -> None:
    """Check that a trace is of a bundle's model.

    Args:
      manifest: Manifest of the bundle.
      trace: The trace.
      name: Name of the trace in the error message.

    Raises:
      ReportError: It is of another model, precision or size of calls; the message names which.
    """
    remedy = "give the trace of this bundle's model"
    if difference := different_key(trace.config, manifest.config):
        key, theirs, ours = difference
        raise ReportError(
            f"trace '{name}' is of another model: {key} is {shown(theirs)}, but {shown(ours)} in "
            f"the bundle; {remedy}"
        )
    if trace.precision != manifest.precision:
        raise ReportError(
            f"trace '{name}' was recorded for a bundle in {trace.precision}, but this one is in "
            f"{manifest.precision}, which has other budgets; {remedy}"
        )
    if trace.model_id != manifest.model_id:
        raise ReportError(
            f"trace '{name}' is of the model {trace.model_id[:12]}…, but this bundle has the model "
            f"{manifest.model_id[:12]}…, of the same sizes with other weights; {remedy}"
        )
    if trace.max_tokens != manifest.max_tokens or list(trace.state) != list(manifest.state):
        raise ReportError(
            f"trace '{name}' was recorded for calls of up to {trace.max_tokens} tokens, but this "
            f"bundle takes {manifest.max_tokens}, with a state of another size; record it with a "
            "bundle that was exported with the same --max-tokens"
        )


@dataclass
class _Entry:
    """A candidate, its session or why there is none, and the verdicts so far."""

    candidate: Candidate
    runtime: str = ""
    session: Session | None = None
    reason: str | None = None
    runs: list[RunVerdict] = field(default_factory=list)

    def verdict(self, bundle: Bundle) -> CandidateVerdict:
        named = self.candidate
        precision = named.precision(bundle)
        return CandidateVerdict(
            named.name, precision, self.runs, self.runtime, named.tokens, self.reason
        )


def _open(bundle: Bundle, candidate: Candidate, named: list[Candidate], threads: int) -> _Entry:
    precision = candidate.precision(bundle)
    reason = twin(candidate, named)
    if precision != bundle.manifest.precision:
        reason = f"the trace has budgets for {bundle.manifest.precision}, not for {precision}"
    if reason:
        return _Entry(candidate, reason=reason)
    try:
        session = candidate.open(bundle, 1, threads)
        return _Entry(candidate, candidate.describe(), session)
    except Exception as error:  # runtimes raise exceptions of any type; the others continue
        return _Entry(candidate, reason=str(error) or type(error).__name__)


def _run_case(
    lineup: Sequence[_Entry],
    traced: TracedCase,
    trace: Trace,
    table: Sequence[Tolerance],
    coverage: Coverage,
) -> list[RunVerdict | None]:
    """Return the verdict of each candidate in a case, or None where it has no session for it."""
    verdicts: list[RunVerdict | None] = []
    for entry in lineup:
        verdicts.append(None)
        if entry.session is None:
            continue
        try:
            session = entry.session.another(traced.case.rows)
        except ShapeError as error:
            name = entry.candidate.name
            coverage.left_out.append(f"case {traced.case.name} of {name}: {error}")
            continue
        verdicts[-1] = _judged(
            _Replay(entry.candidate, session, traced).run(), traced, trace, table
        )
    return verdicts


def _judged(
    found: RunDrift, traced: TracedCase, trace: Trace, table: Sequence[Tolerance]
) -> RunVerdict:
    key = RunKey("candidate", FREE_RUNNING)
    measured = Drift({key: found}, None, len(traced.calls), _largest(traced.calls))
    own = Drift({RunKey(_OWN, FREE_RUNNING): traced.own})
    name, horizon = traced.case.name, trace.horizon_tokens
    return judge(name, measured, key, own, _OWN, trace.precision, horizon, table)


class _Replay:
    """One candidate, driven through the calls of a case, and its measurements."""

    def __init__(self, candidate: Candidate, session: Session, traced: TracedCase) -> None:
        self._candidate, self._session, self._traced = candidate, session, traced
        self._drift = RunDrift()
        self._drift.dtypes = {spec.name: spec.dtype for spec in session.specs}
        self._since = Norms()
        self._start_point()

    def _start_point(self) -> None:
        self._logits = _Differences()
        self._predictions = PredictionSum()

    def run(self) -> RunDrift:
        """Make all calls, or those before the candidate fails or stops; returns the errors."""
        traced, limit = self._traced, self._candidate.tokens
        points = 0
        for call in traced.calls:
            output = output_of(self._candidate.name, self._session, call)
            if isinstance(output, Failure):
                self._drift.failure = output
                break
            self._drift.dtypes[LOGITS] = str(output.logits.dtype)
            self._add_logits(call, output)
            if call.compare_state:
                self._add_point(points, call, output)
                points += 1
                if limit and call.tokens_read >= limit:
                    self._drift.stopped = True
                    break
        return self._drift

    def _add_logits(self, call: ScheduledCall, output: Output) -> None:
        traced = self._traced
        self._since.add(call, output.logits, output.state)
        for index in np.flatnonzero(traced.picks[:, 0] == call.step):
            _, row, wanted = (int(n) for n in traced.picks[index])
            found, right = output.logits[row, wanted], traced.logits[index]
            place = int(call.positions[row] + call.wanted[row, wanted])
            self._logits.add(row, found, right, call, partial(_token_at, place))
            self._predictions.add(found[None], right[None], traced.labels[index : index + 1])

    def _add_point(self, number: int, call: ScheduledCall, output: Output) -> None:
        traced, drift = self._traced, self._drift
        norms = self._since.take()
        errors = {LOGITS: self._logits.error(norms[LOGITS], traced.norms[LOGITS][number])}
        is_last = number == len(traced.norms[LOGITS]) - 1
        for name, array in output.state.items():
            differences = _Differences()
            places = sample_places((len(array), array[0].size), is_last)
            for row, found in enumerate(sampled(array, is_last)):
                right = traced.samples[name][number][row]
                shape = array.shape[1:]
                differences.add(row, found, right, call, _index_in(shape, places))
            errors[name] = differences.error(norms[name], traced.norms[name][number])
        for name, error in errors.items():
            drift.errors.setdefault(name, []).append(error)
        drift.tokens_read.append(call.tokens_read)
        drift.predictions.append(self._predictions.result())
        self._start_point()


class _Differences:
    """Differences of one tensor at stored elements, row by row."""

    def __init__(self) -> None:
        self._squares: dict[int, float] = {}
        self._worst: Place | None = None
        self._largest = -1.0
        self._scale = 0.0

    def add(
        self,
        row: int,
        found: Array,
        right: Array,
        call: ScheduledCall,
        index: Callable[[int], tuple[int, ...]],
    ) -> None:
        """Compare some elements of a row.

        Args:
          row: Index of the row.
          found: Values of the candidate, [k].
          right: Values of the trace, [k].
          call: Call that returned them.
          index: Function that returns the index of element n of these.
        """
        difference = np.abs(found.astype(np.float64) - right)
        self._squares[row] = self._squares.get(row, 0.0) + float(np.vdot(difference, difference))
        self._scale = max(self._scale, float(np.abs(right).max(initial=0.0)))
        n = int(np.argmax(difference))
        if difference[n] > self._largest:
            self._largest = float(difference[n])
            place = (row, *index(n))
            values = float(found[n]), float(right[n])
            self._worst = Place(call.step, call.tokens_read, place, *values)

    def error(self, found: Array, right: Array) -> Error:
        """Return the error.

        Args:
          found: Norm of each row of the candidate's whole tensor, [B].
          right: Norm of each row of float64's, [B].
        """
        rest = [np.sqrt(self._squares.get(row, 0.0)) for row in range(len(right))]
        difference = np.maximum(np.abs(found - right), rest)
        with np.errstate(divide="ignore", invalid="ignore"):
            ratios = np.where(difference == 0, 0.0, difference / right)
        return Error(max(self._largest, 0.0), float(ratios.max()), self._scale, self._worst)


def _token_at(place: int, token: int) -> tuple[int, ...]:
    return place, token


def _index_in(shape: tuple[int, ...], places: Array) -> Callable[[int], tuple[int, ...]]:
    return lambda n: tuple(int(i) for i in np.unravel_index(places[n], shape)) if shape else ()


def _count(traced: TracedCase, coverage: Coverage) -> None:
    """Count the calls of a case, following the positions of its rows."""
    positions = np.zeros(traced.case.rows, np.int64)
    for call in traced.calls:
        positions[list(call.reset)] = 0
        for start, target in call.forks:
            positions[target] = positions[start]
        for row, position in call.moves:
            positions[row] = position
        coverage.add(call, positions.tolist())
        positions += call.lengths


def _say_what_is_left_out(trace: Trace, coverage: Coverage) -> None:
    recorded = {traced.case.name for traced in trace.cases}
    coverage.left_out.append("teacher-forced calls, which need the state of every call")
    if missing := [case.name for case in CASES if case.name not in recorded]:
        coverage.left_out.append(f"cases {', '.join(missing)}")


def _largest(calls: Sequence[ScheduledCall]) -> int:
    return max(call.ids.shape[1] for call in calls)
