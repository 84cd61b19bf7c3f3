"""JSON files: errors say in one sentence what is wrong, and NaN is never written."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, TypedDict

import pytest
from msgspec import Meta

from fwl_export import json_files
from fwl_export.errors import BundleError, ReportError
from fwl_export.json_files import (
    Count,
    Finite,
    Name,
    Size,
    brief,
    check_schema,
    read_bounded,
    read_json,
    typed,
    without_non_finite,
)


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


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "it is nested too deeply"),
        ("[" * 66 + "]" * 66, "it is nested more than 64 levels deep"),
        ('{"a": 1, "b": {"c": 1, "c": 2}}', "key 'c' occurs more than once in one object"),
        ('{"a": 1e999}', "1e999 is not a finite number"),
        ("[NaN]", "NaN is not a finite number"),
        ("[-Infinity]", "-Infinity is not a finite number"),
        ("[123456789012345678901]", "has more than 64 bits"),
        ("[" + "9" * 100_000 + "]", "has more than 64 bits"),
        ('["\\ud800"]', "surrogates not allowed"),
    ],
)
def test_what_json_files_never_hold(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(BundleError, match=re.escape(message)) as caught:
        read_json(path, BundleError, "write it again")
    assert str(caught.value).startswith(f"{path} is not JSON (")
    assert str(caught.value).endswith("; write it again")
    assert len(str(caught.value)) < 500


def test_what_json_files_may_hold(tmp_path: Path) -> None:
    data = {"a": [1.5, -(2**63), 2**64 - 1, None, True, "\U0001f600 \x00"], "b": {}, "c": []}
    path = tmp_path / "a.json"
    path.write_text(json.dumps(data))
    assert read_json(path, BundleError) == data
    path.write_text("[" * 64 + "]" * 64)
    assert read_json(path, BundleError)
    path.write_text("3")
    assert read_json(path, BundleError) == 3


def test_a_file_that_is_too_large_or_no_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b"[]")
    os.truncate(path, json_files.LARGEST_FILE + 1)
    with pytest.raises(BundleError, match=r"has 33554433 bytes; expected at most 33554432\. Is it"):
        read_json(path, BundleError)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(BundleError, match="is a named pipe; expected a regular file"):
        read_json(tmp_path / "pipe", BundleError)
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "nothing", BundleError)
    path.write_bytes(b"abc")
    assert read_bounded(path, BundleError, 3) == b"abc"
    with pytest.raises(BundleError, match="has 3 bytes; expected at most 2"):
        read_bounded(path, BundleError, 2)


@dataclass
class Part:
    name: Name
    shape: Sequence[Size]
    scale: Finite = 1.0
    kind: Literal["a", "b"] | None = None


class File(TypedDict):
    count: Count
    parts: Sequence[Part]
    files: Mapping[Name, Mapping[str, Annotated[int, Meta(le=9)]]]
    names: NotRequired[Sequence[Name] | None]


GOOD: dict[str, Any] = {
    "count": 0,
    "parts": [{"name": "x", "shape": [1], "scale": 2}],
    "files": {"k": {"n": 2}},
}


def test_data_get_their_type_and_unknown_keys_are_ignored() -> None:
    found = typed({**GOOD, "later": 3}, File, "a.json", BundleError)
    assert found == {**GOOD, "parts": [Part("x", [1], 2.0)]}
    assert typed({**GOOD, "names": None}, File, "a.json", BundleError)["names"] is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"count": -1}, "'count' is -1; expected int >= 0"),
        ({"count": "1"}, "'count' is '1'; expected int"),
        ({"count": True}, "'count' is True; expected int"),
        ({"count": 1 << 63}, "'count' is 9223372036854775808; expected int <= 4611686018427387904"),
        ({"parts": 3}, "'parts' is 3; expected a list"),
        ({"parts": [[]]}, "'parts[0]' is []; expected an object"),
        ({"parts": [{"name": "x"}]}, "key 'parts[0].shape' is missing"),
        (
            {"parts": [{"name": "x", "shape": [3, 0]}]},
            "'parts[0].shape[1]' is 0; expected int >= 1",
        ),
        (
            {"parts": [{"name": "a\x00b", "shape": []}]},
            "'parts[0].name' is 'a\\x00b'; expected text without control characters",
        ),
        (
            {"parts": [{"name": "x", "shape": [], "kind": "c"}]},
            "'parts[0].kind' is 'c'; expected 'a' or 'b'",
        ),
        (
            {"parts": [{"name": "x", "shape": [], "scale": math.inf}]},
            "'parts[0].scale' is inf; expected float <= 1e+150",
        ),
        ({"files": {"k": {"n": 1}, "l": {"m": 1, "n": 10}}}, "'files[l][n]' is 10; expected int"),
        ({"files": {"k\n": {}}}, "'files[key]' is 'k\\n'; expected text without control char"),
        ({"names": ["a", 3]}, "'names[1]' is 3; expected str"),
    ],
)
def test_a_wrong_value_is_named_with_its_place(change: dict[str, Any], message: str) -> None:
    with pytest.raises(BundleError, match=re.escape(message)) as caught:
        typed({**GOOD, **change}, File, "a.json", BundleError, "write it again")
    assert str(caught.value).startswith("a.json: ")
    assert str(caught.value).endswith("; write it again")


def test_data_that_are_no_object_and_a_prefix() -> None:
    with pytest.raises(BundleError, match=r"a\.json: it is \[1\]; expected an object$"):
        typed([1], File, "a.json", BundleError)
    with pytest.raises(BundleError, match=r"'part\.count' is None; expected int"):
        typed({**GOOD, "count": None}, File, "a.json", BundleError, prefix="part.")


def test_messages_of_libraries_are_short_and_without_control_characters() -> None:
    assert brief(ValueError("no\x1b[31m\nmore")) == "no\\x1b[31m\\nmore"
    assert len(brief("x" * 70_000)) == 301
