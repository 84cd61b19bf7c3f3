"""Find docstring entries that say too little: fewer than two words, or a fragment such as "of it".

    python -m tools.lint_docstrings fwl_export plugins tools

Reads the sections `Args:`, `Attributes:`, `Returns:`, `Yields:` and `Raises:` of Google style
docstrings. Prints one line per finding, `file:line: section name: "text" (problem)`, and exits
with 1 if there is any.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

MINIMUM_WORDS = 2

# Sections whose lines are "name: text", and sections of plain text.
_NAMED = ("Args", "Attributes", "Raises")
_PLAIN = ("Returns", "Yields")
_HEADING = re.compile(rf"^(\s*)({'|'.join((*_NAMED, *_PLAIN))}):\s*$")
_ENTRY = re.compile(
    r"^(\*{0,2}[A-Za-z_][\w.]*(?:, *\*{0,2}[A-Za-z_][\w.]*)*)\s*(?:\([^)]*\))?:(.*)$"
)
_WORD = re.compile(r"[^\W_]+(?:['’.-][^\W_]+)*")

_Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Entry:
    """One entry of a docstring section.

    Attributes:
      line: Line number in the file, counted from 1.
      section: Heading of the section, such as "Args".
      name: Name of the argument, attribute or exception; empty in `Returns` and `Yields`.
      text: Description with its line breaks replaced by spaces.
    """

    line: int
    section: str
    name: str
    text: str

    @property
    def problem(self) -> str:
        """What is wrong with the description, or "" if nothing is."""
        words = _WORD.findall(self.text)
        if len(words) < MINIMUM_WORDS:
            return f"fewer than {MINIMUM_WORDS} words"
        if words[0].lower() == "of":
            return "a fragment: it does not say what the value is"
        return ""


def entries(source: str) -> Iterator[Entry]:
    """Yield all entries of all docstrings of a Python file.

    Args:
      source: Text of the file.

    Raises:
      SyntaxError: The text is not Python.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, _Documented) and ast.get_docstring(node, clean=False):
            statement = node.body[0]
            assert isinstance(statement, ast.Expr)
            written = ast.get_source_segment(source, statement.value) or ""
            yield from _entries_of_docstring(written.splitlines(), statement.lineno)


def _entries_of_docstring(lines: list[str], first_line: int) -> Iterator[Entry]:
    """Yield the entries of one docstring, given as its source lines with the quotes."""
    at = 0
    while at < len(lines):
        heading = _HEADING.match(lines[at])
        at += 1
        if heading is None:
            continue
        start, indent = at, len(heading[1])
        while at < len(lines) and (not lines[at].strip() or _indent(lines[at]) > indent):
            at += 1
        body = [line.replace('"""', "").rstrip() for line in lines[start:at]]
        yield from _entries_of_section(heading[2], body, first_line + start)


def _entries_of_section(section: str, lines: list[str], first_line: int) -> Iterator[Entry]:
    if section in _PLAIN:
        yield Entry(first_line, section, "", _joined(lines))
        return
    filled = [line for line in lines if line]
    indent = min(map(_indent, filled), default=0)
    starts = [i for i, line in enumerate(lines) if line and _indent(line) == indent]
    for start, end in zip(starts, [*starts[1:], len(lines)], strict=True):
        entry = _ENTRY.match(lines[start].strip())
        name, text = (entry[1], entry[2]) if entry else ("", lines[start])
        yield Entry(first_line + start, section, name, _joined([text, *lines[start + 1 : end]]))


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def _joined(lines: Iterable[str]) -> str:
    return " ".join(" ".join(lines).split())


def python_files(paths: Iterable[Path]) -> Iterator[Path]:
    """Yield the Python files among files and below folders, in a fixed order.

    Args:
      paths: Files, which are yielded as they are, and folders to search.

    Raises:
      FileNotFoundError: One of the paths does not exist.
    """
    for path in paths:
        if path.is_dir():
            yield from sorted(path.rglob("*.py"))
        elif path.is_file():
            yield path
        else:
            raise FileNotFoundError(f"'{path}' does not exist; expected a folder or a Python file")


def findings(path: Path) -> list[str]:
    """Return one line for every entry of a file that has a problem.

    Args:
      path: Python file to read.
    """
    return [
        f'{path}:{entry.line}: {entry.section} {entry.name}: "{entry.text}" ({problem})'
        for entry in entries(path.read_text(encoding="utf-8"))
        if (problem := entry.problem)
    ]


def main() -> int:
    """Check the paths of the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("paths", nargs="+", type=Path, help="Python files, or folders of them")
    arguments = parser.parse_args()
    try:
        found = [line for path in python_files(arguments.paths) for line in findings(path)]
    except (FileNotFoundError, SyntaxError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(*found, sep="\n", end="\n" if found else "")
    if found:
        print(
            f"{len(found)} docstring entries say too little; write at least {MINIMUM_WORDS} words "
            "that say what the value is: its meaning, shape, dtype or unit",
            file=sys.stderr,
        )
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
