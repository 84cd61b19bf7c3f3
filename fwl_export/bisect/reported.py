"""What `check` found wrong, read from its report."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from fwl_export.errors import FwlError, ReportError
from fwl_export.parity.drift import MODE_NAMES
from fwl_export.parity.verdict import OUTSIDE


@dataclass(frozen=True)
class Reported:
    """The first thing that a check found wrong.

    Attributes:
      candidate: Name of the candidate.
      case: Name of the case.
      tokens_read: Tokens that had been read when it was seen, see `ScheduledCall.tokens_read`.
      sentence: What is wrong, in words.
      step: Number of the call, or None if only the tokens are known.
      tensor: Name of the tensor that is wrong, or None if there is none.
      kind: Kind of failure, see `drift.Failure`, or "" if a tensor is outside its budget.
    """

    candidate: str
    case: str
    tokens_read: int
    sentence: str
    step: int | None = None
    tensor: str | None = None
    kind: str = ""


def first_reported(report: Mapping[str, Any], names: Collection[str] | None) -> Reported | None:
    """Return what is wrong in the first case in which something is, or None.

    Args:
      report: Data of a report, see `Report.to_dict`.
      names: Names of the candidates that matter; None means all.

    Raises:
      FwlError: A candidate could not be opened.
      ReportError: The report says nothing about these candidates.
    """
    candidates = [c for c in report["candidates"] if names is None or c["name"] in names]
    if not candidates:
        others = ", ".join(candidate["name"] for candidate in report["candidates"])
        raise ReportError(
            f"the report is about {others}, not about {', '.join(names or ())}; give one of its "
            "candidates with --candidate"
        )
    for candidate in candidates:
        if candidate["reason"]:
            raise FwlError(f"{candidate['name']} could not run: {candidate['reason']}")
    order = [case["name"] for case in report["cases"]]
    wrong = [
        (order.index(run["case"]), candidate["status"] != OUTSIDE, found)
        for candidate in candidates
        for run in candidate["runs"]
        if (found := _of_run(candidate["name"], run))
    ]
    return min(wrong, key=lambda entry: entry[:2])[2] if wrong else None


def _of_run(candidate: str, run: Mapping[str, Any]) -> Reported | None:
    where = f"in case '{run['case']}', {MODE_NAMES[run['mode']]}"
    outside = [
        (depth, -_number(use), tensor["name"])
        for tensor in run["tensors"]
        for depth, use in zip(run["depths"], tensor["uses"], strict=True)
        if _number(use) > 1
    ]
    if outside:
        depth, use, name = min(outside)
        sentence = f"'{name}' is at {-use:.3g} times its budget {where}, after {depth} tokens"
        return Reported(candidate, run["case"], depth, sentence, tensor=name)
    failure = run["failure"]
    if failure is None:
        return None
    sentence = f"{failure['message']}, {where}, at call {failure['step']}"
    return Reported(
        candidate,
        run["case"],
        failure["depth"],
        sentence,
        failure["step"],
        failure["tensor"],
        failure["kind"],
    )


def _number(use: float | None) -> float:
    """Return the use of a budget; reports hold null for one that is infinite."""
    return float("inf") if use is None else use
