"""What is not finite: where `check` says it is, in every form of the report."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from fwl_export.bundle.manifest import read_bundle
from fwl_export.cli.check import _advice
from fwl_export.parity import Report, check_bundle, to_markdown, to_text, write_junit
from fwl_export.parity.drift import Failure
from fwl_export.parity.report.html import to_html
from fwl_export.parity.verdict import CandidateVerdict
from fwl_export.runtimes import open_session
from tests.bundles import VOCABULARY
from tests.parity.faults import broken_bundle
from tests.parity.planted import OVERFLOWS
from tests.parity.report.examples import candidate, report, tensor

TEXT = np.random.default_rng(0).integers(0, VOCABULARY, 600)
UPDATE, SCORES = OVERFLOWS


@pytest.fixture(scope="module")
def checked(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Report:
    """The check of an unbroken bundle and one whose update overflows."""
    broken = broken_bundle(tiny_bundle, tmp_path_factory.mktemp("broken") / "b", OVERFLOWS[UPDATE])
    sessions = {
        "right": open_session(tiny_bundle, threads=1, plugin="none"),
        "broken": open_session(broken, threads=1, plugin="none"),
    }
    bundle = read_bundle(tiny_bundle)
    cases = "text,endless@96"
    return check_bundle(
        bundle, TEXT, 120, candidates=sessions, cases=cases, decode=lambda n: chr(32 + n)
    )


def found(checked: Report) -> CandidateVerdict:
    return checked.candidates[1]


def test_repetition_shows_what_a_text_does_not(checked: Report) -> None:
    assert checked.candidates[0].passed
    wrong = {(run.case, run.mode): run.not_finite for run in found(checked).runs}
    assert wrong["text", "free"] is None, "float16 rounds, but is large enough for a text"
    assert wrong["endless", "free"] is not None
    assert not found(checked).leaves_the_range, "PyTorch stays finite"


def test_the_token_is_the_first_that_fails(checked: Report, tiny_bundle: Path) -> None:
    failure = found(checked).not_finite_at
    assert failure is not None
    assert failure.token is not None
    assert failure.token > 3
    assert failure.token_text == chr(32 + (failure.token_id or 0))
    row = [failure.token_id] * failure.token
    session = open_session(tiny_bundle, threads=1, plugin="none")
    session.feed(np.array(row))  # the unbroken model reads them, and the next one
    text = repr(failure.token_text)
    place = f"not finite at token {failure.token} of row {failure.row} "
    assert failure.place == f"{place}(id {failure.token_id}, text {text})"


def test_every_report_names_the_place_in_place_of_a_percentage(
    checked: Report, tmp_path: Path
) -> None:
    failure = found(checked).not_finite_at
    assert failure is not None
    summary = to_text(checked)
    assert f"NOT FINITE: broken {failure.brief_place}" in summary
    (line,) = [line for line in summary.splitlines() if line.startswith("broken ")]
    assert line.endswith(failure.brief_place)
    assert "%" not in line
    assert re.search(rf"not finite at token {failure.token} of row", to_markdown(checked))
    assert any(failure.place in problem for problem in checked.problems())
    assert "inf%" not in repr(checked)

    data = checked.to_dict()
    (_, broken) = data["candidates"]
    assert broken["use"] is None
    (run,) = [r for r in broken["runs"] if (r["case"], r["mode"]) == ("endless", "free")]
    assert run["failure"]["token"] == failure.token
    assert run["failure"]["message"].startswith(failure.place)
    worst = broken["worst"]
    assert (worst["case"], worst["row"], worst["candidate"]) == ("endless", failure.row, None)
    assert worst["tokens"][worst["at"]]["id"] == failure.token_id

    write_junit(checked, tmp_path / "junit.xml")
    suite = ElementTree.parse(tmp_path / "junit.xml").getroot()
    (end,) = suite.findall("testcase[@classname='parity.broken'][@name='runs to the end']")
    failed = end.find("failure")
    assert failed is not None
    assert failure.place.partition(" (")[0] in failed.get("message", "")


def test_the_failing_case_is_open_and_its_place_is_marked(checked: Report) -> None:
    failure = found(checked).not_finite_at
    assert failure is not None
    page = to_html(checked.to_dict())
    right, broken = page.split("<section>")[-2:]
    opened = re.findall(r"<details open[^>]*><summary><h3>([^<]*)</h3>: ([^<]*)", broken)
    outcome = dict(opened)["endless, free-running"]
    assert outcome.startswith(f"not finite at token {failure.token} of row {failure.row} ")
    assert "<b>Not finite</b> in case endless" in broken
    assert broken.count("<mark>") == 1
    assert re.findall(r"<details open[^>]*><summary><h3>([^<]*)", right) == ["text, free-running"]
    assert "infinite" not in broken.partition("</summary>")[0]


@pytest.mark.parametrize("own", [True, False])
def test_the_exporter_is_not_blamed_for_the_range_of_a_type(own: bool, tmp_path: Path) -> None:
    failure = Failure("x", 1, 2, "the logits", "not finite", "logits", 0, 7, 7, 3)
    verdict = candidate(tensor("logits", 0.1), failure=failure)
    runs = [
        run.__class__(**{**vars(run), "own_failure": failure if own else None})
        for run in verdict.runs
    ]
    verdict = CandidateVerdict(verdict.name, verdict.precision, runs)
    advice = _advice(report(verdict), tmp_path / "parity.json")
    assert ("neither the exporter nor the runtime is at fault" in advice) == own
    assert "fwl-export bisect" in advice
    assert verdict.leaves_the_range == own
