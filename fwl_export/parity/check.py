"""Check a bundle: make the same calls in all candidates and judge them against a reference."""

from __future__ import annotations

import logging
import math
import os
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from typing import Any, NamedTuple, cast

from fwl_export.bundle.manifest import CHECKPOINT_FOLDER, WEIGHTS_FILE, Bundle
from fwl_export.bundle.state import Array
from fwl_export.errors import ShapeError
from fwl_export.machine import installed_versions, processor_name, release_memory
from fwl_export.parity.candidates import (
    REFERENCE,
    Candidate,
    parse_candidate,
    parse_candidates,
    twin,
)
from fwl_export.parity.cases import (
    AGAIN,
    CASES,
    LONGEST_CASE,
    Case,
    ModelLimits,
    choose_cases,
)
from fwl_export.parity.coverage import Coverage
from fwl_export.parity.drift import (
    FREE_RUNNING,
    MODES,
    Drift,
    Failure,
    RunDrift,
    RunKey,
    measure_drift,
)
from fwl_export.parity.plan import DEFAULT_BUDGET, Plan, plan_check, slots_in_use
from fwl_export.parity.repeat import Difference, differences
from fwl_export.parity.report.baseline import compare_with_baseline
from fwl_export.parity.report.data import CaseRun, Report
from fwl_export.parity.report.worst_place import worst_place
from fwl_export.parity.schedule import ROWS, ScheduledCall
from fwl_export.parity.tolerances import Tolerance, changed_table
from fwl_export.parity.verdict import CandidateVerdict, judge
from fwl_export.plugins import ONNXRUNTIME, find_plugin
from fwl_export.runtimes import RUNTIMES, Session, open_session

_log = logging.getLogger(__name__)

CANDIDATES = "onnxruntime"
BOTH_PATHS = "onnxruntime:plugin,onnxruntime:no-plugin"
DEFAULT_TOKENS = 576

# Slots by which the ring buffers of a reference for short texts grow.
_SLOTS = 64
DEFAULT_CASES = ",".join(case.name for case in CASES)

# Two readings of the same calls may differ by this multiple of the first one's distance from the
# reference, and by a few float16 roundings, where their bits need not be equal.
_TWO_READINGS = 6
_ROUNDINGS = 2.0**-20

_PACKAGES = (
    "fwl-export",
    "numpy",
    "onnx",
    "onnxruntime",
    "onnxruntime-gpu",
    "tensorrt",
    "tensorrt-rtx",
    "torch",
)


def check_bundle(
    bundle: Bundle,
    ids: Array,
    tokens: int = DEFAULT_TOKENS,
    seed: int = 0,
    candidates: str | Sequence[str | Candidate] | Mapping[str, Session] | None = None,
    *,
    reference: str = REFERENCE,
    cases: str | Sequence[str | Case] = DEFAULT_CASES,
    all_ids: bool = False,
    strict: bool = False,
    tolerances: Mapping[str, Any] | None = None,
    baseline: Mapping[str, Any] | None = None,
    text: str = "",
    threads: int = 1,
    decode: Callable[[int], str] | None = None,
    command: str = "",
    advance: Callable[[int], None] = lambda tokens: None,
    stop_early: bool = False,
    budget: float | None = DEFAULT_BUDGET,
    memory: float | None = None,
    plan: Plan | None = None,
    say: Callable[[str], None] = lambda message: None,
) -> Report:
    """Make the same calls in every candidate and judge how far each is from the reference.

    Args:
      bundle: Bundle that holds its checkpoint.
      ids: Token ids of the text, [N] int64, with N of at least `tokens + 1`.
      tokens: Tokens of the text that the first row reads, capped at what the model can read.
      seed: Seed of the calls.
      candidates: Names of runtimes, see `parity.candidates`, as a list or separated by commas. Or
        sessions by name, in the bundle's precision; the check opens others like them. None means
        ONNX Runtime, with our kernel and with standard operators, where the kernel's library is.
      reference: Name of the runtime whose results count as correct.
      cases: Names of cases, or what `choose_cases` returned for this bundle.
      all_ids: Whether every token id is read, however many there are.
      strict: Whether to halve every budget.
      tolerances: Changes to the table of tolerances, see `changed_table`.
      baseline: Data of an earlier report, see `read_report`. Errors that have grown since then
        count as outside their budgets.
      text: Name of the text, for the report.
      threads: Threads per runtime. With 1, results are reproducible. With more, the order of sums
        depends on the machine, and idle threads of one runtime spin on the cores of another.
      decode: Function that returns the text of a token id, for the report.
      command: Shell command that repeats the check, for the report.
      advance: Called with the number of tokens that the first row has moved on, in each case.
      stop_early: Whether to stop after the first case in which a candidate does not pass.
      budget: Seconds that the calls may take, by an estimate that follows from the model's size;
        what does not fit is left out and named. None means any time.
      memory: Bytes that the check may use; None means 4 GB, or without a budget what is free.
      plan: What to try, if `plan_check` was called before; `cases`, `budget` and `memory` are then
        not used.
      say: Called with a line of text about what is being done.

    Raises:
      BundleError: The bundle is incomplete or changed, or has no checkpoint.
      TokenError: The text is too short.
      ConfigError: A name or a tolerance is unknown.
    """
    began = time.perf_counter()
    manifest = bundle.manifest
    if candidates is None:
        candidates = default_candidates()
    if plan is None:
        limits = ModelLimits.of_bundle(bundle)
        chosen = choose_cases(cases, tokens, limits, seed, all_ids)
        plan = plan_check(bundle, chosen, limits, seed, candidates, reference, budget, memory)
    table = changed_table(tolerances or {}, strict)
    ids = ids[: ROWS * max(case.tokens for case in plan.cases) + 1]
    calls = plan.calls(ids, seed)  # refuses a text that is too short, before runtimes open
    say("hashing the files")
    bundle.model_files()
    coverage = Coverage(plan.limits, threads=[str(threads)])
    run = _Run(bundle, plan, calls, threads, coverage, advance, say)
    right = parse_candidate(reference)
    with torch_threads(threads):
        horizon_tokens = model_horizon(bundle)
        if plan.in_turns and not isinstance(candidates, Mapping):
            lineup, measured = _measure_in_turns(run, candidates, right)
        else:

            def passed(lineup: _Lineup, measured: _Measured) -> bool:
                verdicts = _verdicts(lineup, [measured], horizon_tokens, table)
                return not stop_early or all(verdict.passed for verdict in verdicts)

            lineup, measured = _measure_together(run, candidates, right, passed)
    _say_what_ran(coverage, lineup, plan, tokens)
    verdicts = _verdicts(lineup, measured, horizon_tokens, table)
    if baseline is not None:
        verdicts = compare_with_baseline(verdicts, baseline)
    if decode is not None:
        verdicts = [verdict.with_texts(decode) for verdict in verdicts]
    return Report(
        bundle=bundle.folder.resolve().name,
        model_id=manifest.model_id,
        precision=manifest.precision,
        max_tokens=manifest.max_tokens,
        text=text,
        ids=[int(token) for token in ids],
        tokens=tokens,
        seed=seed,
        reference=reference,
        strict=strict,
        changed_tolerances=dict(tolerances or {}),
        table=table,
        horizon_tokens=horizon_tokens,
        cases=[CaseRun(m.case, m.drift.calls, m.drift.largest_call) for m in measured],
        candidates=verdicts,
        worst=[worst_place(verdict, calls, decode) for verdict in verdicts],
        coverage=coverage.to_dict(),
        baseline=None if baseline is None else str(baseline.get("bundle", {}).get("name", "")),
        environment=environment(threads),
        command=command,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        seconds=time.perf_counter() - began,
    )


@dataclass(frozen=True)
class _OpenedCandidate:
    """A candidate with its session, or with the reason why it could not be opened.

    Attributes:
      name: Name of the candidate.
      precision: Precision that it computes in.
      runtime: Runtime, version and options in words.
      tokens: Tokens after which it stops, or None for all.
      session: Session of the candidate, or None if it could not be opened.
      reason: Why it could not be opened, or None.
      with_own_threads: Opens a session with the runtime's own number of threads, or None if the
        runtime has no such number.
      is_exact: Whether the same calls must give the same bits.
    """

    name: str
    precision: str
    runtime: str = ""
    tokens: int | None = None
    session: Session | None = None
    reason: str | None = None
    with_own_threads: Callable[[], Session] | None = None
    is_exact: bool = False


@dataclass
class _Lineup:
    """All sessions that take part in a check.

    Attributes:
      candidates: Candidates, opened or not.
      reference: Name and session of the reference.
      yardstick: Name and session of PyTorch in float64, from which budgets are measured. It is the
        reference itself unless the user named another.
      own: Name and session of PyTorch by precision. They may be candidates too.
    """

    candidates: list[_OpenedCandidate]
    reference: tuple[str, Session]
    yardstick: tuple[str, Session]
    own: dict[str, tuple[str, Session]]


@dataclass(frozen=True)
class _Run:
    """What every part of a check needs to know.

    Attributes:
      bundle: Bundle under check.
      plan: What to try.
      calls: Calls of every case.
      threads: Threads per runtime.
      coverage: Counts what was tried.
      advance: Called with the number of tokens that the first row has moved on.
      say: Called with a line of text about what is being done.
      counted: Names of the cases whose calls were counted.
    """

    bundle: Bundle
    plan: Plan
    calls: Mapping[str, Iterable[ScheduledCall]]
    threads: int
    coverage: Coverage
    advance: Callable[[int], None]
    say: Callable[[str], None]
    counted: set[str] = field(default_factory=set)

    def observer(self, case: Case, lineup: _Lineup) -> Callable[..., None]:
        """Return what counts the calls of a case, which are made once in every turn."""
        if case.name in self.counted or all(c.reason is not None for c in lineup.candidates):
            return lambda call, before: None
        self.counted.add(case.name)
        return self.coverage.add


def _measure_together(
    run: _Run,
    candidates: str | Sequence[str | Candidate] | Mapping[str, Session],
    reference: Candidate,
    passed: Callable[[_Lineup, _Measured], bool],
) -> tuple[_Lineup, list[_Measured]]:
    """Open all runtimes and measure them side by side, until a case has not passed."""
    run.say("opening the runtimes")
    lineup = _open_all(run.bundle, candidates, reference, run.threads)
    _log.info("comparing with %s: %s", reference.name, ", ".join(c.name for c in lineup.candidates))
    measured: list[_Measured] = []
    for case in run.plan.cases:
        run.say(f"case {case.name}")
        measured.append(_measure(lineup, case, run))
        if not passed(lineup, measured[-1]):
            break
    return lineup, measured


def _measure_in_turns(
    run: _Run, candidates: str | Sequence[str | Candidate], reference: Candidate
) -> tuple[_Lineup, list[_Measured]]:
    """Measure one runtime after the other; beside it, only the reference is in memory.

    First comes PyTorch in every precision that a candidate computes in, unless it is a candidate.
    """
    parsed = parse_candidates(candidates)
    run.say(f"opening {reference.name}")
    right = (reference.name, _for_opening(reference.open(run.bundle, 1, run.threads)))
    release_memory()
    whole = _Lineup([], right, right, {})
    measured: dict[str, list[_Measured]] = {case.name: [] for case in run.plan.cases}
    candidates_by_precision = {
        c.precision(run.bundle): c.name for c in parsed if c.runtime == "torch" and not c.tokens
    }
    for precision in dict.fromkeys(c.precision(run.bundle) for c in parsed):
        name = candidates_by_precision.get(precision) or f"PyTorch {precision}"
        whole.own[precision] = (name, right[1])  # only the name is used afterwards
        if precision not in candidates_by_precision:
            run.say(f"opening {name}")
            session = _for_opening(
                open_session(run.bundle, "torch", precision=cast(Any, precision))
            )
            _measure_turn(run, _Lineup([], right, right, {precision: (name, session)}), measured)
            del session
            release_memory()
    for named in parsed:
        run.say(f"opening {named.name}")
        opened = [_open(run.bundle, named, run.threads, twin(named, parsed))]
        for candidate in opened:
            if candidate.session is not None:
                candidate.session.drop_state()
        del candidate
        release_memory()
        whole.candidates += _measure_turn(run, _Lineup(opened, right, right, {}), measured)
    return whole, [_merged(turns) for turns in measured.values()]


def _open_all(
    bundle: Bundle,
    candidates: str | Sequence[str | Candidate] | Mapping[str, Session],
    reference: Candidate,
    threads: int,
) -> _Lineup:
    right = (reference.name, reference.open(bundle, 1, threads))
    yardstick = right
    if (reference.runtime, reference.precision(bundle)) != ("torch", "fp64"):
        yardstick = (REFERENCE, parse_candidate(REFERENCE).open(bundle, 1))
    own: dict[str, tuple[str, Session]] = {}
    opened: list[_OpenedCandidate] = []
    if isinstance(candidates, Mapping):
        precision = bundle.manifest.precision
        opened = [_OpenedCandidate(name, precision, session=s) for name, s in candidates.items()]
    else:
        parsed = parse_candidates(candidates)
        for named in parsed:
            candidate = _open(bundle, named, threads, twin(named, parsed))
            opened.append(candidate)
            if named.runtime == "torch" and candidate.session and not named.tokens:
                own[candidate.precision] = (candidate.name, candidate.session)
    for precision in {candidate.precision for candidate in opened} - own.keys():
        session = open_session(bundle, "torch", precision=cast(Any, precision))
        own[precision] = (f"PyTorch {precision}", session)
    return _Lineup(opened, right, yardstick, own)


def _open(
    bundle: Bundle, candidate: Candidate, threads: int, reason: str | None = None
) -> _OpenedCandidate:
    """Open a candidate, unless there is a reason why it must not run."""
    known = (candidate.name, candidate.precision(bundle))
    if reason:
        return _OpenedCandidate(*known, tokens=candidate.tokens, reason=reason)
    try:
        session = candidate.open(bundle, 1, threads)
        takes_threads = "threads" in RUNTIMES[candidate.runtime].takes
        return _OpenedCandidate(
            *known,
            candidate.describe(),
            candidate.tokens,
            session,
            with_own_threads=partial(candidate.open, bundle, 1) if takes_threads else None,
            is_exact=threads == 1 and _is_on_cpu(candidate),
        )
    except Exception as error:  # runtimes raise exceptions of any type; the others continue
        reason = str(error) or type(error).__name__
        return _OpenedCandidate(*known, tokens=candidate.tokens, reason=reason)


class _Measured(NamedTuple):
    """Measurements of a case: of the candidates, and of PyTorch against float64."""

    case: Case
    drift: Drift
    own: Drift


def _for_opening(session: Session) -> Session:
    """Return a session that only serves to open others, without memory for its state."""
    session.drop_state()
    return session


def _measure_turn(
    run: _Run, lineup: _Lineup, measured: Mapping[str, list[_Measured]]
) -> list[_OpenedCandidate]:
    """Measure all cases; returns the candidates without their sessions."""
    for case in run.plan.cases:
        names = [c.name for c in lineup.candidates] or [name for name, _ in lineup.own.values()]
        run.say(f"{names[0]}, case {case.name}")
        measured[case.name].append(_measure(lineup, case, run))
        release_memory()
    _close(lineup)
    return lineup.candidates


def _close(lineup: _Lineup) -> None:
    """Let go of the candidates' models."""
    lineup.candidates[:] = [replace(candidate, session=None) for candidate in lineup.candidates]
    release_memory()


def _merged(turns: Sequence[_Measured]) -> _Measured:
    """Return the measurements of several turns as if all had been made side by side."""
    drifts = [measured.drift for measured in turns]
    together = Drift(
        {key: run for drift in drifts for key, run in drift.runs.items()},
        next((drift.failure for drift in drifts if drift.failure), None),
        max(drift.calls for drift in drifts),
        max(drift.largest_call for drift in drifts),
    )
    return _Measured(turns[0].case, together, together)


def _measure(lineup: _Lineup, case: Case, run: _Run) -> _Measured:
    from fwl_export.runtimes.torch import short_session  # traces need no PyTorch

    calls = run.calls[case.name]
    slots = _round_up(slots_in_use(calls, case.rows)) if run.plan.in_turns else None

    def fresh(name: str, session: Session) -> tuple[str, Session]:
        short = short_session(session, slots, case.rows) if slots else None
        return name, short or session.another(case.rows)

    again = _read_again(lineup, calls) if case.name == AGAIN else {}
    if again and run.plan.in_turns:  # there is no memory for a model with each number of threads
        _close(lineup)
    candidates = _fresh_candidates(lineup, case, run.coverage)
    own = dict(fresh(*pair) for pair in lineup.own.values() if pair[0] not in candidates)
    limits = {
        candidate.name: candidate.tokens for candidate in lineup.candidates if candidate.tokens
    }
    together = lineup.reference is lineup.yardstick
    _log.info("case %s: %d tokens, %d rows", case.name, case.tokens, case.rows)
    drift = measure_drift(
        fresh(*lineup.reference),
        {**candidates, **own} if together else candidates,
        calls,
        limits,
        needed=candidates if lineup.candidates else None,
        advance=run.advance,
        observe=run.observer(case, lineup),
        taking_turns=run.plan.in_turns,
    )
    _judge_again(lineup, again, drift, run.coverage)
    if together:
        return _Measured(case, drift, drift)
    own = dict(fresh(*pair) for pair in lineup.own.values())
    return _Measured(case, drift, measure_drift(fresh(*lineup.yardstick), own, calls))


def _round_up(slots: int) -> int:
    return -(-max(slots, 1) // _SLOTS) * _SLOTS


def _fresh_candidates(lineup: _Lineup, case: Case, coverage: Coverage) -> dict[str, Session]:
    """Open a session of each candidate for a case; an engine may not take so many rows."""
    found = {}
    for candidate in lineup.candidates:
        if candidate.reason is not None:
            continue
        try:
            if case.name == AGAIN and candidate.with_own_threads:
                session = candidate.with_own_threads().another(case.rows)
                coverage.threads = [*dict.fromkeys([*coverage.threads, "default"])]
            elif candidate.session is not None:
                session = candidate.session.another(case.rows)
            else:
                continue
        except ShapeError as error:
            coverage.left_out.append(f"case {case.name} of {candidate.name}: {error}")
            continue
        found[candidate.name] = session
    return found


def _read_again(
    lineup: _Lineup, calls: Iterable[ScheduledCall]
) -> dict[str, list[Difference] | Exception]:
    """Make the calls twice in every candidate; returns what differs, or why it failed."""
    found: dict[str, list[Difference] | Exception] = {}
    for candidate in lineup.candidates:
        if candidate.session is None or candidate.tokens:
            continue
        try:
            found[candidate.name] = list(differences(candidate.session, calls))
        except Exception as error:  # runtimes raise exceptions of any type
            found[candidate.name] = error
    return found


def _judge_again(
    lineup: _Lineup,
    again: Mapping[str, list[Difference] | Exception],
    drift: Drift,
    coverage: Coverage,
) -> None:
    """Turn what differs between two readings of the same calls into a failure of the run.

    With one thread on a CPU the bits must be equal. Elsewhere two readings may differ by as much
    as they together may differ from the reference.
    """
    for candidate in lineup.candidates:
        run = drift.runs.get(RunKey(candidate.name, FREE_RUNNING))
        if candidate.name not in again or run is None or run.failure:
            continue
        coverage.repeated.append(candidate.name)
        found = again[candidate.name]
        if isinstance(found, Exception):
            message = f"it failed when the calls were made again: {found}"
            run.failure = Failure(candidate.name, 0, 0, message)
        else:
            run.failure = next(_not_repeated(candidate, found, run), None)


def _not_repeated(
    candidate: _OpenedCandidate, found: Iterable[Difference], run: RunDrift
) -> Iterator[Failure]:
    for tensor, step, error in found:
        usual = max(e.relative_rms for e in run.errors[tensor])
        if candidate.is_exact or error.relative_rms > _TWO_READINGS * usual + _ROUNDINGS:
            message = (
                f"'{tensor}' differs by up to {error.max_abs:.2g} when the same calls are made "
                "twice, the second time beside another session"
            )
            yield Failure(candidate.name, step, 0, message, "not repeatable", tensor)


def _is_on_cpu(candidate: Candidate) -> bool:
    device = str(candidate.arguments.get("device") or "cpu")
    return candidate.runtime != "tensorrt" and device == "cpu"


def default_candidates() -> str:
    """Return the candidates that are checked unless others are named.

    That is ONNX Runtime with our kernel and with the standard operators of the function body, where
    the kernel's library is installed.
    """
    return BOTH_PATHS if find_plugin(ONNXRUNTIME) else CANDIDATES


def _say_what_ran(coverage: Coverage, lineup: _Lineup, plan: Plan, tokens: int) -> None:
    """Add to the coverage which paths ran, and what a full check would also have tried."""
    coverage.paths = paths_of(c.runtime for c in lineup.candidates if c.reason is None)
    if coverage.paths == ["function body"] and not find_plugin(ONNXRUNTIME):
        coverage.left_out.append(
            "the plugin's kernel, whose library is not installed (`make plugins` builds it)"
        )
    missing = [case.name for case in CASES if case.name not in {c.name for c in plan.cases}]
    if missing:
        coverage.left_out.append(f"cases {', '.join(missing)}")
    coverage.left_out += plan.left_out
    if tokens < DEFAULT_TOKENS:
        coverage.left_out.append(f"what takes more than {LONGEST_CASE * tokens} tokens")


def paths_of(runtimes: Iterable[str]) -> list[str]:
    """Return the ways in which the update was computed, from descriptions of candidates."""
    words = {"plugin": "plugin", "standard operators": "function body"}
    texts = list(runtimes)
    return [name for word, name in words.items() if any(f", {word}" in text for text in texts)]


def _verdicts(
    lineup: _Lineup,
    measured: Sequence[_Measured],
    horizon_tokens: float,
    table: Sequence[Tolerance],
) -> list[CandidateVerdict]:
    return [_verdict(c, lineup, measured, horizon_tokens, table) for c in lineup.candidates]


def _verdict(
    candidate: _OpenedCandidate,
    lineup: _Lineup,
    measured: Sequence[_Measured],
    horizon_tokens: float,
    table: Sequence[Tolerance],
) -> CandidateVerdict:
    own = lineup.own[candidate.precision][0]
    runs = [
        judge(m.case.name, m.drift, key, m.own, own, candidate.precision, horizon_tokens, table)
        for m in measured
        for key in (RunKey(candidate.name, mode) for mode in MODES)
        if key in m.drift.runs
    ]
    return CandidateVerdict(
        candidate.name,
        candidate.precision,
        runs,
        candidate.runtime,
        candidate.tokens,
        candidate.reason,
    )


def environment(threads: int) -> dict[str, Any]:
    """Return versions, processor and threads of a check, for its report."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": processor_name(),
        "cores": os.cpu_count(),
        "threads": threads,
        "versions": installed_versions(_PACKAGES),
    }


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Set PyTorch's number of threads while the block runs."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def model_horizon(bundle: Bundle) -> float:
    """Return the horizon of the bundle's model in tokens; 0 means that it never forgets."""
    from safetensors import safe_open

    if bundle.manifest.config.fast_weights.decay == "none":
        return 0.0
    bundle.require_checkpoint()
    path = bundle.file(f"{CHECKPOINT_FOLDER}/{WEIGHTS_FILE}")
    with safe_open(path, framework="numpy") as weights:
        horizon = float(weights.get_tensor("fast_weights.horizon"))
    return horizon if math.isfinite(horizon) else 0.0
