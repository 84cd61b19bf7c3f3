"""A report as one HTML file that needs no network: light and dark, for screen and paper.

The page is made from the data of report.json, so a saved report is enough to make it again.
Everything that comes from there is escaped. The script sorts tables and reads no data.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from string import Template
from typing import Any

from fwl_export.parity.coverage import coverage_table
from fwl_export.parity.drift import FREE_RUNNING, LOGITS, MODE_NAMES, NOT_FINITE
from fwl_export.printable import printable

Data = Mapping[str, Any]

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _BOTTOM, _TOP = 640, 260, 58, 24, 34, 12
_STATUS = {"within": "Within budget", "outside": "Outside budget", "could not run": "Could not run"}


def to_html(report: Data) -> str:
    """Return the page of a report.

    Args:
      report: Data of the report, as `Report.to_dict` returns it and report.json holds it.
    """
    bundle, text = report["bundle"], report["text"]
    status = str(report["status"])
    problems = "".join(f"<li>{_text(problem)}</li>" for problem in report["problems"])
    cases = ", ".join(f"{case['name']} ({case['tokens']} tokens)" for case in report["cases"])
    return _PAGE.substitute(
        title=_text(f"Parity of {bundle['name']}"),
        status=_text(status.replace(" ", "-")),
        verdict=_text(_verdict(report)),
        summary=_text(
            f"Reference: {report['settings']['reference']}. Bundle: {bundle['precision']}, model "
            f"{bundle['model_id'][:12]}. Text: {text['name'] or 'token ids'}. Cases: {cases}. "
            f"Seed: {report['settings']['seed']}."
        ),
        problems=f"<ul>{problems}</ul>" if problems else "",
        bars=_budget_bars(report["candidates"]),
        coverage=_coverage(report["coverage"]),
        candidates="".join(_candidate(c) for c in report["candidates"]),
        environment=_environment(report),
        command=_text(report["command"]),
    )


def to_html_table(report: Data) -> str:
    """Return a compact table with the verdict, for notebooks.

    Args:
      report: Data of the report, as `Report.to_dict` returns it.
    """
    head = "".join(
        f"<th>{name}</th>"
        for name in ("candidate", "verdict", "use", "closest to its limit", "KL, nats", "top-1")
    )
    rows = "".join(
        f"<tr>{''.join(f'<td>{_text(cell)}</td>' for cell in _cells(candidate))}</tr>"
        for candidate in report["candidates"]
    )
    problems = "".join(f"<li>{_text(problem)}</li>" for problem in report["problems"])
    verdict = _verdict(report)
    return (
        f"<div><p><b>Parity of {_text(report['bundle']['name'])}: {_text(verdict)}</b>, "
        f"against {_text(report['settings']['reference'])}</p><table><thead><tr>{head}</tr></thead>"
        f"<tbody>{rows}</tbody></table><p>use: error of the tensor beside it divided by its "
        "budget; more than 100% is outside. KL and top-1 agreement: predictions of the first case, "
        f"free-running.</p>{f'<ul>{problems}</ul>' if problems else ''}</div>"
    )


def _verdict(report: Data) -> str:
    """Return the verdict, with the names of the candidates that did not pass."""
    status = str(report["status"])
    words = _STATUS.get(status, status)
    if names := _names(report, status) if status != "within" else "":
        words += f": {names}"
    if status == "outside" and (names := _names(report, "could not run")):
        words += f"; could not run: {names}"
    return words


def _names(report: Data, status: str) -> str:
    return ", ".join(str(c["name"]) for c in report["candidates"] if c["status"] == status)


def _cells(candidate: Data) -> list[str]:
    """Return the row of a candidate in the compact table, not escaped."""
    cells = [candidate["name"], str(candidate["status"])]
    worst = candidate["worst"]
    cells.append(_share_of(candidate) if candidate["runs"] else "")
    cells.append(f"{worst['tensor']} ({worst['case']}, {_mode(worst)})" if worst else "")
    totals = [run["overall"] for run in candidate["runs"] if run["mode"] == FREE_RUNNING]
    total = next((total for total in totals if total), None)
    return [*cells, *([_number(total["kl"]), _percent(total["top1"])] if total else ["", ""])]


def _budget_bars(candidates: Sequence[Data]) -> str:
    rows = []
    for candidate in candidates:
        use = candidate["use"]
        share = 100 if use is None else min(100 * use, 100)
        label = candidate["status"] if not candidate["runs"] else _share_of(candidate)
        rows.append(
            f'<tr><th scope="row">{_text(candidate["name"])}</th><td class="bar">'
            f'<span class="track"><span class="{_kind(use)}" style="width:{share:.1f}%"></span>'
            f"</span></td><td>{_text(label)}</td></tr>"
        )
    return (
        '<table class="bars"><caption>Largest use of a budget by a tensor of each candidate; 100% '
        'is the limit</caption><thead><tr><th scope="col">Candidate</th><th scope="col">Budget</th>'
        f'<th scope="col">Use</th></tr></thead><tbody>{"".join(rows)}</tbody></table>'
    )


def _coverage(coverage: Data) -> str:
    rows = "".join(
        f'<tr><th scope="row">{_text(name)}</th><td>{_text(words)}</td></tr>'
        for name, words in coverage_table(coverage)
    )
    return (
        '<section id="coverage"><h2>What was tried</h2><div class="scroll" tabindex="0"><table>'
        f"<caption>Counted in the calls that were made</caption><tbody>{rows}</tbody></table>"
        "</div></section>"
    )


def _candidate(candidate: Data) -> str:
    verdict = _STATUS.get(str(candidate["status"]), str(candidate["status"]))
    parts = [f"<section><h2>{_text(candidate['name'])}</h2><p>{_text(verdict)}"]
    parts.append(f": {_text(candidate['reason'])}" if candidate["reason"] else "")
    parts.append(
        f". Runtime: {_text(candidate['runtime'])}</p>" if candidate["runtime"] else "</p>"
    )
    if candidate["worst"]:
        parts.append(_worst(candidate["worst"]))
    failed = [run["status"] != "within" for run in candidate["runs"]]
    for number, run in enumerate(candidate["runs"]):
        name = f"{run['case']}, {_mode(run)}"
        opened = " open" if failed[number] or (number == 0 and not any(failed)) else ""
        mark = ' class="failed"' if failed[number] else ""
        parts.append(f"<details{opened}{mark}><summary><h3>{_text(name)}</h3>: ")
        parts.append(f"{_text(_outcome(run))}</summary>{_run(run)}</details>")
    return "".join([*parts, "</section>"])


def _outcome(run: Data) -> str:
    """Return how a run went, in words."""
    failure = run["failure"]
    if failure and failure["kind"] == NOT_FINITE:
        return _place(failure)
    return f"uses {_share(run['use'])} of a budget"


def _place(failure: Data) -> str:
    """Return where a value was not finite, in words."""
    token = failure.get("token")
    if token is None:
        return f"not finite up to token {failure['depth']}"
    text = failure.get("token_text")
    shown = f", text {str(text)!r}" if text else ""
    return f"not finite at token {token} of row {failure['row']} (id {failure['token_id']}{shown})"


def _run(run: Data) -> str:
    failure = run["failure"]
    parts = []
    if failure:
        parts.append(
            f"<p>{_text(failure['runtime'])} failed at call {_text(failure['step'])} (up "
            f"to token {_text(failure['depth'])}): {_text(failure['message'])}</p>"
        )
    if not run["tensors"] or not run["depths"]:
        return "".join([*parts, "<p>Nothing was compared.</p>"])
    total = run["overall"]
    if total:
        parts.append(
            f"<p>Predictions against the reference: KL {_number(total['kl'])} nats, top-1 "
            f"agreement {_percent(total['top1'])}, perplexity {_number(total['perplexity'], 5)} "
            f"instead of {_number(total['reference_perplexity'], 5)} (relative "
            f"change {_number(total['perplexity_change'], 2)}).</p>"
        )
    ranked = sorted(run["tensors"], key=lambda t: (t["name"] != LOGITS, -_use(t["use"])))
    parts += [_plot(run["depths"], ranked[:3]), _heat(run), _tensor_table(run["tensors"])]
    return "".join(parts)


@dataclass(frozen=True)
class _Axes:
    """Logarithmic axes of a plot, and where values lie on them in SVG units.

    Attributes:
      first: Logarithm of the smallest number of tokens.
      last: Logarithm of the largest number of tokens.
      low: Exponent of the lowest grid line.
      high: Exponent of the highest grid line.
    """

    first: float
    last: float
    low: int
    high: int

    def x(self, tokens: float) -> float:
        share = (math.log10(max(tokens, 1)) - self.first) / max(self.last - self.first, 1e-9)
        return _LEFT + share * (_WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        share = (math.log10(max(value, 10.0**self.low)) - self.low) / (self.high - self.low)
        return _HEIGHT - _BOTTOM - share * (_HEIGHT - _BOTTOM - _TOP)

    def shapes(self, points: Sequence[int]) -> Iterator[str]:
        """Yield the grid lines and the labels of both axes."""
        for e in range(self.low, self.high + 1):
            y = self.y(10.0**e)
            yield (
                f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" '
                f'y2="{y:.1f}"/>'
                f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">1e{e}</text>'
            )
        powers = (10**e for e in range(int(self.first) + 1, int(self.last) + 1))
        for tokens in sorted({points[0], points[-1], *powers}):
            yield (
                f'<text x="{self.x(tokens):.1f}" y="{_HEIGHT - 14}" text-anchor="middle">{tokens}'
                "</text>"
            )


def _plot(points: Sequence[int], tensors: Sequence[Data]) -> str:
    """Return the drift curves of some tensors, and their budgets, on logarithmic axes.

    Args:
      points: Tokens the first row had read at each comparison point.
      tensors: Tensors to plot, as in the report's data.
    """
    keys = (("relative_rms", "line"), ("budget_relative_rms", "budget"))
    positive = [value for tensor in tensors for key, _ in keys for value in tensor[key] if value]
    if not positive:
        return "<p>The logits and the tensors closest to their limits do not differ at all.</p>"
    low = math.floor(math.log10(min(positive)))
    high = max(math.ceil(math.log10(max(positive))), low + 1)
    axes = _Axes(math.log10(max(points[0], 1)), math.log10(max(points[-1], 2)), low, high)
    shapes = list(axes.shapes(points))
    for number, tensor in enumerate(tensors):
        for key, kind in keys:
            pairs = zip(points, tensor[key], strict=False)
            line = " ".join(f"{axes.x(x):.1f},{axes.y(y):.1f}" for x, y in pairs if y)
            shapes.append(f'<polyline class="{kind} c{number}" points="{line}"/>')
    legend = "".join(
        f'<li><span class="key c{n}"></span>{_text(t["name"])}</li>' for n, t in enumerate(tensors)
    )
    return (
        f'<figure><svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="{_plot_in_words(points, tensors)}">{"".join(shapes)}</svg>'
        f'<ul class="legend">{legend}</ul><figcaption>Relative RMS error against tokens read by '
        "the first row. Dashed: the budget, which is the largest allowed error. Both axes are "
        "logarithmic.</figcaption></figure>"
    )


def _plot_in_words(points: Sequence[int], tensors: Sequence[Data]) -> str:
    """Return a description of a plot for screen readers, escaped."""
    ends = "; ".join(
        f"{t['name']} {_number(t['relative_rms'][-1])} of at most "
        f"{_number(t['budget_relative_rms'][-1])}"
        for t in tensors
        if t["relative_rms"]
    )
    return _text(
        f"Relative RMS error against tokens read, on logarithmic axes. At {points[-1]}: {ends}."
    )


def _heat(run: Data) -> str:
    """Return the heat map; its colors span what there is, up to the whole budget."""
    uses = [_use(use) for tensor in run["tensors"] for use in tensor["uses"]]
    top = max((use for use in uses if use <= 1), default=0.0) or 1.0
    head = "".join(f'<th scope="col">{_text(tokens)}</th>' for tokens in run["depths"])
    rows = []
    for tensor in run["tensors"]:
        cells = "".join(
            f'<td class="h{_heat_step(use, top)}" title="{_share(use)}">'
            f'<span class="hidden">{_share(use)}</span></td>'
            for use in tensor["uses"]
        )
        rows.append(f'<tr><th scope="row">{_text(tensor["name"])}</th>{cells}</tr>')
    return (
        "<details open><summary>Use of the budget by tensor and tokens read</summary><div "
        'class="scroll" tabindex="0"><table class="heat"><caption>Use of the budget, in five steps '
        f"from 0 to {_share(top)}, the largest here within the budget: {_heat_key(top)} orange: "
        "outside the budget. Columns: tokens read by the first row</caption><thead><tr>"
        '<th scope="col">Tensor</th>'
        f"{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div></details>"
    )


def _tensor_table(tensors: Sequence[Data]) -> str:
    names = ("Tensor", "Use", "Max abs", "Relative RMS", "Off by 1 ULP or more")
    head = "".join(f'<th scope="col"><button type="button">{name}</button></th>' for name in names)
    rows = []
    for tensor in sorted(tensors, key=lambda t: -_use(t["use"])):
        ulp = tensor["ulp"]
        beyond = sum(ulp[2:]) / max(sum(ulp), 1) if ulp else None
        largest = [max((_use(v) for v in tensor[k]), default=0.0) for k in _MEASURES]
        numbers = [_use(tensor["use"]), *largest]
        shown = [_share(tensor["use"]), *(_number(v) for v in largest)]
        cells = [*zip(numbers, shown, strict=True), (_use(beyond or 0.0), _percent(beyond))]
        rows.append(
            f'<tr><th scope="row" data-sort="{_text(tensor["name"])}">{_text(tensor["name"])}</th>'
            + "".join(f'<td data-sort="{number!r}">{_text(text)}</td>' for number, text in cells)
            + "</tr>"
        )
    return (
        '<div class="scroll" tabindex="0"><table class="sortable"><caption>All tensors, with their '
        "largest errors over the run, and the share of elements that differ by one unit in the "
        f"last place (ULP) or more. Click a heading to sort</caption><thead><tr>{head}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


_MEASURES = ("max_abs", "relative_rms")


def _worst(worst: Data) -> str:
    tokens = []
    for place, token in enumerate(worst["tokens"] or ()):
        text = str(token["text"])
        if place == worst["at"]:
            shown = repr(text) if text.isspace() else text
            tokens.append(f"<mark>{_text(shown)}</mark>")
        else:
            tokens.append(_text(text))
    context = f"<blockquote>{''.join(tokens)}</blockquote>" if tokens else ""
    if worst["use"] is None and worst["candidate"] is None and worst["reference"] is None:
        return (
            f'<p class="bad"><b>Not finite</b> in case {_text(worst["case"])}, '
            f"{_text(_mode(worst))}: {_text(worst['tensor'])} in call {_text(worst['step'])}, row "
            f"{_text(worst['row'])}.{' The place in its text:' if context else ''}</p>{context}"
        )
    return (
        f"<p>Closest to its limit: <b>{_text(worst['tensor'])}</b> uses {_share(worst['use'])} of "
        f"its budget in case {_text(worst['case'])}, {_text(_mode(worst))}, up to token "
        f"{_text(worst['depth'])}. Largest difference: {_values(worst)} in call "
        f"{_text(worst['step'])}, row {_text(worst['row'])}."
        f"{' Text around the place:' if context else ''}</p>{context}"
    )


def _values(place: Data) -> str:
    """Return both values at a place; report.json holds six digits of each."""
    found, expected = (_number(place[key], 6) for key in ("candidate", "reference"))
    return f"{found} instead of {expected}" if found != expected else f"{found} in both (rounded)"


def _environment(report: Data) -> str:
    entries = {"created": report["created"], "seconds": f"{report['seconds']:.0f}"}
    for key, value in report["environment"].items():
        if isinstance(value, Mapping):
            entries |= {str(name): str(version) for name, version in value.items()}
        else:
            entries[key] = str(value)
    rows = "".join(
        f'<tr><th scope="row">{_text(key)}</th><td>{_text(value)}</td></tr>'
        for key, value in entries.items()
    )
    return f"<table><caption>Environment of the check</caption><tbody>{rows}</tbody></table>"


def _use(value: float | None) -> float:
    """Return a number of a report, where null stands for a number that is not finite."""
    return math.inf if value is None else float(value)


def _mode(item: Data) -> str:
    """Return the mode of a run or place in words."""
    return MODE_NAMES.get(item["mode"], str(item["mode"]))


def _heat_step(use: float | None, top: float) -> int:
    """Return the color of a use, 0 to 4 for uses up to `top`, and 5 outside the budget."""
    return 5 if _use(use) > 1 else int(_use(use) / top * 4.999)


def _heat_key(top: float) -> str:
    return " ".join(
        f'<span class="step h{step}"></span> to {top * (step + 1) / 5:.0%},' for step in range(5)
    )


def _kind(use: float | None) -> str:
    return "over" if _use(use) > 1 else "fill"


def _share_of(candidate: Data) -> str:
    """Return the use of a candidate, or where it was not finite."""
    failures = (run["failure"] for run in candidate["runs"])
    wrong = next((f for f in failures if f and f["kind"] == NOT_FINITE), None)
    return _place(wrong) if wrong else _share(candidate["use"])


def _share(use: float | None) -> str:
    if use is None:
        return "infinite"
    return f"{use:.0%}" if use < 100 else f"{use:.3g} x"


def _number(value: float | None, digits: int = 3) -> str:
    return "not finite" if value is None or not math.isfinite(value) else f"{value:.{digits}g}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.2%}"


def _text(value: Any) -> str:
    return escape(printable(str(value)), quote=True)


# Blue and orange, which people with red-green color blindness can tell apart.
_PAGE = Template("""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>$title</title><style>
:root{color-scheme:light dark;--bg:#fff;--fg:#1a1c20;--dim:#59606b;--rule:#d6dae0;--good:#0063a8;
--bad:#b34700;--c1:#b34700;--c2:#6b3fa0;--h:0,99,168}
@media(prefers-color-scheme:dark){:root{--bg:#15171b;--fg:#e8eaed;--dim:#a5adb8;--rule:#3a404a;
--good:#5db4f0;--bad:#ff9d4d;--c1:#ff9d4d;--c2:#c9a5f5;--h:93,180,240}}
*{box-sizing:border-box}body{margin:0 auto;padding:1rem;max-width:58rem;background:var(--bg);
color:var(--fg);font:16px/1.5 system-ui,sans-serif;overflow-wrap:anywhere}
h1{font-size:1.5rem;margin:.2rem 0}h2{font-size:1.25rem;margin:1.6rem 0 .3rem;
border-top:1px solid var(--rule);padding-top:.8rem}h3{font-size:1rem;display:inline}
.verdict{border-left:.4rem solid var(--good);padding:.3rem .8rem;font-size:1.3rem;font-weight:600}
.outside,.could-not-run{border-color:var(--bad);color:var(--bad)}.bad{color:var(--bad)}
.failed{border-left:.25rem solid var(--bad);padding-left:.6rem}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums;font-size:.9rem}
caption,figcaption,.note{color:var(--dim);text-align:left;font-size:.85rem;padding:.4rem 0}
th,td{text-align:right;padding:.25rem .5rem;border-bottom:1px solid var(--rule)}
th:first-child,.bars th:nth-child(2),#env td,#coverage td{text-align:left;font-weight:500}
.scroll{overflow-x:auto}.scroll th{overflow-wrap:normal}.bar{width:50%}
.track{display:block;height:.8rem;background:var(--rule)}
.track span{display:block;height:100%}.fill{background:var(--good)}.over{background:var(--bad)}
button{font:inherit;color:inherit;background:none;border:0;padding:0;cursor:pointer;
text-decoration:underline dotted;text-align:inherit}
[aria-sort=descending] button::after{content:" \\25BE"}
[aria-sort=ascending] button::after{content:" \\25B4"}
thead th{overflow-wrap:normal}
details{margin:.8rem 0}summary{cursor:pointer}figure{margin:.5rem 0}svg{width:100%;height:auto}
svg text{fill:var(--dim);font:12px system-ui,sans-serif}.grid{stroke:var(--rule)}
polyline{fill:none;stroke-width:2}.budget{stroke-dasharray:5 4;stroke-width:1.2}
.c0{stroke:var(--good);--key:var(--good)}.c1{stroke:var(--c1);--key:var(--c1)}
.c2{stroke:var(--c2);--key:var(--c2)}.legend{list-style:none;padding:0;margin:0;display:flex;
flex-wrap:wrap;gap:.2rem 1rem;font-size:.85rem}.key{display:inline-block;width:1rem;height:.25rem;
margin-right:.4rem;vertical-align:middle;background:var(--key)}
.heat td{min-width:1.2rem;padding:0;position:relative}
.heat{font-size:.75rem}.step{display:inline-block;width:1rem;height:.7rem}.h0{background:rgba(var(--h),.05)}
.h1{background:rgba(var(--h),.25)}.h2{background:rgba(var(--h),.45)}
.h3{background:rgba(var(--h),.65)}.h4{background:rgba(var(--h),.9)}.h5{background:var(--bad)}
.hidden{position:absolute;left:0;clip-path:inset(50%);width:1px;height:1px;overflow:hidden}
.scroll{position:relative}
blockquote{margin:.5rem 0 1rem;padding:.4rem .8rem;background:rgba(var(--h),.08);
white-space:pre-wrap}
mark{background:var(--bad);color:var(--bg)}pre{white-space:pre-wrap;background:rgba(var(--h),.08);
padding:.6rem}@media(max-width:500px){svg text{font-size:20px}}
@media print{body{max-width:none;font-size:11px}figure,tr{break-inside:avoid}
.scroll{overflow:visible}.heat th{padding:.1rem .2rem;font-size:8px}.heat td{min-width:0}
*{print-color-adjust:exact}}
</style></head><body><main><h1>$title</h1>
<p class="verdict $status">$verdict</p><p>$summary</p>$problems$bars$coverage
<p class="note">A <b>budget</b> is the largest error that a tensor may have. <b>Use</b> is the error
divided by the budget, which is k times PyTorch&#x27;s own error in the same precision; more than
100% is outside. <b>Free-running</b>: the candidate keeps its own
state throughout, so errors add up. <b>Teacher-forced</b>: every call starts from the
reference&#x27;s state, so only the error of a single step remains.</p>$candidates
<section id="env"><h2>Repeat this check</h2><pre>$command</pre>$environment</section></main>
<script>
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.firstChild.addEventListener("click", () => {
    const down = head.getAttribute("aria-sort") !== "descending";
    heads.forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const key = (row) => row.cells[column].dataset.sort;
    const value = (row) => key(row) === "inf" ? Infinity : Number(key(row));
    const order = (a, b) => column ? value(a) === value(b) ? 0 : value(a) < value(b) ? -1 : 1
      : key(a).localeCompare(key(b));
    const rows = [...table.tBodies[0].rows].sort((a, b) => down ? order(b, a) : order(a, b));
    table.tBodies[0].append(...rows);
  }));
}
</script></body></html>
""")
