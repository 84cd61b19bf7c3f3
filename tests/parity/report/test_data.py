"""The report: what it says, and that it fits."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from html import escape
from pathlib import Path
from xml.etree import ElementTree

import pytest

import fwl_export.parity
from fwl_export.errors import ReportError
from fwl_export.parity import read_report, to_markdown, to_text, write_junit
from fwl_export.parity.cases import CASES
from fwl_export.parity.compare import Error, Place, Prediction
from fwl_export.parity.drift import Failure
from fwl_export.parity.report.data import CaseRun, Report
from fwl_export.parity.report.worst_place import WorstPlace
from fwl_export.parity.tolerances import TABLE, Budget, tolerance_for
from fwl_export.parity.verdict import CandidateVerdict, Measured, RunVerdict, TensorVerdict

DEPTHS = (31, 62, 125, 250, 500, 750, 1000, 1250, 1500, 1750, 123456)
BUDGET = Budget(1e-4, 1e-5)


def tensor(name: str, *uses: float) -> TensorVerdict:
    """Return a tensor that uses these shares of its budget, the last one to the end."""
    measured = []
    for index, depth in enumerate(DEPTHS):
        use = uses[min(index, len(uses) - 1)]
        place = Place(index, depth, (1, 2), 1.0 + use, 1.0)
        error = Error(use * BUDGET.max_abs, use * BUDGET.relative_rms / 2, 1.0, place)
        own = Error(1e-5, 1e-6, 1.0, place)
        measured.append(Measured(depth, error, own, BUDGET))
    return TensorVerdict(name, "float32", tolerance_for(name), measured, [1] * 26)


def candidate(*tensors: TensorVerdict, failure: Failure | None = None) -> CandidateVerdict:
    predictions = [Prediction(100, 1e-9, 1e-8, 0.999, 0.998, 4.0, 4.0 + 1e-6)] * len(DEPTHS)
    runs = [
        RunVerdict("text", mode, tensors, predictions, predictions, failure)
        for mode in ("free", "forced")
    ]
    return CandidateVerdict("some runtime", "fp32", runs)


def report(*candidates: CandidateVerdict) -> Report:
    return Report(
        bundle="bundle",
        model_id="0" * 64,
        precision="fp32",
        max_tokens=256,
        text="the_winters_tale.txt",
        ids=[1, 2, 3],
        tokens=123456,
        seed=12,
        reference="torch:float64",
        strict=False,
        changed_tolerances={},
        table=TABLE,
        horizon_tokens=500.0,
        cases=[CaseRun(case, 12345, 256) for case in CASES],
        candidates=candidates,
        worst=[None] * len(candidates),
        baseline=None,
        environment={"versions": {"numpy": "2"}},
        command="fwl-export check bundle",
        created="2026-01-01T00:00:00+00:00",
        seconds=1.5,
    )


GOOD = candidate(tensor("logits", 0.2), tensor("position", 0), tensor("fast.up.bias", 0.1, 0.4))
WRONG = candidate(
    tensor("logits", 0.1, 0.2, 5.0), tensor("fast.up.bias", 0.1, 3.0), tensor("position", 0)
)
MANY = [tensor(f"cache.{i}.a_key_with_a_very_long_name", i / 30) for i in range(24)]
LOST = CandidateVerdict("tensorrt", "fp32", [], reason="no engine " + "x" * 300)
DIED = Failure("some runtime", 3, 31, "out of memory")


@pytest.mark.parametrize(
    "verdicts",
    [
        [GOOD],
        [GOOD] * 9,
        [candidate(tensor("logits", 0.3), *MANY)] * 4,
        [candidate(tensor("logits", math.inf), tensor("fast.up.bias", 123456.7))],
        [candidate(failure=DIED), LOST],
        [candidate(tensor("logits", 0.3), *MANY, failure=DIED)],
    ],
    ids=["good", "many", "many tensors", "far outside", "failed at once", "failed later"],
)
def test_a_summary_fits_into_thirty_lines_of_a_hundred_columns(
    verdicts: list[CandidateVerdict],
) -> None:
    lines = to_text(report(*verdicts)).splitlines()
    assert len(lines) <= 30, len(lines)
    assert max(map(len, lines)) <= 100, max(lines, key=len)


def test_the_summary_says_who_is_closest_to_its_limit() -> None:
    text = to_text(report(GOOD))
    assert "within budget: the largest use is 40%, by fast.up.bias of some runtime" in text
    assert text.index("\nlogits") < text.index("\nfast.up.bias")
    assert report(GOOD).passed
    assert report(GOOD).problems() == []


@pytest.mark.parametrize(
    ("verdicts", "code", "words"),
    [
        ([GOOD], 0, "within budget"),
        ([GOOD, WRONG], 1, "OUTSIDE BUDGET"),
        ([GOOD, LOST], 2, "COULD NOT RUN"),
        ([WRONG, LOST], 1, "COULD NOT RUN"),
        ([candidate(tensor("logits", 0.1), failure=DIED)], 2, "COULD NOT RUN"),
        ([candidate()], 2, "COULD NOT RUN"),
        (
            [candidate(tensor("logits", 0.1), failure=Failure("x", 1, 2, "NaN", "not finite"))],
            1,
            "OUTSIDE BUDGET",
        ),
    ],
)
def test_exit_codes(verdicts: list[CandidateVerdict], code: int, words: str) -> None:
    found = report(*verdicts)
    assert found.exit_code == code
    assert words in to_text(found)
    assert words.lower() in to_markdown(found)


def test_a_breach_names_tensor_depth_and_size() -> None:
    (problem,) = report(GOOD, WRONG).problems()
    assert problem == (
        "some runtime is outside its budget, first in 'fast.up.bias' (case 'text', free-running) "
        "after 62 tokens: max abs 0.0003 (budget 0.0001), relative RMS 1.5e-05 (budget 1e-05); "
        "worst in call 1, row 1, element [2]: 4 instead of 1"
    )
    died = candidate(tensor("logits", 0.1), failure=DIED)
    assert report(died).problems() == [
        "some runtime could not go on in case 'text', free-running, at call 3 (up to token 31): "
        "out of memory"
    ]


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


def test_repr_is_the_verdict() -> None:
    assert repr(report(GOOD, LOST)) == (
        "<Report of bundle: could not run; use of budgets: some runtime 40%, "
        "tensorrt could not run>"
    )


def test_notebooks_show_a_table_with_the_verdict_and_everything_escaped() -> None:
    evil = "<script>alert(1)</script>"
    lost = replace(LOST, name=evil, reason=evil)
    place = WorstPlace("text", "free", "logits", 31, 5.0, Place(1, 31, (0, 2), 2.0, 1.0), [], 0)
    found = replace(
        report(GOOD, WRONG, lost), bundle=evil, reference=evil, worst=[None, place, None]
    )
    page = found._repr_html_()
    assert "outside budget" in page
    assert page.count("<tr>") == 4
    assert "<td>500%</td><td>logits (text, free-running)</td>" in page
    assert evil not in page
    assert page.count(escape(evil)) == 5


def test_json_has_everything_and_no_number_that_is_not_finite(tmp_path: Path) -> None:
    report(GOOD, candidate(tensor("logits", math.inf))).write(tmp_path / "report.json")
    data = read_report(tmp_path / "report.json")
    assert (data["schema_version"], data["passed"], data["exit_code"]) == (2, False, 1)
    assert [c["passed"] for c in data["candidates"]] == [True, False]
    assert data["candidates"][1]["use"] is None
    assert len(data["tolerances"]) == len(TABLE)
    run = data["candidates"][0]["runs"][0]
    assert run["depths"] == list(DEPTHS)
    entry = run["tensors"][2]
    assert (entry["name"], entry["tolerance"], entry["use"]) == ("fast.up.bias", "fast.", 0.4)
    assert entry["uses"][0] == pytest.approx(0.1)
    assert entry["budget_max_abs"][0] == 1e-4
    assert run["overall"]["tokens"] == 100 * len(DEPTHS)


def test_the_documented_schema_is_the_written_one() -> None:
    text = (Path(fwl_export.parity.__file__).parent / "README.md").read_text()
    data = report(GOOD).to_dict()
    (found,) = data["candidates"]
    for part in (data, found, found["runs"][0], found["runs"][0]["tensors"][0]):
        for key in part:
            assert f"`{key}`" in text, key


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"schema_version": 1, "candidates": []},
            "schema_version is 1, but .* run the check again",
        ),
        (
            {"schema_version": 99, "candidates": []},
            "schema_version is 99, but .* update fwl-export",
        ),
        ({"a": 1}, "is not a report of"),
    ],
)
def test_reports_of_another_schema_are_refused(
    content: dict[str, object], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "report.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ReportError, match=message):
        read_report(path)
    path.write_text("{")
    with pytest.raises(ReportError, match="is not JSON"):
        read_report(path)
