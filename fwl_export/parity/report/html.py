"""A report as one HTML file: no network, no framework, light and dark, for screen and paper.

It is made from the data of report.json, so it can be made again from a saved report. Everything
that comes from there is escaped; the script sorts tables and reads no data.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from string import Template
from typing import Any

Data = Mapping[str, Any]

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _BOTTOM, _TOP = 640, 260, 58, 24, 34, 12
_STATUS = {"within": "Within budget", "outside": "Outside budget", "could not run": "Could not run"}


def to_html(report: Data) -> str:
    """Return the page of a report's data, as `Report.to_dict` and report.json give it."""
    bundle, text = report["bundle"], report["text"]
    status = str(report["status"])
    problems = "".join(f"<li>{_text(problem)}</li>" for problem in report["problems"])
    cases = ", ".join(f"{case['name']} ({case['tokens']} tokens)" for case in report["cases"])
    return _PAGE.substitute(
        title=_text(f"Parity of {bundle['name']}"),
        status=_text(status.replace(" ", "-")),
        verdict=_text(_STATUS.get(status, status)),
        summary=_text(
            f"{bundle['precision']}, model {bundle['model_id'][:12]}; {text['name'] or 'text'}: "
            f"{cases}; seed {report['settings']['seed']}, against {report['settings']['reference']}"
        ),
        problems=f"<ul>{problems}</ul>" if problems else "",
        bars=_budget_bars(report["candidates"]),
        candidates="".join(_candidate(c) for c in report["candidates"]),
        environment=_environment(report),
        command=_text(report["command"]),
    )


def _budget_bars(candidates: Sequence[Data]) -> str:
    rows = []
    for candidate in candidates:
        use = candidate["use"]
        share = 100 if use is None else min(100 * use, 100)
        label = candidate["status"] if not candidate["runs"] else _share(use)
        rows.append(
            f'<tr><th scope="row">{_text(candidate["name"])}</th><td class="bar">'
            f'<span class="track"><span class="{_kind(use)}" style="width:{share:.1f}%"></span>'
            f"</span></td><td>{_text(label)}</td></tr>"
        )
    return (
        '<table class="bars"><caption>Largest share of its budget that a tensor uses; 100 % is the '
        'limit</caption><thead><tr><th scope="col">Runtime</th><th scope="col">Use</th>'
        f'<th scope="col">Share</th></tr></thead><tbody>{"".join(rows)}</tbody></table>'
    )


def _candidate(candidate: Data) -> str:
    parts = [f"<section><h2>{_text(candidate['name'])}</h2><p>{_text(candidate['runtime'])}"]
    parts.append(f"; {_text(candidate['status'])}")
    parts.append(f": {_text(candidate['reason'])}</p>" if candidate["reason"] else "</p>")
    if candidate["worst"]:
        parts.append(_worst(candidate["worst"]))
    for number, run in enumerate(candidate["runs"]):
        name = f"{run['case']}, {'own state' if run['mode'] == 'free' else 'single steps'}"
        opened = " open" if number == 0 else ""
        parts.append(f"<details{opened}><summary><h3>{_text(name)}</h3> {_share(run['use'])} of ")
        parts.append(f"the budget</summary>{_run(run)}</details>")
    return "".join([*parts, "</section>"])


def _run(run: Data) -> str:
    failure = run["failure"]
    parts = []
    if failure:
        parts.append(
            f"<p>Stopped at call {failure['step']}, by token {failure['depth']}: "
            f"{_text(failure['message'])}</p>"
        )
    if not run["tensors"] or not run["depths"]:
        return "".join([*parts, "<p>Nothing was compared.</p>"])
    total = run["overall"]
    if total:
        parts.append(
            f"<p>KL {_number(total['kl'])} nats, top-1 agreement {_percent(total['top1'])}, "
            f"perplexity {_number(total['perplexity'])} against "
            f"{_number(total['reference_perplexity'])}</p>"
        )
    ranked = sorted(run["tensors"], key=lambda t: (t["name"] != "logits", -_use(t["use"])))
    parts += [_plot(run["depths"], ranked[:3]), _heat(run), _tensor_table(run["tensors"])]
    return "".join(parts)


def _plot(depths: Sequence[int], tensors: Sequence[Data]) -> str:
    """Return the drift curves of some tensors and their budgets on two log axes."""
    values = [v for t in tensors for key in ("relative_rms", "budget_relative_rms") for v in t[key]]
    positive = [v for v in values if v]
    if not positive:
        return "<p>No difference at all in logits and the tensors closest to their limits.</p>"
    low = math.floor(math.log10(min(positive)))
    high = max(math.ceil(math.log10(max(positive))), low + 1)
    first, last = math.log10(max(depths[0], 1)), math.log10(max(depths[-1], 2))

    def x(depth: float) -> float:
        share = (math.log10(max(depth, 1)) - first) / max(last - first, 1e-9)
        return _LEFT + share * (_WIDTH - _LEFT - _RIGHT)

    def y(value: float) -> float:
        share = (math.log10(max(value, 10.0**low)) - low) / (high - low)
        return _HEIGHT - _BOTTOM - share * (_HEIGHT - _BOTTOM - _TOP)

    shapes = [
        f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y(10.0**e):.1f}" '
        f'y2="{y(10.0**e):.1f}"/><text x="{_LEFT - 6}" y="{y(10.0**e) + 4:.1f}" '
        f'text-anchor="end">1e{e}</text>'
        for e in range(low, high + 1)
    ]
    ticks = {depths[0], depths[-1], *(10**e for e in range(int(first) + 1, int(last) + 1))}
    shapes += [
        f'<text x="{x(d):.1f}" y="{_HEIGHT - 14}" text-anchor="middle">{d}</text>'
        for d in sorted(ticks)
    ]
    for number, tensor in enumerate(tensors):
        for key, kind in (("relative_rms", "line"), ("budget_relative_rms", "budget")):
            pairs = zip(depths, tensor[key], strict=False)
            points = " ".join(f"{x(d):.1f},{y(v):.1f}" for d, v in pairs if v)
            shapes.append(f'<polyline class="{kind} c{number}" points="{points}"/>')
    legend = "".join(
        f'<li><span class="key c{n}"></span>{_text(t["name"])}</li>' for n, t in enumerate(tensors)
    )
    ends = "; ".join(
        f"{t['name']} {_number(t['relative_rms'][-1])} of at most "
        f"{_number(t['budget_relative_rms'][-1])}"
        for t in tensors
        if t["relative_rms"]
    )
    label = _text(f"Relative RMS error against tokens read, log axes. At {depths[-1]}: {ends}.")
    return (
        f'<figure><svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{label}">'
        f'{"".join(shapes)}</svg><ul class="legend">{legend}</ul><figcaption>Relative RMS error '
        "against tokens read; dashed: its budget. Both axes are logarithmic.</figcaption></figure>"
    )


def _heat(run: Data) -> str:
    head = "".join(f'<th scope="col">{depth}</th>' for depth in run["depths"])
    rows = []
    for tensor in run["tensors"]:
        cells = "".join(
            f'<td class="h{_heat_step(use)}" title="{_share(use)}">'
            f'<span class="hidden">{_share(use)}</span></td>'
            for use in tensor["uses"]
        )
        rows.append(f'<tr><th scope="row">{_text(tensor["name"])}</th>{cells}</tr>')
    return (
        '<details open><summary>Use of the budget by tensor and depth</summary><div class="scroll" '
        'tabindex="0"><table class="heat"><caption>Stronger: more; orange: outside. '
        'Columns: tokens read</caption><thead><tr><th scope="col">Tensor</th>'
        f"{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div></details>"
    )


def _tensor_table(tensors: Sequence[Data]) -> str:
    names = ("Tensor", "Use", "Max abs", "Relative RMS", "Differ by 1 ULP or more")
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
        '<div class="scroll" tabindex="0"><table class="sortable"><caption>All tensors; a heading '
        f"sorts</caption><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


_MEASURES = ("max_abs", "relative_rms")


def _worst(worst: Data) -> str:
    tokens = []
    for place, token in enumerate(worst["tokens"] or ()):
        text = _text(token["text"])
        tokens.append(f"<mark>{text}</mark>" if place == worst["at"] else text)
    context = f"<blockquote>{''.join(tokens)}</blockquote>" if tokens else ""
    return (
        f"<p>Closest to its limit: <b>{_text(worst['tensor'])}</b>, {_share(worst['use'])} of its "
        f"budget, in {_text(worst['case'])} ({_text(worst['mode'])}), by token {worst['depth']}, "
        f"call {worst['step']}: {_number(worst['candidate'], 7)} instead of "
        f"{_number(worst['reference'], 7)}</p>{context}"
    )


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
    return f"<table><caption>Where it ran</caption><tbody>{rows}</tbody></table>"


def _use(value: float | None) -> float:
    """Return a number of a report, in which null stands for one that is not finite."""
    return math.inf if value is None else float(value)


def _heat_step(use: float | None) -> int:
    return 5 if _use(use) > 1 else int(_use(use) * 4.999)


def _kind(use: float | None) -> str:
    return "over" if _use(use) > 1 else "fill"


def _share(use: float | None) -> str:
    if use is None:
        return "infinitely much"
    return f"{use:.0%}" if use < 100 else f"{use:.3g} x"


def _number(value: float | None, digits: int = 3) -> str:
    return "not finite" if value is None or not math.isfinite(value) else f"{value:.{digits}g}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.2%}"


def _text(value: Any) -> str:
    return escape(str(value), quote=True)


# Blue and orange: colours that people who cannot tell red from green can tell apart.
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
.outside,.could-not-run{border-color:var(--bad);color:var(--bad)}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums;font-size:.9rem}
caption,figcaption{color:var(--dim);text-align:left;font-size:.85rem;padding:.4rem 0}
th,td{text-align:right;padding:.25rem .5rem;border-bottom:1px solid var(--rule)}
th:first-child,.bars th:nth-child(2),#env td{text-align:left;font-weight:500}
.scroll{overflow-x:auto}.scroll th{overflow-wrap:normal}.bar{width:50%}
.track{display:block;height:.8rem;background:var(--rule)}
.track span{display:block;height:100%}.fill{background:var(--good)}.over{background:var(--bad)}
button{font:inherit;color:inherit;background:none;border:0;padding:0;cursor:pointer;
text-decoration:underline dotted;text-align:inherit}
[aria-sort=descending] button::after{content:" \\25BE"}
[aria-sort=ascending] button::after{content:" \\25B4"}
thead th{overflow-wrap:normal}
details{margin:.6rem 0}summary{cursor:pointer}figure{margin:.5rem 0}svg{width:100%;height:auto}
svg text{fill:var(--dim);font:12px system-ui,sans-serif}.grid{stroke:var(--rule)}
polyline{fill:none;stroke-width:2}.budget{stroke-dasharray:5 4;stroke-width:1.2}
.c0{stroke:var(--good);--key:var(--good)}.c1{stroke:var(--c1);--key:var(--c1)}
.c2{stroke:var(--c2);--key:var(--c2)}.legend{list-style:none;padding:0;margin:0;display:flex;
flex-wrap:wrap;gap:.2rem 1rem;font-size:.85rem}.key{display:inline-block;width:1rem;height:.25rem;
margin-right:.4rem;vertical-align:middle;background:var(--key)}
.heat td{min-width:1.2rem;padding:0}.heat{font-size:.75rem}.h0{background:rgba(var(--h),.05)}
.h1{background:rgba(var(--h),.25)}.h2{background:rgba(var(--h),.45)}
.h3{background:rgba(var(--h),.65)}.h4{background:rgba(var(--h),.9)}.h5{background:var(--bad)}
.hidden{position:absolute;clip-path:inset(50%);width:1px;height:1px;overflow:hidden}
.scroll{position:relative}
blockquote{margin:.5rem 0;padding:.4rem .8rem;background:rgba(var(--h),.08);white-space:pre-wrap}
mark{background:var(--bad);color:var(--bg)}pre{white-space:pre-wrap;background:rgba(var(--h),.08);
padding:.6rem}@media(max-width:500px){svg text{font-size:20px}}
@media print{body{max-width:none;font-size:11px}figure,tr{break-inside:avoid}
.scroll{overflow:visible}.heat th{padding:.1rem .2rem;font-size:8px}.heat td{min-width:0}
*{print-color-adjust:exact}}
</style></head><body><main><h1>$title</h1>
<p class="verdict $status">$verdict</p><p>$summary</p>$problems$bars$candidates
<section id="env"><h2>Repeat it</h2><pre>$command</pre>$environment</section></main>
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
