"""A report as JUnit XML: a test case for each candidate and group of tensors."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

from fwl_export.files import replaced_file
from fwl_export.parity.drift import MODE_NAMES
from fwl_export.parity.report.data import Report, problems
from fwl_export.parity.verdict import OUTSIDE, CandidateVerdict, Spot
from fwl_export.printable import printable

# First parts of the tensors' names.
GROUPS = ("logits", "position", "cache", "fast", "anchor", "pending")


def write_junit(report: Report, path: Path) -> None:
    """Write the report as JUnit XML.

    A tensor that is outside its budget or not finite is a failure. A candidate that could not run
    is an error.
    """
    suite = ElementTree.Element(
        "testsuite",
        name=f"fwl-export check {report.bundle}",
        timestamp=report.created,
        time=f"{report.seconds:.3f}",
    )
    properties = ElementTree.SubElement(suite, "properties")
    values = {"command": report.command, "model_id": report.model_id, "reference": report.reference}
    values |= {f"version.{name}": v for name, v in report.environment.get("versions", {}).items()}
    for name, value in values.items():
        ElementTree.SubElement(properties, "property", name=name, value=str(value))
    cases = [case for candidate in report.candidates for case in _cases(candidate)]
    suite.extend(cases)
    for key in ("failure", "error"):
        count = sum(case.find(key) is not None for case in cases)
        suite.set(f"{key}s", str(count))
    suite.set("tests", str(len(cases)))
    _make_printable(suite)
    tree = ElementTree.ElementTree(suite)
    ElementTree.indent(tree)
    with replaced_file(path) as target:
        tree.write(target, encoding="utf-8", xml_declaration=True)


def _make_printable(suite: ElementTree.Element) -> None:
    """Escape what XML forbids, in every attribute and text."""
    for element in suite.iter():
        element.attrib.update({name: printable(value) for name, value in element.items()})
        element.text = element.text and printable(element.text)


def _cases(candidate: CandidateVerdict) -> list[ElementTree.Element]:
    classname = f"parity.{candidate.name.replace('.', '_')}"
    cases = []
    for group in GROUPS:
        spots = [
            Spot(run, tensor, tensor.worst)
            for run in candidate.runs
            for tensor in run.tensors
            if tensor.name.partition(".")[0] == group
        ]
        if not spots:
            continue
        worst = max(spots, key=lambda spot: spot.measured.use)
        case = ElementTree.Element("testcase", classname=classname, name=group)
        out = ElementTree.SubElement(case, "system-out")
        out.text = _describe(worst)
        grown = [g for g in candidate.grown if g.tensor.partition(".")[0] == group]
        wrong = [spot for spot in spots if spot.measured.use > 1]
        if wrong or grown:
            message = (
                _describe(worst)
                if wrong
                else f"the error of {grown[0].tensor} grew since the baseline"
            )
            failure = ElementTree.SubElement(case, "failure", message=message)
            lines = [_describe(spot) for spot in wrong]
            lines += [
                f"{g.tensor}: {g.measure} {g.now:.3g}, in the baseline {g.before:.3g}"
                for g in grown
            ]
            failure.text = "\n".join(lines)
        cases.append(case)
    end = ElementTree.Element("testcase", classname=classname, name="runs to the end")
    if candidate.reason or candidate.failure:
        text = "\n".join(problems(candidate))
        kind = "failure" if candidate.status == OUTSIDE else "error"
        lines = text.splitlines()
        first = lines[0] if candidate.not_finite else lines[-1]
        ElementTree.SubElement(end, kind, message=first).text = text
    return [*cases, end]


def _describe(spot: Spot) -> str:
    run, tensor, at = spot
    return (
        f"{tensor.name} uses {at.use:.0%} of its budget in case {run.case}, "
        f"{MODE_NAMES[run.mode]}, after {at.tokens_read} tokens: "
        f"max abs {at.error.max_abs:.3g} (budget {at.budget.max_abs:.3g}), "
        f"relative RMS {at.error.relative_rms:.3g} (budget {at.budget.relative_rms:.3g})"
    )
