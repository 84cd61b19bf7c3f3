"""The result of a check as data. README.md in the folder above documents the JSON schema."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, TypedDict

from msgspec import Meta

from fwl_export.errors import ReportError
from fwl_export.files import replaced_file
from fwl_export.json_files import (
    Count,
    Finite,
    Name,
    Size,
    check_schema,
    read_json,
    typed,
    without_non_finite,
)
from fwl_export.parity.cases import Case
from fwl_export.parity.compare import Place, Prediction, pooled
from fwl_export.parity.drift import MODE_NAMES, Failure
from fwl_export.parity.report.html import to_html_table
from fwl_export.parity.report.worst_place import WorstPlace
from fwl_export.parity.tolerances import Tolerance
from fwl_export.parity.verdict import (
    COULD_NOT_RUN,
    OUTSIDE,
    WITHIN,
    CandidateVerdict,
    RunVerdict,
    Spot,
    TensorVerdict,
)

SCHEMA_VERSION = 3

_DIGITS = 6  # significant digits of numbers in the file


@dataclass(frozen=True)
class CaseRun:
    """A case that was run.

    Attributes:
      case: Case with its number of tokens.
      calls: Number of calls that were made.
      largest_call: Largest T of those calls.
    """

    case: Case
    calls: int
    largest_call: int


@dataclass(frozen=True)
class Report:
    """What was checked, how, and the verdict. Notebooks show it as a table.

    Attributes:
      bundle: Name of the bundle's folder.
      model_id: Identity of the model, see `Manifest`.
      precision: Precision of the bundle's activations.
      max_tokens: Largest T of a call.
      text: Name of the text.
      ids: Token ids of the text, as far as it was read.
      tokens: Tokens of the text that the first row read.
      seed: Seed of the calls.
      reference: Name of the runtime whose results count as correct.
      strict: Whether every budget was halved.
      changed_tolerances: Changes to the tolerances, as the user gave them.
      table: Table of tolerances that applied.
      horizon_tokens: Tokens over which the fast weights remember; 0 means that they never forget.
      cases: Cases that were run.
      candidates: Verdicts, one per candidate.
      coverage: What was tried, see `Coverage.to_dict`.
      worst: Place where each candidate uses most of a budget, or None if nothing was compared.
      baseline: Name of the bundle in the earlier report that errors were compared with, or None.
      environment: Versions, processor and threads of the check.
      command: Shell command that repeats the check.
      created: Time of the check in UTC, ISO 8601.
      seconds: Duration of the check in seconds.
    """

    bundle: str
    model_id: str
    precision: str
    max_tokens: int
    text: str
    ids: Sequence[int]
    tokens: int
    seed: int
    reference: str
    strict: bool
    changed_tolerances: Mapping[str, Any]
    table: Sequence[Tolerance]
    horizon_tokens: float
    cases: Sequence[CaseRun]
    candidates: Sequence[CandidateVerdict]
    worst: Sequence[WorstPlace | None]
    coverage: Mapping[str, Any]
    baseline: str | None
    environment: Mapping[str, Any]
    command: str
    created: str
    seconds: float

    def __repr__(self) -> str:
        """Return the verdict, and the use of each candidate."""
        uses = ", ".join(
            f"{c.name} {f'{c.use:.0%}' if c.runs and not c.not_finite else c.status}"
            for c in self.candidates
        )
        return f"<Report of {self.bundle}: {self.status}; use of budgets: {uses}>"

    def _repr_html_(self) -> str:
        """Return a compact table for notebooks."""
        return to_html_table(self.to_dict())

    @property
    def status(self) -> str:
        """`WITHIN`, `OUTSIDE` or `COULD_NOT_RUN`; `OUTSIDE` takes precedence."""
        found = {candidate.status for candidate in self.candidates}
        if OUTSIDE in found:
            return OUTSIDE
        return WITHIN if found == {WITHIN} else COULD_NOT_RUN

    @property
    def passed(self) -> bool:
        """Whether every candidate is within its budgets."""
        return self.status == WITHIN

    @property
    def exit_code(self) -> int:
        """Exit code of `fwl-export check`: 0 within budget, 1 outside, 2 could not run."""
        return {WITHIN: 0, OUTSIDE: 1, COULD_NOT_RUN: 2}[self.status]

    def problems(self) -> list[str]:
        """Return a sentence for each thing that went wrong: what, where, and by how much."""
        return [line for candidate in self.candidates for line in problems(candidate)]

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready data; numbers that are infinite or NaN become null."""
        data = {
            "schema_version": SCHEMA_VERSION,
            "status": self.status,
            "passed": self.passed,
            "exit_code": self.exit_code,
            "problems": self.problems(),
            "command": self.command,
            "created": self.created,
            "seconds": self.seconds,
            "bundle": {
                "name": self.bundle,
                "model_id": self.model_id,
                "precision": self.precision,
                "max_tokens": self.max_tokens,
            },
            "environment": dict(self.environment),
            "settings": {
                "reference": self.reference,
                "candidates": [candidate.name for candidate in self.candidates],
                "cases": [f"{run.case.name}@{run.case.tokens}" for run in self.cases],
                "tokens": self.tokens,
                "seed": self.seed,
                "strict": self.strict,
                "tolerances": dict(self.changed_tolerances),
            },
            "text": {"name": self.text, "ids": list(self.ids)},
            "memory": self.horizon_tokens,
            "tolerances": [asdict(row) for row in self.table],
            "cases": [
                {**asdict(run.case), "calls": run.calls, "largest_call": run.largest_call}
                for run in self.cases
            ],
            "coverage": dict(self.coverage),
            "baseline": self._baseline(),
            "candidates": [
                {**_candidate(candidate), "worst": _worst(worst)}
                for candidate, worst in zip(self.candidates, self.worst, strict=True)
            ],
        }
        result: dict[str, Any] = without_non_finite(data, _DIGITS)
        return result

    def write(self, path: Path, through_link: bool = True) -> None:
        """Write the data as a JSON file.

        Args:
          path: File to write; an existing one is replaced.
          through_link: See `fwl_export.files.replaced_file`.
        """
        with replaced_file(path, through_link=through_link) as target:
            text = json.dumps(self.to_dict(), separators=(",", ":"), ensure_ascii=False)
            target.write_text(text + "\n", encoding="utf-8")

    def _baseline(self) -> dict[str, Any] | None:
        if self.baseline is None:
            return None
        grown = [growth._asdict() for c in self.candidates for growth in c.grown]
        return {"name": self.baseline, "grown": grown}


def read_report(path: Path) -> dict[str, Any]:
    """Return the data of a report file.

    Raises:
      ReportError: The file cannot be read, is not a report, or has another schema version.
    """
    try:
        data = read_json(path, ReportError, "expected a report of `fwl-export check`")
    except OSError as error:
        raise ReportError(f"cannot read report '{path}': {error.strerror or error}") from None
    version = data.get("schema_version") if isinstance(data, dict) else None
    if not isinstance(version, int) or "candidates" not in data:
        raise ReportError(
            f"'{path}' is not a report of `fwl-export check`; did you mean another file?"
        )
    where, remedy = f"report '{path}'", "run the check again"
    check_schema(data, SCHEMA_VERSION, where, ReportError, remedy)
    typed(data, _Stored, f"{where} is malformed", ReportError, remedy)
    _check_points(data, f"{where} is malformed", remedy)
    result: dict[str, Any] = data
    return result


class _StoredTensor(TypedDict):
    name: Name
    max_abs: list[Finite | None]
    relative_rms: list[Finite | None]


class _StoredRun(TypedDict):
    case: Name
    mode: Name
    depths: list[Count]
    tensors: list[_StoredTensor]


class _StoredCandidate(TypedDict):
    name: Name
    runs: list[_StoredRun]


class _StoredBundle(TypedDict):
    name: Name
    model_id: Name


class _StoredSettings(TypedDict):
    reference: Name
    candidates: list[Name]
    cases: list[Annotated[str, Meta(pattern=r"\A\w+(@\d{1,7})?\Z")]]
    tokens: Size
    seed: Count


class _StoredText(TypedDict):
    name: Name
    ids: list[Annotated[int, Meta(ge=0, le=(1 << 31) - 1)]]


class _Stored(TypedDict):
    """What `--replay` and `--baseline` use of a report; its other keys are for people."""

    bundle: _StoredBundle
    settings: _StoredSettings
    text: _StoredText
    candidates: list[_StoredCandidate]


def _check_points(data: Mapping[str, Any], where: str, remedy: str) -> None:
    """Check that every tensor has an error for each comparison point of its run."""
    for candidate in data["candidates"]:
        for run in candidate["runs"]:
            for tensor in run["tensors"]:
                for measure in ("max_abs", "relative_rms"):
                    if len(tensor[measure]) != len(run["depths"]):
                        raise ReportError(
                            f"{where}: case '{run['case']}' has {len(run['depths'])} comparison "
                            f"points, but '{tensor['name']}' has {len(tensor[measure])} errors; "
                            f"{remedy}"
                        )


def problems(candidate: CandidateVerdict) -> list[str]:
    """Return a sentence for each thing that is wrong with a candidate."""
    lines = []
    if candidate.reason:
        lines.append(f"{candidate.name} could not run: {candidate.reason}")
    if (run := candidate.not_finite) and (broken := run.not_finite):
        at = f"case '{run.case}', {MODE_NAMES[run.mode]}, call {broken.step}"
        lines.append(f"{candidate.name} is {broken.place}: {broken.message} ({at})")
    if candidate.breach:
        lines.append(f"{candidate.name} is outside its budget, {_breach(candidate.breach)}")
    told = set()
    for run in candidate.runs:
        if run.not_finite:  # told above, the first time
            continue
        if (failure := run.failure) and (failure.message, failure.step) not in told:
            told.add((failure.message, failure.step))
            lines.append(
                f"{failure.runtime} failed in case '{run.case}', {MODE_NAMES[run.mode]}, "
                f"at call {failure.step} (up to token {failure.tokens_read}): {failure.sentence}"
            )
    lines += [
        f"{candidate.name} has a larger error than in the baseline in '{growth.tensor}' (case "
        f"'{growth.case}', {MODE_NAMES[growth.mode]}): {growth.measure} {growth.now:.2g}, before "
        f"{growth.before:.2g}"
        for growth in candidate.grown[:3]
    ]
    if len(candidate.grown) > 3:
        lines.append(
            f"{candidate.name}: {len(candidate.grown) - 3} more errors grew since the baseline"
        )
    return lines


def _breach(spot: Spot) -> str:
    run, tensor, measured = spot
    error, budget = measured.error, measured.budget
    text = (
        f"first in '{tensor.name}' (case '{run.case}', {MODE_NAMES[run.mode]}) after "
        f"{measured.tokens_read} tokens: max abs {error.max_abs:.2g} (budget {budget.max_abs:.2g}),"
        f" relative RMS {error.relative_rms:.2g} (budget {budget.relative_rms:.2g})"
    )
    if error.worst:
        place = error.worst
        row, *index = place.index
        text += (
            f"; worst in call {place.step}, row {row}, element {index}: {place.candidate:.7g} "
            f"instead of {place.reference:.7g}"
        )
    return text


def _candidate(candidate: CandidateVerdict) -> dict[str, Any]:
    return {
        "name": candidate.name,
        "runtime": candidate.runtime,
        "precision": candidate.precision,
        "tokens": candidate.tokens,
        "status": candidate.status,
        "passed": candidate.passed,
        "reason": candidate.reason,
        "use": candidate.use,
        "runs": [_run(run) for run in candidate.runs],
    }


def _run(run: RunVerdict) -> dict[str, Any]:
    return {
        "case": run.case,
        "mode": run.mode,
        "status": run.status,
        "use": run.use,
        "tokens": max(run.tokens_read, default=0),
        "failure": _failure(run.failure),
        "own_failure": _failure(run.own_failure),
        "depths": run.tokens_read,
        "tensors": [_tensor(tensor) for tensor in run.tensors],
        "predictions": [asdict(prediction) for prediction in run.predictions],
        "own_predictions": [asdict(prediction) for prediction in run.own_predictions],
        "overall": _overall(run.predictions),
        "own_overall": _overall(run.own_predictions),
    }


def _failure(failure: Failure | None) -> dict[str, Any] | None:
    return {**_with_depth(failure), "message": failure.sentence} if failure else None


def _tensor(tensor: TensorVerdict) -> dict[str, Any]:
    rows = tensor.points
    largest = max((m.error for m in rows), key=lambda error: error.max_abs)
    return {
        "name": tensor.name,
        "dtype": tensor.dtype,
        "tolerance": tensor.tolerance.prefix,
        "use": tensor.use,
        "max_abs": [m.error.max_abs for m in rows],
        "relative_rms": [m.error.relative_rms for m in rows],
        "own_max_abs": [m.own.max_abs for m in rows],
        "own_relative_rms": [m.own.relative_rms for m in rows],
        "budget_max_abs": [m.budget.max_abs for m in rows],
        "budget_relative_rms": [m.budget.relative_rms for m in rows],
        "uses": [m.use for m in rows],
        "worst": _place(largest.worst),
        "ulp": tensor.ulp,
    }


def _place(place: Place | None) -> dict[str, Any] | None:
    return _with_depth(place) if place else None


def _with_depth(item: Failure | Place | WorstPlace) -> dict[str, Any]:
    """Return the fields of an item; `tokens_read` is called `depth` in the JSON schema."""
    return {"depth" if k == "tokens_read" else k: v for k, v in asdict(item).items()}


def _overall(predictions: Sequence[Prediction]) -> dict[str, Any] | None:
    if not predictions:
        return None
    whole = pooled(predictions)
    return {
        **asdict(whole),
        "perplexity": whole.perplexity,
        "reference_perplexity": whole.reference_perplexity,
        "perplexity_change": whole.perplexity_change,
    }


def _worst(worst: WorstPlace | None) -> dict[str, Any] | None:
    if worst is None:
        return None
    data = _with_depth(worst)
    place = data.pop("place")
    row, *index = place.pop("index")
    del place["tokens_read"]
    return {**data, **place, "row": row, "index": index}
