"""What verbs print: progress and notes on standard error, tables and JSON on standard output."""

from __future__ import annotations

import json
import logging
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from fwl_export.cli import logs

# What every table and paragraph fits in.
COLUMNS = 80

_log = logging.getLogger(logs.PROGRESS)


def print_json(data: Any) -> None:
    """Print data on standard output, for programs."""
    print(json.dumps(data, indent=2))


def note(message: str) -> None:
    """Print a hint on standard error, unless the user asked for quiet."""
    _log.info(message)
    if not logs.is_quiet():
        print(message, file=sys.stderr, flush=True)


@contextmanager
def spinner(title: str) -> Iterator[Callable[[str], None]]:
    """Show the current step on standard error; yields the function that names it."""
    console = _console()
    began = time.perf_counter()
    with console.status(title) as status:

        def say(message: str) -> None:
            _log.info("%s: %s", title, message)
            if console.is_terminal:
                status.update(f"{title}: {message}")
            elif not logs.is_quiet():
                print(f"{title}: {message}", file=sys.stderr, flush=True)

        yield say
    _log.info("%s: done in %.1f s", title, time.perf_counter() - began)


@contextmanager
def progress_bar(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show a bar on standard error; yields the function that advances it."""
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn())
    console = _console()
    began = time.perf_counter()
    _log.info("%s: begins, %d steps", title, total)
    if not console.is_terminal and not logs.is_quiet():
        print(f"{title} …", file=sys.stderr, flush=True)
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as progress:
        task = progress.add_task(title, total=total)
        yield lambda advance: progress.update(task, advance=advance)
    _log.info("%s: done in %.1f s", title, time.perf_counter() - began)


def _console() -> Any:
    from rich.console import Console

    return Console(stderr=True, quiet=logs.is_quiet())


def table(header: Sequence[str], rows: Sequence[Sequence[str]], columns: int = COLUMNS) -> str:
    """Return a plain text table: the first column aligned left, the others right.

    One that is wider than `columns` gets closer columns, a header of several lines and, if that is
    not enough, wrapped cells in its first column.
    """
    widths = _widths([header, *rows])
    gap = 2
    if _total(widths, gap) > columns:
        gap = 1
        words = [max(cell.split(), key=len, default="") for cell in header]
        widths = _widths([words, *rows])
        widths[0] -= max(0, _total(widths, gap) - columns)
    lines = []
    for number, row in enumerate([header, *rows]):
        cells = [textwrap.wrap(cell, width) for cell, width in zip(row, widths, strict=True)]
        height = max(1, *map(len, cells))
        for cell in cells:
            filler = [""] * (height - len(cell))
            cell[:] = [*filler, *cell] if number == 0 else [*cell, *filler]
        lines += [_line(line, widths, gap) for line in zip(*cells, strict=True)]
    return "\n".join(lines)


def _widths(rows: Sequence[Sequence[str]]) -> list[int]:
    return [max(map(len, column)) for column in zip(*rows, strict=True)]


def _total(widths: Sequence[int], gap: int) -> int:
    return sum(widths) + gap * (len(widths) - 1)


def _line(cells: Sequence[str], widths: Sequence[int], gap: int) -> str:
    first, *others = zip(cells, widths, strict=True)
    aligned = [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]
    return (" " * gap).join(aligned).rstrip()


def size(count: float) -> str:
    """Return a number of bytes for people, e.g. "1.5 MB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError
