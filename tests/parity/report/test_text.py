"""The summary on a terminal."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from fwl_export.parity import to_markdown, to_text
from fwl_export.parity.coverage import coverage_table
from fwl_export.parity.verdict import CandidateVerdict
from tests.parity.report.examples import (
    COVERAGE,
    DIED,
    GOOD,
    LOST,
    MANY,
    WRONG,
    candidate,
    report,
    tensor,
)


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
def test_a_summary_fits_into_thirty_lines_of_eighty_columns(
    verdicts: list[CandidateVerdict],
) -> None:
    lines = to_text(report(*verdicts)).splitlines()
    assert len(lines) <= 30, len(lines)
    assert max(map(len, lines)) <= 80, max(lines, key=len)


def test_the_summary_says_who_is_closest_to_its_limit() -> None:
    text = to_text(report(GOOD))
    assert "within budget: the largest use is 40%, by fast.up.bias of some runtime" in text
    assert text.index("\nlogits") < text.index("\nfast.up.bias")
    assert report(GOOD).passed
    assert "use = error ÷ allowed error; allowed = k × PyTorch's own float32 error" in text


def test_the_summary_says_what_was_tried() -> None:
    lines = to_text(report(GOOD)).splitlines()
    tried = [line for line in lines if line.startswith("tried: ")]
    assert len(tried) == len(coverage_table(COVERAGE)) == 8
    assert any(" of 49 152 read, " in line for line in tried)
    assert not any(line.endswith("…") for line in tried)
    assert tried[-1].startswith("tried: left out  cases mixed8, far; ")


def test_a_good_report_has_no_problems() -> None:
    assert report(GOOD).problems() == []


def test_names_cannot_forge_a_line_or_markup() -> None:
    evil = "a|b\n| x | within budget | `c` <img src=x> @team \x1b[2J"
    planted = replace(WRONG, name=evil)
    forged = replace(report(planted), bundle=evil, text=evil, command=evil)
    text = to_text(forged)
    assert text.count("\n") == to_text(report(WRONG)).count("\n")
    assert "\x1b" not in text
    page = to_markdown(forged)
    assert page.count("\n") == to_markdown(report(WRONG)).count("\n")
    assert "\x1b" not in page
    (row,) = [line for line in page.splitlines() if line.startswith("| ``")]
    assert row.replace(r"\|", "").count("|") == 8
