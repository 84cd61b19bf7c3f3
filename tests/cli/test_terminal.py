"""Tables: aligned, and never wider than a terminal."""

from __future__ import annotations

import json
import math
import sys

import pytest

from fwl_export.cli.terminal import (
    note,
    print_exception,
    print_generated,
    print_json,
    progress_bar,
    safe_streams,
    size,
    spinner,
    table,
)


def test_a_table_is_aligned() -> None:
    rows = [("a", "1", "2"), ("long name", "10", "")]
    assert table(("name", "x", "value"), rows).splitlines() == [
        "name        x  value",
        "a           1      2",
        "long name  10",
    ]


def test_a_wide_table_wraps_its_header_first() -> None:
    found = table(("", "time, T = 1", "use"), [("standard inference", "1.00", "5")], columns=30)
    assert found.splitlines() == [
        "                   time,",
        "                   T = 1 use",
        "standard inference  1.00   5",
    ]


def test_then_the_cells_of_its_first_column() -> None:
    found = table(("class", "gain"), [("known token, new pair", "0.1"), ("new", "")], columns=20)
    assert found.splitlines() == [
        "class           gain",
        "known token,     0.1",
        "new pair",
        "new",
    ]


def test_a_table_without_rows() -> None:
    assert table(("file", "size"), []) == "file  size"


def test_sizes() -> None:
    assert [size(n) for n in (0, 999, 1500, 2.5e6, 3e9, 5e12)] == [
        "0 B",
        "999 B",
        "1.5 kB",
        "2.5 MB",
        "3.0 GB",
        "5000.0 GB",
    ]


EVIL = "a\x1b]0;pwned\x07\x9b2J\rb\u202e\x7f\ud800"


def test_no_control_character_reaches_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with safe_streams():
        print(EVIL)
        print(EVIL, file=sys.stderr)
        note(EVIL)
        with spinner(EVIL) as say:
            say(f"[/red]{EVIL}")
        with progress_bar(EVIL, 1) as advance:
            advance(1)
    captured = capsys.readouterr()
    for text in (captured.out, captured.err):
        assert text
        assert all(character.isprintable() or character == "\n" for character in text)
    assert captured.out == "a\\x1b]0;pwned\\x07\\x9b2J\\rb\\u202e\\x7f\\ud800\n"


def test_a_cell_of_a_table_is_one_line() -> None:
    found = table(("file", "size"), [("a\nFiles (all hashes match)\x1b[2K", "1 B")])
    assert found.splitlines()[1] == r"a\nFiles (all hashes match)\x1b[2K   1 B"


def test_json_stays_json(capsys: pytest.CaptureFixture[str]) -> None:
    with safe_streams():
        print_json({"name": f"{EVIL} ##[error] ::x", "value": math.nan, "list": [math.inf]})
    text = capsys.readouterr().out
    assert text.isascii()
    assert "##" not in text
    assert not set(text) & {"\x1b", "\x7f", "\r"}
    expected = {"name": f"{EVIL} ##[error] ::x", "value": None, "list": [None]}
    assert json.loads(text) == expected


@pytest.mark.parametrize("on_terminal", [True, False])
def test_generated_text_is_raw_in_a_pipe_only(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, on_terminal: bool
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: on_terminal, raising=False)
    with safe_streams():
        print_generated("a\x1b[31m\tb\n")
    assert capsys.readouterr().out == ("a\\x1b[31m\tb\n" if on_terminal else "a\x1b[31m\tb\n")


def test_streams_are_restored() -> None:
    before = sys.stdout, sys.stderr
    with safe_streams():
        assert (sys.stdout, sys.stderr) != before
    assert (sys.stdout, sys.stderr) == before


def test_a_traceback_acts_on_nothing_either(capsys: pytest.CaptureFixture[str]) -> None:
    try:
        raise RuntimeError(EVIL)
    except RuntimeError as error:
        print_exception(type(error), error, error.__traceback__)
    text = capsys.readouterr().err
    assert text.startswith("Traceback")
    assert r"RuntimeError: a\x1b]0;pwned\x07\x9b2J\rb\u202e\x7f\ud800" in text
    assert "\x1b" not in text
