"""Check a bundle: make the same calls in all candidates and judge them against a reference."""

from __future__ import annotations

import logging
import math
import os
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, NamedTuple, cast

from fwl_export.bundle.manifest import CHECKPOINT_FOLDER, Bundle
from fwl_export.bundle.state import Array
from fwl_export.machine import installed_versions, processor_name
from fwl_export.model.stored import WEIGHTS_FILE
from fwl_export.parity.candidates import REFERENCE, Candidate, parse_candidate, parse_candidates
from fwl_export.parity.cases import CASES, Case, choose_cases
from fwl_export.parity.drift import MODES, Drift, RunKey, measure_drift
from fwl_export.parity.report.baseline import compare_with_baseline
from fwl_export.parity.report.data import CaseRun, Report
from fwl_export.parity.report.worst_place import worst_place
from fwl_export.parity.schedule import ROWS, ScheduledCall
from fwl_export.parity.tolerances import Tolerance, changed_table
from fwl_export.parity.verdict import CandidateVerdict, judge
from fwl_export.runtimes import Session, open_session

_log = logging.getLogger(__name__)

CANDIDATES = "onnxruntime"
DEFAULT_CASES = ",".join(case.name for case in CASES)

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
    tokens: int = 2000,
    seed: int = 0,
    candidates: str | Sequence[str] | Mapping[str, Session] = CANDIDATES,
    *,
    reference: str = REFERENCE,
    cases: str | Sequence[str | Case] = DEFAULT_CASES,
    strict: bool = False,
    tolerances: Mapping[str, Any] | None = None,
    baseline: Mapping[str, Any] | None = None,
    text: str = "",
    threads: int = 1,
    decode: Callable[[int], str] | None = None,
    command: str = "",
    advance: Callable[[int], None] = lambda tokens: None,
) -> Report:
    """Make the same calls in every candidate and judge how far each is from the reference.

    Args:
      bundle: Bundle that holds its checkpoint.
      ids: Token ids of the text, [N] int64, with N of at least `tokens + 1`.
      tokens: Tokens of the text that the first row reads, capped at what the model can read.
      seed: Seed of the calls.
      candidates: Names of runtimes, see `parity.candidates`, as a list or separated by commas. Or
        sessions by name, in the bundle's precision; the check opens others like them.
      reference: Name of the runtime whose results count as correct.
      cases: Names of cases, or what `choose_cases` returned for this bundle.
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

    Raises:
      BundleError: The bundle is incomplete or changed, or has no checkpoint.
      TokenError: The text is too short.
      ConfigError: A name or a tolerance is unknown.
    """
    began = time.perf_counter()
    manifest = bundle.manifest
    limit = manifest.config.backbone.max_positions
    chosen = choose_cases(cases, tokens, manifest.max_tokens, limit)
    table = changed_table(tolerances or {}, strict)
    ids = ids[: ROWS * max(case.tokens for case in chosen) + 1]
    calls = {case.name: case.calls(ids, manifest.max_tokens, seed, limit) for case in chosen}
    bundle.model_files()
    with torch_threads(threads):
        lineup = _open_all(bundle, candidates, parse_candidate(reference), threads)
        _log.info("comparing with %s: %s", reference, ", ".join(c.name for c in lineup.candidates))
        measured = [_measure(lineup, case, calls[case.name], advance) for case in chosen]
    horizon_tokens = model_horizon(bundle)
    verdicts = [_verdict(c, lineup, measured, horizon_tokens, table) for c in lineup.candidates]
    if baseline is not None:
        verdicts = compare_with_baseline(verdicts, baseline)
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
        baseline=None if baseline is None else str(baseline.get("bundle", {}).get("name", "")),
        environment=_environment(threads),
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
    """

    name: str
    precision: str
    runtime: str = ""
    tokens: int | None = None
    session: Session | None = None
    reason: str | None = None


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


def _open_all(
    bundle: Bundle,
    candidates: str | Sequence[str] | Mapping[str, Session],
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
        for named in parse_candidates(candidates):
            candidate = _open(bundle, named, threads)
            opened.append(candidate)
            if named.runtime == "torch" and candidate.session and not named.tokens:
                own[candidate.precision] = (candidate.name, candidate.session)
    for precision in {candidate.precision for candidate in opened} - own.keys():
        session = open_session(bundle, "torch", precision=cast(Any, precision))
        own[precision] = (f"PyTorch {precision}", session)
    return _Lineup(opened, right, yardstick, own)


def _open(bundle: Bundle, candidate: Candidate, threads: int) -> _OpenedCandidate:
    known = (candidate.name, candidate.precision(bundle))
    try:
        session = candidate.open(bundle, 1, threads)
        return _OpenedCandidate(*known, candidate.describe(), candidate.tokens, session)
    except Exception as error:  # runtimes raise exceptions of any type; the others continue
        reason = str(error) or type(error).__name__
        return _OpenedCandidate(*known, tokens=candidate.tokens, reason=reason)


class _Measured(NamedTuple):
    """Measurements of a case: of the candidates, and of PyTorch against float64."""

    case: Case
    drift: Drift
    own: Drift


def _measure(
    lineup: _Lineup, case: Case, calls: Iterable[ScheduledCall], advance: Callable[[int], None]
) -> _Measured:
    def fresh(name: str, session: Session) -> tuple[str, Session]:
        return name, session.another(case.rows)

    candidates = dict(fresh(c.name, c.session) for c in lineup.candidates if c.session)
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
        needed=candidates,
        advance=advance,
    )
    if together:
        return _Measured(case, drift, drift)
    own = dict(fresh(*pair) for pair in lineup.own.values())
    return _Measured(case, drift, measure_drift(fresh(*lineup.yardstick), own, calls))


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
        if candidate.session
    ]
    return CandidateVerdict(
        candidate.name,
        candidate.precision,
        runs,
        candidate.runtime,
        candidate.tokens,
        candidate.reason,
    )


def _environment(threads: int) -> dict[str, Any]:
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
    path = bundle.file(f"{CHECKPOINT_FOLDER}/{WEIGHTS_FILE}")
    with safe_open(path, framework="numpy") as weights:
        horizon = float(weights.get_tensor("fast_weights.horizon"))
    return horizon if math.isfinite(horizon) else 0.0
