"""The report as data: exit codes, sentences, and the JSON file."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

import fwl_export.parity
import fwl_export.parity.report
from fwl_export.errors import ReportError
from fwl_export.parity import read_report, to_markdown, to_text
from fwl_export.parity.drift import Failure
from fwl_export.parity.tolerances import TABLE
from fwl_export.parity.verdict import CandidateVerdict
from tests.parity.report.examples import (
    DIED,
    GOOD,
    LOST,
    POINTS,
    WRONG,
    candidate,
    report,
    tensor,
)


def test_public_names() -> None:
    names = fwl_export.parity.report.__all__
    assert names == sorted(names)
    assert all(hasattr(fwl_export.parity.report, name) for name in names)


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
            "NOT FINITE",
        ),
    ],
)
def test_exit_codes(verdicts: list[CandidateVerdict], code: int, words: str) -> None:
    found = report(*verdicts)
    assert found.exit_code == code
    assert words in to_text(found)
    assert words.lower() in to_markdown(found)


def test_a_breach_names_tensor_tokens_and_size() -> None:
    (problem,) = report(GOOD, WRONG).problems()
    assert problem == (
        "some runtime is outside its budget, first in 'fast.up.bias' (case 'text', free-running) "
        "after 62 tokens: max abs 0.0003 (budget 0.0001), relative RMS 1.5e-05 (budget 1e-05); "
        "worst in call 1, row 1, element [2]: 4 instead of 1"
    )
    died = candidate(tensor("logits", 0.1), failure=DIED)
    assert report(died).problems() == [
        "some runtime failed in case 'text', free-running, at call 3 (up to token 31): "
        "out of memory"
    ]


def test_repr_is_the_verdict() -> None:
    assert repr(report(GOOD, LOST)) == (
        "<Report of bundle: could not run; use of budgets: some runtime 40%, "
        "tensorrt could not run>"
    )


def test_json_has_everything_and_no_number_that_is_not_finite(tmp_path: Path) -> None:
    report(GOOD, candidate(tensor("logits", math.inf))).write(tmp_path / "report.json")
    data = read_report(tmp_path / "report.json")
    assert (data["schema_version"], data["passed"], data["exit_code"]) == (3, False, 1)
    assert [c["passed"] for c in data["candidates"]] == [True, False]
    assert data["candidates"][1]["use"] is None
    assert len(data["tolerances"]) == len(TABLE)
    run = data["candidates"][0]["runs"][0]
    assert run["depths"] == list(POINTS)
    entry = run["tensors"][2]
    assert (entry["name"], entry["tolerance"], entry["use"]) == ("fast.up.bias", "fast.", 0.4)
    assert entry["uses"][0] == pytest.approx(0.1)
    assert entry["budget_max_abs"][0] == 1e-4
    assert run["overall"]["tokens"] == 100 * len(POINTS)


def test_the_documented_schema_is_the_written_one() -> None:
    text = (Path(fwl_export.parity.__file__).parent / "README.md").read_text()
    data = report(GOOD).to_dict()
    (found,) = data["candidates"]
    for part in (data, data["coverage"], found, found["runs"][0], found["runs"][0]["tensors"][0]):
        for key in part:
            assert f"`{key}`" in text, key


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"schema_version": 2, "candidates": []},
            "schema_version is 2, but .* run the check again",
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
