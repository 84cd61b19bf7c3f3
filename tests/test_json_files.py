"""JSON files: errors say in one sentence what is wrong, and NaN is never written."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from fwl_export.errors import BundleError, ReportError
from fwl_export.json_files import check_schema, read_json, without_non_finite


@pytest.mark.parametrize("content", [b"{", b"", b"\xff\xfe{}"])
def test_a_file_that_is_not_json(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(BundleError, match=r"a\.json is not JSON \(.+\); was it truncated\?"):
        read_json(tmp_path / "a.json", BundleError)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"schema_version": 2}, "a: schema_version is 2, but .* reads 1; update fwl-export"),
        ({"schema_version": 0}, "a: schema_version is 0, but this fwl-export reads 1; try again"),
        ({"schema_version": "1"}, "a: schema_version is '1', but .* reads 1; try again"),
        ({}, "a: schema_version is None, but this fwl-export reads 1; try again"),
        ([1], "a: schema_version is None, but this fwl-export reads 1; try again"),
    ],
)
def test_another_schema(data: object, message: str) -> None:
    with pytest.raises(ReportError, match=message):
        check_schema(data, 1, "a", ReportError, "try again")


def test_the_schema_that_is_read() -> None:
    assert check_schema({"schema_version": 1, "x": 2}, 1, "a", ReportError, "")["x"] == 2


def test_numbers_that_json_cannot_hold() -> None:
    data = {"a": [math.nan, 1.23456, (math.inf, 7)], "b": "nan", "c": None}
    assert without_non_finite(data) == {"a": [None, 1.23456, [None, 7]], "b": "nan", "c": None}
    assert without_non_finite(data, digits=3)["a"] == [None, 1.23, [None, 7]]
