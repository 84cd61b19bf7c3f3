"""What verbs print: progress and notes on standard error, tables and JSON on standard output."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from fwl_export.cli import logs

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


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a plain text table: the first column aligned left, the others right."""
    lines = [header, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    text = []
    for line in lines:
        cells = [line[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
        text.append("  ".join(cells).rstrip())
    return "\n".join(text)


def size(count: float) -> str:
    """Return a number of bytes for people, e.g. "1.5 MB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError
