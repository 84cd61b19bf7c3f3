"""What verbs that write text share: the options of sampling, and a session that has read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fwl_export.cli.read import open_reader, read_tokens
from fwl_export.cli.texts import text_ids

if TYPE_CHECKING:
    from fwl_export.runtimes import TextSession

_SAMPLING = "Sampling options"

ReadOption = Annotated[
    Path | None, typer.Option(help="Text file to read, and learn from, before the prompt.")
]
StopOption = Annotated[
    list[str] | None,
    typer.Option(
        "--stop",
        help="End the text before this string, e.g. --stop $'\\n'; may be given several times.",
        show_default=False,
    ),
]
TemperatureOption = Annotated[
    float,
    typer.Option(
        help="Sampling temperature; 0 always takes the most likely token.",
        min=0,
        rich_help_panel=_SAMPLING,
    ),
]
TopKOption = Annotated[
    int,
    typer.Option(
        help="Sample from the k most likely tokens; 0 means all.",
        min=0,
        rich_help_panel=_SAMPLING,
    ),
]
TopPOption = Annotated[
    float,
    typer.Option(
        help="Sample from the fewest tokens whose probabilities add up to p; 1 means all.",
        rich_help_panel=_SAMPLING,
    ),
]
MinPOption = Annotated[
    float,
    typer.Option(
        help="Sample from tokens at least p times as likely as the most likely; 0 means all.",
        min=0,
        max=1,
        rich_help_panel=_SAMPLING,
    ),
]
RepetitionPenaltyOption = Annotated[
    float,
    typer.Option(
        help="Make tokens of the prompt and of the text so far less likely; 1 does nothing.",
        rich_help_panel=_SAMPLING,
    ),
]
SeedOption = Annotated[
    int,
    typer.Option(
        help="Seed of the random choice; the same seed gives the same text.",
        min=0,
        rich_help_panel=_SAMPLING,
    ),
]


def open_text(
    bundle: Path,
    runtime: str,
    no_plugin: bool,
    learning_rate_scale: float,
    state: Path | None,
    read: Path | None,
    special: bool = False,
) -> TextSession:
    """Open a bundle to write text, after it has loaded a state and read a file.

    Args:
      bundle: Folder of the bundle.
      runtime: Name of the runtime.
      no_plugin: Whether to do without our kernel.
      learning_rate_scale: Factor of the learning rates.
      state: State file to continue from.
      read: Text file to read.
      special: Whether control tokens in the file are read as such.
    """
    from fwl_export.runtimes import TextSession

    session, tokenizer = open_reader(bundle, runtime, no_plugin, learning_rate_scale, state)
    if read is not None:
        read_tokens(session, text_ids(read, tokenizer, session, special))
    return TextSession(session, tokenizer)
