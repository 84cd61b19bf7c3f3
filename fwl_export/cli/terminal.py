"""What verbs print: progress and notes on standard error, tables and JSON on standard output.

Whatever is printed passes `safe_streams`: characters that would act on the terminal are shown, not
obeyed, since names and messages come from files of other people. The exceptions are JSON, which
escapes them in its own way, and generated text that goes to a file or a pipe.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import sys
import textwrap
import time
import traceback
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TextIO

import typer

from fwl_export.cli import logs
from fwl_export.json_files import without_non_finite
from fwl_export.printable import indented, one_line, printable, without_ci_commands

# What every table and paragraph fits in.
COLUMNS = 80

_log = logging.getLogger(logs.PROGRESS)


class _SafeStream:
    """A text stream that shows control characters instead of obeying them.

    Attributes:
      unfiltered: The stream beneath, for text that is safe already.
    """

    def __init__(self, stream: TextIO) -> None:
        self.unfiltered = stream

    def write(self, text: str) -> int:
        with _named_errors(self.unfiltered):
            self.unfiltered.write(without_ci_commands(printable(text)))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.unfiltered, name)


class _Nowhere(io.StringIO):
    """Takes text and keeps none."""

    def write(self, text: str) -> int:
        return len(text)


@contextmanager
def safe_streams() -> Iterator[None]:
    """Let everything that is printed until the block ends pass a filter.

    Characters that the terminal's encoding lacks are escaped too.
    """
    before = sys.stdout, sys.stderr
    # Python has no stream where the file was closed.
    here = [stream or _Nowhere() for stream in before]
    for stream in here:
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    sys.stdout, sys.stderr = map(_SafeStream, here)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def flush_output() -> None:
    """Write out what was printed, so that a full disk is an error like any other.

    Raises:
      OSError: It cannot be written; the file is called "standard output".
      SystemExit: Nobody reads the output any more, as in a pipe into `head`.
    """
    with _named_errors(_unfiltered(sys.stdout)):
        sys.stdout.flush()


@contextmanager
def _named_errors(stream: TextIO) -> Iterator[None]:
    """Name standard output in errors of writing to it; see `flush_output`."""
    try:
        yield
    except OSError as error:
        if stream is sys.__stderr__:
            return  # there is no place left to say so
        with contextlib.suppress(OSError, AttributeError, ValueError):
            # Python tries again at its end.
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        if isinstance(error, BrokenPipeError):
            raise SystemExit(141) from None
        raise OSError(error.errno, error.strerror, "standard output") from None


def print_exception(
    kind: type[BaseException], error: BaseException, trace: types.TracebackType | None
) -> None:
    """Print a traceback on standard error, as Python does, but with the message made safe.

    Args:
      kind: Class of the exception.
      error: The exception.
      trace: Where it was raised.
    """
    parts = traceback.format_exception(kind, error, trace)
    # Of the parts, those without a leading space are messages.
    shown = [part if part[0].isspace() else indented(part.rstrip("\n")) + "\n" for part in parts]
    _unfiltered(sys.stderr).write(without_ci_commands(printable("".join(shown))))


def _unfiltered(stream: TextIO) -> TextIO:
    beneath: TextIO = getattr(stream, "unfiltered", stream)
    return beneath


def print_json(data: Any, indent: int | None = 2) -> None:
    """Print data on standard output, for programs: ASCII only, and null for NaN and infinities.

    Args:
      data: Numbers, strings, mappings and sequences, nested in any way.
      indent: Columns to indent by; None prints a single line.
    """
    text = json.dumps(without_non_finite(data), indent=indent, allow_nan=False)
    # JSON leaves DEL and what CI systems obey as they are; both can only be inside of strings.
    text = text.replace("\x7f", "\\u007f").replace("##", "#\\u0023")
    with _named_errors(_unfiltered(sys.stdout)):
        print(text, file=_unfiltered(sys.stdout))


def print_generated(text: str) -> None:
    """Print what a model wrote: as it is into a file or a pipe, made safe on a terminal.

    Args:
      text: Part of the text; no line break is added.
    """
    stream = _unfiltered(sys.stdout)
    with _named_errors(stream):
        stream.write(printable(text) if stream.isatty() else text)
        stream.flush()


def heading(text: str) -> None:
    """Print a line of text on standard output, in bold on a terminal.

    Args:
      text: The line; it may begin with a line break.
    """
    typer.secho(printable(text), bold=True, file=_unfiltered(sys.stdout))


def note(message: str) -> None:
    """Print a hint on standard error, unless the user asked for quiet."""
    _log.info(message)
    if not logs.is_quiet():
        print(printable(message), file=sys.stderr, flush=True)


@contextmanager
def spinner(title: str) -> Iterator[Callable[[str], None]]:
    """Show the current step on standard error; yields the function that names it."""
    console = _console()
    began = time.perf_counter()
    # What is printed meanwhile passes rich, and the filter before it.
    with console.status(_shown(title)) as status, safe_streams():

        def say(message: str) -> None:
            _log.info("%s: %s", title, message)
            if console.is_terminal:
                status.update(_shown(f"{title}: {message}"))
            elif not logs.is_quiet():
                print(one_line(f"{title}: {message}"), file=sys.stderr, flush=True)

        yield say
    _log.info("%s: done in %.1f s", title, time.perf_counter() - began)


class Bar:
    """A progress bar: call it with the number of steps that were made."""

    def __init__(
        self, title: str, advance: Callable[[int], None], show: Callable[[str], None]
    ) -> None:
        self._title = title
        self._advance = advance
        self._show = show

    def __call__(self, steps: int) -> None:
        """Advance by a number of steps."""
        self._advance(steps)

    def say(self, message: str) -> None:
        """Show what is being done now."""
        _log.info("%s: %s", self._title, message)
        self._show(message)


@contextmanager
def progress_bar(title: str, total: int) -> Iterator[Bar]:
    """Show a bar on standard error; yields what advances it."""
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
    bar = Progress(*columns, TimeRemainingColumn(), console=console, transient=True)
    with bar as progress, safe_streams():
        task = progress.add_task(_shown(title), total=total)

        def show(message: str) -> None:
            if console.is_terminal:
                progress.update(task, description=_shown(f"{title}: {message}"))
            elif not logs.is_quiet():
                print(one_line(f"{title}: {message}"), file=sys.stderr, flush=True)

        yield Bar(title, lambda steps: progress.update(task, advance=steps), show)
    _log.info("%s: done in %.1f s", title, time.perf_counter() - began)


def _console() -> Any:
    from rich.console import Console

    # Its own control characters must reach the terminal, so what it shows is filtered by `_shown`.
    return Console(file=_unfiltered(sys.stderr), quiet=logs.is_quiet())


def _shown(text: str) -> str:
    """Return text as rich shows it: brackets are no markup, and control characters are visible."""
    from rich.markup import escape

    return escape(one_line(text))


def table(header: Sequence[str], rows: Sequence[Sequence[str]], columns: int = COLUMNS) -> str:
    """Return a plain text table: the first column aligned left, the others right.

    One that is wider than `columns` gets closer columns, a header of several lines and, if that is
    not enough, wrapped cells in its first column.
    """
    rows = [[one_line(cell) for cell in row] for row in rows]
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


def counted(tokens: int) -> str:
    """Return a number of tokens for people, e.g. "1 token"."""
    return f"{tokens} token" if tokens == 1 else f"{tokens} tokens"


def rate(tokens: int, seconds: float) -> str:
    """Return a speed for people, e.g. "1500 tokens/s"."""
    return f"{tokens / seconds:.0f} tokens/s" if seconds > 0 else "too fast to measure"
