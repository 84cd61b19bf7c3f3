"""Options and arguments that several verbs share, and what the shell completes for them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated

import typer

from fwl_export.bundle.defaults import DEFAULT_MAX_LEARNING_WEIGHT
from fwl_export.plugins import CHOICES as PLUGIN_CHOICES
from fwl_export.runtimes.registry import RUNTIMES

# Headings of option groups on help pages.
OUTPUT = "Output options"
GENERAL = "General options"

# Repeated here because `parity.cases` loads NumPy; a test compares the two.
CASES = (
    *("text", "mixed1", "mixed2", "mixed5", "mixed8"),
    *("repeat", "endless", "long", "decode", "far", "again"),
)

CANDIDATES = tuple(
    candidate
    for name, runtime in RUNTIMES.items()
    for candidate in (name, *(f"{name}:{option}" for option in runtime.candidate_options))
)


def completion(*values: str) -> Callable[[str], list[str]]:
    """Return a function that completes one of the values."""
    return lambda incomplete: [value for value in values if value.startswith(incomplete)]


def list_completion(values: Iterable[str]) -> Callable[[str], list[str]]:
    """Return a function that completes the last of several values separated by commas."""

    def complete(incomplete: str) -> list[str]:
        before, comma, last = incomplete.rpartition(",")
        used = before.split(",")
        found = [value for value in values if value.startswith(last) and value not in used]
        return [f"{before}{comma}{value}" for value in found]

    return complete


def complete_checkpoint(incomplete: str) -> list[str]:
    """Complete "demo"; for everything else the shell completes paths."""
    return ["demo"] if incomplete and "demo".startswith(incomplete) else []


BundleArgument = Annotated[
    Path, typer.Argument(metavar="BUNDLE", help="Folder of the bundle.", show_default=False)
]
JsonOption = Annotated[
    bool,
    typer.Option(
        "--json",
        help="Print the result as JSON on standard output, nothing else.",
        rich_help_panel=OUTPUT,
    ),
]
NoPluginOption = Annotated[
    bool,
    typer.Option(
        "--no-plugin",
        help="Run the fast-weight update in standard operators instead of in our kernel.",
    ),
]
PluginOption = Annotated[
    str,
    typer.Option(
        metavar="CHOICE",
        help="The library with our kernel for the fast-weight update: auto (use it where it is "
        "installed), none (standard operators), required (an error without it), or a path.",
        autocompletion=completion(*PLUGIN_CHOICES),
    ),
]
LearningRateScaleOption = Annotated[
    float,
    typer.Option(
        "--learning-rate-scale",
        help="Factor on the learning rates of the fast weights; 0 means learn nothing. More than "
        f"{DEFAULT_MAX_LEARNING_WEIGHT:g} is refused, since it could spoil all that follows.",
        min=0,
        max=DEFAULT_MAX_LEARNING_WEIGHT,
    ),
]
RuntimeOption = Annotated[
    str,
    typer.Option(
        "--runtime",
        metavar="NAME",
        help=f"Runtime that runs the model: {', '.join(RUNTIMES)}.",
        autocompletion=completion(*RUNTIMES),
    ),
]
StateOption = Annotated[
    Path | None,
    typer.Option(
        help="Continue from this state file, which `fwl-export read` wrote.",
        show_default="a fresh state",
    ),
]
SpecialOption = Annotated[
    bool,
    typer.Option(
        "--special",
        help="Read control tokens that the text contains, such as </s>, as control tokens instead "
        "of as plain text.",
    ),
]
TextOption = Annotated[
    Path | None,
    typer.Option(help="Text file to read.", show_default="the held-out play that ships"),
]
SeedOption = Annotated[
    int, typer.Option(help="Seed of the random sizes and rows of the calls.", min=0)
]
ForceOption = Annotated[
    bool,
    typer.Option("--force", help="Replace what is at OUTPUT.", rich_help_panel=OUTPUT),
]

VerboseOption = Annotated[
    int,
    typer.Option(
        "--verbose",
        "-v",
        count=True,
        help="Say what is read, chosen and written; -vv says more.",
        show_default=False,
        rich_help_panel=GENERAL,
    ),
]
QuietOption = Annotated[
    bool,
    typer.Option(
        "--quiet",
        "-q",
        help="Show neither progress nor notes, only results and errors.",
        rich_help_panel=GENERAL,
    ),
]
LogFileOption = Annotated[
    Path | None,
    typer.Option(
        "--log-file",
        help="Append a complete log with time stamps to this file.",
        rich_help_panel=GENERAL,
    ),
]
