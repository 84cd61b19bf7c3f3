"""The report as JUnit XML."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

from fwl_export.parity import write_junit
from tests.parity.report.examples import LOST, WRONG, report


def test_junit_has_a_failure_for_what_is_outside_and_an_error_for_what_could_not_run(
    tmp_path: Path,
) -> None:
    write_junit(report(WRONG, LOST), tmp_path / "junit.xml")
    suite = ElementTree.parse(tmp_path / "junit.xml").getroot()
    assert (suite.get("tests"), suite.get("failures"), suite.get("errors")) == ("5", "2", "1")
    failed = [
        case.get("name") for case in suite.iter("testcase") if case.find("failure") is not None
    ]
    assert failed == ["logits", "fast"]
    (lost,) = [case for case in suite.iter("testcase") if case.find("error") is not None]
    assert lost.get("classname") == "parity.tensorrt"


def test_names_that_xml_forbids_are_escaped(tmp_path: Path) -> None:
    evil = 'a\x1b[2J\x00\x0b\ufffe\ud800"><failure/>&\nb'
    planted = replace(WRONG, name=evil, runs=[replace(run, case=evil) for run in WRONG.runs])
    written = replace(report(planted), bundle=evil, command=evil, reference=evil)
    write_junit(written, tmp_path / "junit.xml")
    suite = ElementTree.parse(tmp_path / "junit.xml").getroot()
    assert suite.get("name", "").startswith(r"fwl-export check a\x1b[2J\x00\x0b\ufffe\ud800")
    assert len(list(suite.iter("failure"))) == 2
