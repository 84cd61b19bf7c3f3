"""The docstring check finds entries that say too little, and passes good ones."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tools.lint_docstrings import Entry, entries, findings, main, python_files

GOOD = '''
def f(query, *rest, **options):
    """Multiply.

    Args:
      query: [B, T, Dk] read vectors.
      *rest: More of them, each with a
        second line that is indented.
      **options: Options of the
        backend.

    Returns:
      output: [B, T, Dv].

    Raises:
      ShapeError, StateError: A size disagrees.
    """
'''

BAD = '''"""A module.

Attributes:
  one: B.
"""

class C:
    """A class.

    Attributes:
      size: Of the file, in bytes.
      empty:
      a, b: where.
    """

    async def f(self):
        """Do it.

        Args:
          x: [B, T].

        Returns:
          Nothing.

        Raises:
          E: see.
          F:
            Two words.
        """
'''


def test_good_docstrings_pass() -> None:
    found = list(entries(GOOD))
    assert [entry.name for entry in found] == [
        "query",
        "*rest",
        "**options",
        "",
        "ShapeError, StateError",
    ]
    assert found[1].text == "More of them, each with a second line that is indented."
    assert not [entry for entry in found if entry.problem]


def test_short_entries_are_found_with_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "bad.py"
    path.write_text(BAD, encoding="utf-8")
    short, fragment = "fewer than 2 words", "a fragment: it does not say what the value is"
    assert findings(path) == [
        f'{path}:4: Attributes one: "B." ({short})',
        f'{path}:11: Attributes size: "Of the file, in bytes." ({fragment})',
        f'{path}:12: Attributes empty: "" ({short})',
        f'{path}:13: Attributes a, b: "where." ({short})',
        f'{path}:23: Returns : "Nothing." ({short})',
        f'{path}:26: Raises E: "see." ({short})',
    ]
    assert (
        path.read_text(encoding="utf-8").splitlines()[10].strip() == "size: Of the file, in bytes."
    )


@pytest.mark.parametrize("text", ["[B, T] tokens", "Type of the state", "is off; offset 0"])
def test_entries_that_say_something(text: str) -> None:
    assert Entry(1, "Args", "x", text).problem == ""


@pytest.mark.parametrize("text", ["", "B.", "[B]", "`x`", "float32."])
def test_entries_that_do_not(text: str) -> None:
    assert Entry(1, "Args", "x", text).problem == "fewer than 2 words"


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["lint_docstrings", *map(str, arguments)])
    return main()


def test_exit_codes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "good.py").write_text(GOOD, encoding="utf-8")
    assert run(monkeypatch, tmp_path) == 0
    assert capsys.readouterr() == ("", "")
    (tmp_path / "bad.py").write_text(BAD, encoding="utf-8")
    assert run(monkeypatch, tmp_path) == 1
    assert "6 docstring entries say too little" in capsys.readouterr().err
    assert run(monkeypatch, tmp_path / "good.py") == 0
    assert run(monkeypatch, tmp_path / "none") == 2
    assert "does not exist; expected a folder or a Python file" in capsys.readouterr().err


def test_files_are_found_below_folders(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    for name in ("b.py", "a/c.py", "a/d.txt"):
        (tmp_path / name).touch()
    found = [path.relative_to(tmp_path).as_posix() for path in python_files([tmp_path])]
    assert found == ["a/c.py", "b.py"]
