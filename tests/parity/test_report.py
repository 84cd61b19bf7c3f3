"""The report: what it says, and that it fits."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest

from fwl_export.parity.compare import Error, Place, Prediction
from fwl_export.parity.drift import Failure
from fwl_export.parity.report import Report
from fwl_export.parity.tolerances import TABLE, Budget, tolerance_for
from fwl_export.parity.verdict import CandidateVerdict, Measured, TensorVerdict

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
        measured.append(Measured(depth, error, own, error, BUDGET))
    return TensorVerdict(name, tolerance_for(name), measured)


def candidate(*tensors: TensorVerdict, failure: Failure | None = None) -> CandidateVerdict:
    predictions = [Prediction(100, 1e-9, 1e-8, 0.999, 4.0, 4.0 + 1e-6)] * len(DEPTHS)
    return CandidateVerdict("some runtime", tensors, predictions, predictions, failure)


def report(*candidates: CandidateVerdict) -> Report:
    return Report(
        bundle="bundle",
        model_id="0" * 64,
        precision="fp32",
        text="the_winters_tale.txt",
        tokens=123456,
        rows=3,
        seed=12,
        calls=12345,
        largest_call=256,
        reference="PyTorch fp64",
        own="PyTorch fp32",
        memory=500.0,
        depths=DEPTHS,
        candidates=candidates,
        seconds=1.5,
    )


GOOD = candidate(tensor("logits", 0.2), tensor("position", 0), tensor("fast.up.bias", 0.1, 0.4))
MANY = [tensor(f"cache.{i}.a_key_with_a_very_long_name", i / 30) for i in range(24)]


@pytest.mark.parametrize(
    "verdict",
    [
        GOOD,
        candidate(tensor("logits", 0.3), *MANY),
        candidate(tensor("logits", math.inf), tensor("fast.up.bias", 123456.7)),
        candidate(failure=Failure("some runtime", 3, 31, "out of memory")),
        candidate(tensor("logits", 0.3), *MANY, failure=Failure("some runtime", 3, 31, "x" * 300)),
    ],
    ids=["good", "many tensors", "far outside", "failed at once", "failed later"],
)
def test_a_candidate_fits_into_thirty_lines_of_eighty_columns(verdict: CandidateVerdict) -> None:
    lines = report(verdict).to_text().splitlines()
    assert len(lines) <= 30, len(lines)
    assert max(map(len, lines)) <= 80, max(lines, key=len)


def test_the_tensor_closest_to_its_limit_stands_below_the_logits() -> None:
    text = report(GOOD).to_text()
    names = [line.split()[0] for line in text.splitlines() if line]
    assert names.index("logits") < names.index("fast.up.bias") < names.index("position")
    assert "within budget: fast.up.bias comes closest, with 40% of it" in text
    assert "the_winters_tale.txt: 123456 tokens in 12345 calls of 1 to 256 on 3 rows" in text
    assert "top-1 agreement 99.90%" in text
    assert report(GOOD).passed
    assert report(GOOD).problems() == []


def test_tensors_that_are_not_shown_are_counted() -> None:
    text = report(candidate(tensor("logits", 0.3), *MANY)).to_text()
    assert "9 more tensors, each 27% of its budget or less" in text


def test_a_breach_names_tensor_depth_and_size() -> None:
    wrong = candidate(
        tensor("logits", 0.1, 0.2, 5.0), tensor("fast.up.bias", 0.1, 3.0), tensor("position", 0)
    )
    found = report(GOOD, wrong)
    assert not found.passed
    assert "OUTSIDE BUDGET: 2 of 3 tensors" in found.to_text()
    (problem,) = found.problems()
    assert problem == (
        "some runtime is outside its budget first in 'fast.up.bias' at token 62: max abs 0.0003 "
        "(budget 0.0001), relative RMS 1.5e-05 (budget 1e-05); worst in call 1, row 1, element "
        "[2]: 4 instead of 1"
    )


def test_a_failure_is_told_even_where_all_that_was_compared_is_within_budget() -> None:
    verdict = dataclasses.replace(GOOD, failure=Failure("PyTorch fp16", 7, 62, "it is NaN"))
    assert not verdict.passed
    assert "FAILED" in report(verdict).to_text()
    assert report(verdict).problems() == [
        "PyTorch fp16 could not go on at call 7, by token 62: it is NaN"
    ]


def test_nothing_compared_is_no_success() -> None:
    assert not candidate().passed


def test_json_has_everything_and_no_number_that_is_not_finite() -> None:
    data = report(GOOD, candidate(tensor("logits", math.inf))).to_dict()
    data = json.loads(json.dumps(data, allow_nan=False))
    assert (data["schema_version"], data["passed"]) == (1, False)
    assert [c["passed"] for c in data["candidates"]] == [True, False]
    assert data["candidates"][1]["use"] is None
    assert len(data["tolerances"]) == len(TABLE)
    entry = data["candidates"][0]["tensors"][2]
    assert (entry["name"], entry["tolerance"], entry["use"]) == ("fast.up.bias", "fast.", 0.4)
    assert [d["depth"] for d in entry["depths"]] == list(DEPTHS)
    first = entry["depths"][0]
    assert first["use"] == pytest.approx(0.1)
    assert first["budget"] == {"max_abs": 1e-4, "relative_rms": 1e-5}
    assert first["error"]["worst"]["index"] == [1, 2]
    assert data["candidates"][0]["predictions"][0]["tokens"] == 100
