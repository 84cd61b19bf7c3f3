"""Compare errors with those of an earlier report (the baseline)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from fwl_export.errors import ReportError
from fwl_export.parity.verdict import CandidateVerdict, Growth, Measured, TensorVerdict

_FACTOR = 2.0
_MEASURES = ("max_abs", "relative_rms")

Key = tuple[str, str, str, str]  # candidate, case, mode, tensor


def compare_with_baseline(
    verdicts: Sequence[CandidateVerdict], baseline: Mapping[str, Any]
) -> list[CandidateVerdict]:
    """Return the verdicts with the errors that have more than doubled since an earlier report.

    Only tensors that both have, at the same comparison points, are compared. Errors below the floor
    of their budget are ignored: they are rounding errors, which may double by chance.

    Args:
      verdicts: Verdicts of the present check.
      baseline: Data of the earlier report, see `read_report`.

    Raises:
      ReportError: The two have nothing in common.
    """
    before = _errors(baseline)
    compared = 0
    result = []
    for verdict in verdicts:
        grown: list[Growth] = []
        for run in verdict.runs:
            for tensor in run.tensors:
                key = (verdict.name, run.case, run.mode, tensor.name)
                points, errors = before.get(key, ([], {}))
                if common := _common(run.tokens_read, points):
                    compared += 1
                    grown += _growths(key, errors, tensor, common)
        result.append(replace(verdict, grown=grown))
    if not compared:
        raise ReportError(
            "the baseline has nothing in common with this check; use a baseline that was made with "
            "the same --candidates, --cases, --tokens and --seed"
        )
    return result


def _errors(report: Mapping[str, Any]) -> dict[Key, tuple[list[int], Mapping[str, Any]]]:
    """Return each tensor of a report, and its comparison points, by candidate, case and mode."""
    return {
        (candidate["name"], run["case"], run["mode"], tensor["name"]): (run["depths"], tensor)
        for candidate in report["candidates"]
        for run in candidate["runs"]
        for tensor in run["tensors"]
    }


def _growths(
    key: Key, before: Mapping[str, Any], tensor: TensorVerdict, count: int
) -> Iterator[Growth]:
    """Yield the measures of a tensor that grew, over the first `count` comparison points."""
    measured = tensor.points[:count]
    for measure in _MEASURES:
        values = [value for value in before[measure][:count] if value is not None]
        old = max(values, default=0.0)
        new = max(getattr(m.error, measure) for m in measured)
        if len(values) == count and new > _FACTOR * old and not _are_roundings(measured, measure):
            yield Growth(*key, measure, old, new)


def _are_roundings(measured: Sequence[Measured], measure: str) -> bool:
    """Return whether all errors are within the floor of their budget."""
    return all(
        getattr(m.error, measure)
        <= m.budget.floor * (m.error.scale if measure == "max_abs" else 1.0)
        for m in measured
    )


def _common(found: Sequence[int], before: Sequence[int]) -> int:
    """Return how many comparison points two runs share from the start."""
    pairs = zip(found, before, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(found), len(before)))
