"""A report for people: on a terminal, and as Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from fwl_export.parity.cases import MIXED
from fwl_export.parity.compare import Prediction, pooled
from fwl_export.parity.coverage import coverage_table
from fwl_export.parity.drift import FREE_RUNNING, LOGITS, MODE_NAMES, MODES
from fwl_export.parity.report.data import Report
from fwl_export.parity.verdict import (
    COULD_NOT_RUN,
    OUTSIDE,
    WITHIN,
    CandidateVerdict,
    RunVerdict,
    Spot,
)
from fwl_export.printable import markdown, markdown_code, one_line

LINES, COLUMNS = 30, 80

# Largest numbers of rows and columns in the tables.
_CANDIDATES = 3
_TENSORS = 4
_DRIFT_CANDIDATES = 1
_DRIFT_POINTS = 5
# Widths of columns.
_NAME = 21
_TENSOR_NAME = 18
_MODE = max(map(len, MODE_NAMES.values()))

_PRECISIONS = {"fp32": "float32", "fp16": "float16", "fp64": "float64"}
_VERDICTS = {WITHIN: "within budget", OUTSIDE: "OUTSIDE BUDGET", COULD_NOT_RUN: "COULD NOT RUN"}

_NOT_FINITE = "NOT FINITE"

_LEGEND = "use = error ÷ allowed error; allowed = k × PyTorch's own {precision} error"
_TENSOR_LEGEND = ("max: largest error; RMS: relative RMS error; teacher-forced: from right states",)


def to_text(report: Report) -> str:
    """Return a summary of at most `LINES` lines of `COLUMNS` columns."""
    strict = ", every budget halved" if report.strict else ""
    lines = [
        _fit(
            f"{report.bundle} against {report.reference}; text {report.text or '(ids)'}, "
            f"seed {report.seed}{strict}"
        ),
        _fit(f"cases: {_cases(report)} tokens"),
        "",
        *_candidate_table(report),
    ]
    shown = _most_used(report.candidates)
    if shown:
        lines += ["", *_tensor_table(shown), *_TENSOR_LEGEND]
        lines += _drift_table(report.candidates)
    lines += ["", *_coverage_table(report)]
    lines += ["", _fit(verdict_line(report))]
    return "\n".join(lines)


def to_markdown(report: Report) -> str:
    """Return a summary as Markdown, for example for a pull request."""
    lines = [
        f"### Parity of {markdown(report.bundle)}: {_VERDICTS[report.status].lower()}",
        "",
        "| candidate | verdict | use | closest to its limit | KL, nats | top-1 | perplexity |",
        "|---|---|---:|---|---:|---:|---:|",
    ]
    for candidate in report.candidates:
        spot = candidate.closest
        cells = [
            markdown_code(candidate.name),
            _VERDICTS[candidate.status].lower(),
            share(candidate.use),
        ]
        if failure := candidate.not_finite_at:
            cells[-1] = markdown(failure.place)
        cells.append(
            f"{markdown_code(spot.tensor.name)} ({spot.run.case}, {MODE_NAMES[spot.run.mode]})"
            if spot
            else ""
        )
        cells += _prediction_cells(candidate)
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        f"Reference: {markdown_code(report.reference)}. Cases: {_cases(report)} tokens; "
        f"seed {report.seed}. *Use* is the error of the tensor beside it divided by its budget "
        "(the allowed error); "
        "above 100% is outside. KL divergence, top-1 agreement and perplexity (with its relative "
        f"change) compare predictions in case {_first_case(report)}, free-running.",
    ]
    lines += (
        ["", *(f"- {markdown(problem)}" for problem in report.problems())]
        if report.problems()
        else []
    )
    if report.command:
        lines += ["", markdown_code(report.command)]
    return "\n".join(lines) + "\n"


def verdict_line(report: Report) -> str:
    """Return the verdict in one sentence."""
    used = [candidate for candidate in report.candidates if candidate.closest]
    if report.passed:
        most = max(used, key=lambda candidate: candidate.use)
        assert most.closest is not None
        name = most.closest.tensor.name
        return f"within budget: the largest use is {share(most.use)}, by {name} of {most.name}"
    broken = {c.name: failure for c in report.candidates if (failure := c.not_finite_at)}
    parts = [f"{_NOT_FINITE}: {name} {failure.brief_place}" for name, failure in broken.items()]
    parts += [
        f"{_VERDICTS[status]}: {', '.join(names)}"
        for status in (OUTSIDE, COULD_NOT_RUN)
        if (
            names := [
                c.name for c in report.candidates if c.status == status and c.name not in broken
            ]
        )
    ]
    return "; ".join(parts)


def share(use: float) -> str:
    """Return a use, a share of a budget, in at most 6 columns."""
    if use < 10:
        return f"{use:.0%}"
    return f"{use:.0f}x" if use < 1e4 else ">9999x"


def _cases(report: Report) -> str:
    """Return the cases with their tokens; those of the covering design together."""
    tokens: dict[str, int] = {}
    for run in report.cases:
        name = MIXED if run.case.name.startswith(MIXED) else run.case.name
        tokens[name] = tokens.get(name, 0) + run.case.tokens
    return ", ".join(f"{name} {count}" for name, count in tokens.items())


def _first_case(report: Report) -> str:
    return report.cases[0].case.name


def _candidate_table(report: Report) -> Iterator[str]:
    yield (
        f"{'candidate':{_NAME}} {'verdict':14} {'use':>6} {'KL, nats':>9} {'top-1':>8} "
        f"{'perplexity':>10} {'change':>6}"
    )
    ranked = sorted(report.candidates, key=lambda c: c.passed)
    shown = ranked if len(ranked) <= _CANDIDATES else ranked[: _CANDIDATES - 1]
    for candidate in shown:
        verdict = _VERDICTS[candidate.status]
        cells = f"{_short(candidate.name):{_NAME}} {verdict:14}"
        if failure := candidate.not_finite_at:
            cells = f"{_short(candidate.name):{_NAME}} {_NOT_FINITE:14} {failure.brief_place}"
        elif overall := _text_predictions(candidate):
            cells += (
                f" {share(candidate.use):>6} {overall.kl:9.1e} {overall.top1:8.2%} "
                f"{overall.perplexity:10.3f} {overall.perplexity_change:+6.0e}"
            )
        yield _fit(cells.rstrip())
    if len(shown) < len(ranked):
        yield f"and {len(ranked) - len(shown)} more"
    precisions = sorted({candidate.precision for candidate in report.candidates})
    yield _fit(_LEGEND.format(precision=_PRECISIONS.get(precisions[0], precisions[0])))
    yield f"KL, top-1, perplexity: case {_first_case(report)}, free-running"


def _coverage_table(report: Report) -> Iterator[str]:
    """Yield what was tried, a line for each factor."""
    for name, words in coverage_table(report.coverage):
        yield _fit(f"tried: {name:9} {words}")


def _prediction_cells(candidate: CandidateVerdict) -> list[str]:
    found = _text_predictions(candidate)
    if found is None:
        return ["", "", ""]
    change = f"{found.perplexity:.3f} ({found.perplexity_change:+.0e})"
    return [f"{found.kl:.1e}", f"{found.top1:.2%}", change]


def _text_predictions(candidate: CandidateVerdict) -> Prediction | None:
    """Return the distance of all predictions in the first case, free-running."""
    for run in candidate.runs:
        if run.mode == FREE_RUNNING and run.predictions:
            return pooled(run.predictions)
    return None


def _most_used(candidates: Sequence[CandidateVerdict]) -> list[tuple[str, Spot]]:
    """Return the tensors closest to their limits, each with its candidate's name and worst spot.

    The logits come first; the others are sorted by use.
    """
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
        f"{'tensor':{_TENSOR_NAME}} {'candidate':13} {'case':6} {'mode':{_MODE}} {'max':>5} "
        f"{'RMS':>5} {'use':>6} {'tokens':>6}"
    )
    for name, (run, tensor, at) in spots:
        yield (
            f"{_short(tensor.name, _TENSOR_NAME):{_TENSOR_NAME}} {_short(name, 13):13} "
            f"{run.case:6} {MODE_NAMES[run.mode]:{_MODE}} "
            f"{at.error.max_abs:5.0e} {at.error.relative_rms:5.0e} {share(at.use):>6} "
            f"{at.tokens_read:>6}"
        )


def _drift_table(candidates: Sequence[CandidateVerdict]) -> Iterator[str]:
    """Yield how the relative RMS error of the logits changes as the first case is read."""
    rows: list[tuple[str, RunVerdict]] = []
    for candidate in candidates:
        first = candidate.runs[0].case if candidate.runs else ""
        rows += [
            (candidate.name, run) for run in candidate.runs if run.case == first and run.tensors
        ]
    rows = rows[: len(MODES) * _DRIFT_CANDIDATES]
    longest = max((run.tokens_read for _, run in rows), key=len)
    last = len(longest) - 1
    chosen = sorted({round(i * last / (_DRIFT_POINTS - 1)) for i in range(_DRIFT_POINTS)})
    head = "drift: rel RMS of logits at token"
    yield f"{head:34}" + "".join(f"{longest[i]:>8}" for i in chosen)
    for name, run in rows:
        errors = [measured.error.relative_rms for measured in run.tensors[0].points]
        cells = "".join(f"{errors[i]:8.1e}" if i < len(errors) else " " * 8 for i in chosen)
        yield f"  {_short(name, 17):17} {MODE_NAMES[run.mode]:{_MODE}}{cells}".rstrip()


def _short(name: str, width: int = _NAME) -> str:
    name = one_line(name)
    return name if len(name) <= width else "…" + name[1 - width :]


def _fit(line: str) -> str:
    line = one_line(line)
    return line if len(line) <= COLUMNS else line[: COLUMNS - 1] + "…"
