"""What verbs share: progress, tables, and output for programs."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from fwl_export.runtimes.registry import RUNTIMES

BundleArgument = Annotated[Path, typer.Argument(help="Folder of the bundle.", show_default=False)]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
NoPluginOption = Annotated[
    bool,
    typer.Option("--no-plugin", help="Run the update in standard operators, without our kernel."),
]
LearningRateScaleOption = Annotated[
    float,
    typer.Option(
        "--learning-rate-scale", help="Times the model's step sizes; 0 = learn nothing.", min=0
    ),
]
RuntimeOption = Annotated[
    str, typer.Option("--runtime", "--backend", help=f"One of {', '.join(RUNTIMES)}.")
]


def print_json(data: Any) -> None:
    """Print data on standard output, for programs."""
    print(json.dumps(data, indent=2))


@contextmanager
def spinner(title: str) -> Iterator[Callable[[str], None]]:
    """Show what is being done, on standard error; yields a function that says it."""
    from rich.console import Console

    console = Console(stderr=True)
    with console.status(title) as status:

        def say(message: str) -> None:
            if console.is_terminal:
                status.update(f"{title}: {message}")
            else:
                print(f"{title}: {message}", file=sys.stderr, flush=True)

        yield say


@contextmanager
def progress_bar(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show a bar on standard error; yields a function that advances it."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn())
    console = Console(stderr=True)
    if not console.is_terminal:
        print(f"{title} …", file=sys.stderr, flush=True)
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as progress:
        task = progress.add_task(title, total=total)
        yield lambda advance: progress.update(task, advance=advance)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a plain text table: first column to the left, the others to the right."""
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
