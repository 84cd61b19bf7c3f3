"""A report for people: on a terminal, and as Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from fwl_export.parity.compare import Prediction, pooled
from fwl_export.parity.drift import FREE_RUNNING, LOGITS
from fwl_export.parity.report.data import Report
from fwl_export.parity.verdict import (
    COULD_NOT_RUN,
    OUTSIDE,
    WITHIN,
    CandidateVerdict,
    RunVerdict,
    Spot,
)

LINES, COLUMNS = 30, 100

_CANDIDATES = 5  # shown at most
_TENSORS = 7
_DEPTHS = 8
_NAME = 26

_VERDICTS = {WITHIN: "within budget", OUTSIDE: "OUTSIDE BUDGET", COULD_NOT_RUN: "COULD NOT RUN"}


def to_text(report: Report) -> str:
    """Return a summary of at most `LINES` lines of `COLUMNS` columns."""
    lines = [
        _fit(
            f"{report.bundle} against {report.reference}; text {report.text or '(ids)'}, seed "
            f"{report.seed}{', every budget halved' if report.strict else ''}"
        ),
        _fit(
            "cases: "
            + ", ".join(f"{run.case.name} {run.case.tokens}" for run in report.cases)
            + " tokens, free running and forced"
        ),
        "",
        *_candidate_table(report),
    ]
    shown = _most_used(report.candidates)
    if shown:
        lines += ["", *_tensor_table(shown)]
        lines += ["", *_drift_table(report.candidates)]
    lines += ["", _fit(verdict_line(report))]
    return "\n".join(lines)


def to_markdown(report: Report) -> str:
    """Return a summary for a pull request."""
    head = "| candidate | verdict | use | closest to its limit | KL, nats | top-1 | perplexity |"
    lines = [
        f"### Parity of {report.bundle}: {_VERDICTS[report.status].lower()}",
        "",
        head,
        "|---|---|---:|---|---:|---:|---:|",
    ]
    for candidate in report.candidates:
        spot = candidate.closest
        cells = [f"`{candidate.name}`", _VERDICTS[candidate.status].lower(), share(candidate.use)]
        cells.append(f"`{spot.tensor.name}` ({spot.run.case}, {spot.run.mode})" if spot else "")
        cells += _prediction_cells(candidate)
        lines.append(f"| {' | '.join(cells)} |")
    cases = ", ".join(f"{run.case.name} {run.case.tokens}" for run in report.cases)
    lines += [
        "",
        f"Against `{report.reference}`, {cases} tokens, seed {report.seed}; use is the share of "
        "the error budget that the tensor closest to its limit takes.",
    ]
    lines += ["", *(f"- {problem}" for problem in report.problems())] if report.problems() else []
    if report.command:
        lines += ["", f"`{report.command}`"]
    return "\n".join(lines) + "\n"


def verdict_line(report: Report) -> str:
    """Return the verdict in one sentence."""
    used = [candidate for candidate in report.candidates if candidate.closest]
    if report.passed:
        most = max(used, key=lambda candidate: candidate.use)
        assert most.closest is not None
        name = most.closest.tensor.name
        return f"within budget: {most.name} comes closest, {name} with {share(most.use)} of it"
    by_status = [
        f"{_VERDICTS[status]}: {', '.join(names)}"
        for status in (OUTSIDE, COULD_NOT_RUN)
        if (names := [c.name for c in report.candidates if c.status == status])
    ]
    return "; ".join(by_status)


def share(use: float) -> str:
    """Return a share of a budget in at most 6 columns."""
    if use < 10:
        return f"{use:.0%}"
    return f"{use:.0f}x" if use < 1e4 else ">9999x"


def _candidate_table(report: Report) -> Iterator[str]:
    yield (
        f"{'candidate':{_NAME}} {'verdict':14} {'use':>6} {'KL, nats':>9} {'top-1':>8} "
        f"{'top-5':>8} {'perplexity':>10} {'change':>8}"
    )
    ranked = sorted(report.candidates, key=lambda c: c.passed)
    for candidate in ranked[:_CANDIDATES]:
        cells = f"{_short(candidate.name):{_NAME}} {_VERDICTS[candidate.status]:14}"
        if overall := _text_predictions(candidate):
            cells += (
                f" {share(candidate.use):>6} {overall.kl:9.1e} {overall.top1:8.2%} "
                f"{overall.top5:8.2%} {overall.perplexity:10.3f} {overall.perplexity_change:+8.0e}"
            )
        yield cells.rstrip()
    if rest := ranked[_CANDIDATES:]:
        yield f"and {len(rest)} more"


def _prediction_cells(candidate: CandidateVerdict) -> list[str]:
    found = _text_predictions(candidate)
    if found is None:
        return ["", "", ""]
    change = f"{found.perplexity:.3f} ({found.perplexity_change:+.0e})"
    return [f"{found.kl:.1e}", f"{found.top1:.2%}", change]


def _text_predictions(candidate: CandidateVerdict) -> Prediction | None:
    """Return how the first case was predicted, free running."""
    for run in candidate.runs:
        if run.mode == FREE_RUNNING and run.predictions:
            return pooled(run.predictions)
    return None


def _most_used(candidates: Sequence[CandidateVerdict]) -> list[tuple[str, Spot]]:
    """Return the tensors closest to their limits, each of a candidate at its worst place."""
    spots: dict[tuple[str, str], Spot] = {}
    for candidate in candidates:
        for run in candidate.runs:
            for tensor in run.tensors:
                spot = Spot(run, tensor, tensor.worst)
                key = (candidate.name, tensor.name)
                if key not in spots or spot.measured.use > spots[key].measured.use:
                    spots[key] = spot
    ranked = sorted(spots.items(), key=lambda item: -item[1].measured.use)
    logits = [item for item in ranked if item[0][1] == LOGITS][:1]
    rest = [item for item in ranked if item not in logits][: _TENSORS - len(logits)]
    return [(key[0], spot) for key, spot in (*logits, *rest)]


def _tensor_table(spots: Sequence[tuple[str, Spot]]) -> Iterator[str]:
    yield (
        f"{'tensor':19} {'candidate':16} {'case':6} {'mode':6} {'max abs':>8} {'budget':>8} "
        f"{'rel RMS':>8} {'budget':>8} {'use':>6} {'token':>6}"
    )
    for name, (run, tensor, at) in spots:
        yield (
            f"{_short(tensor.name, 19):19} {_short(name, 16):16} {run.case:6} {run.mode:6} "
            f"{at.error.max_abs:8.1e} {at.budget.max_abs:8.1e} {at.error.relative_rms:8.1e} "
            f"{at.budget.relative_rms:8.1e} {share(at.use):>6} {at.tokens_read:>6}"
        )


def _drift_table(candidates: Sequence[CandidateVerdict]) -> Iterator[str]:
    """Yield how the logits' relative RMS goes with depth, in the first case."""
    rows: list[tuple[str, RunVerdict]] = []
    for candidate in candidates:
        first = candidate.runs[0].case if candidate.runs else ""
        rows += [
            (candidate.name, run) for run in candidate.runs if run.case == first and run.tensors
        ]
    rows = rows[: 2 * 3]  # free and forced of three candidates
    longest = max((run.tokens_read for _, run in rows), key=len)
    count = len(longest)
    chosen = sorted({round(i * (count - 1) / max(_DEPTHS - 1, 1)) for i in range(_DEPTHS)})
    yield f"{'drift of the logits at token':34}" + "".join(f"{longest[i]:>8}" for i in chosen)
    for name, run in rows:
        errors = [measured.error.relative_rms for measured in run.tensors[0].points]
        cells = "".join(f"{errors[i]:8.1e}" if i < len(errors) else " " * 8 for i in chosen)
        yield f"  {_short(name, 24):24} {run.mode:7}{cells}".rstrip()


def _short(name: str, width: int = _NAME) -> str:
    return name if len(name) <= width else "…" + name[1 - width :]


def _fit(line: str) -> str:
    return line if len(line) <= COLUMNS else line[: COLUMNS - 1] + "…"
