"""`fwl-export read`: read a text once and keep what was learned."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fwl_export.cli.options import (
    BundleArgument,
    JsonOption,
    LearningRateScaleOption,
    NoPluginOption,
    RuntimeOption,
    SpecialOption,
    StateOption,
    completion,
)
from fwl_export.cli.terminal import counted, print_json, progress_bar, rate, size, spinner
from fwl_export.cli.texts import shown_name, text_ids

if TYPE_CHECKING:
    from fwl_export.bundle.text_tokenizer import TextTokenizer
    from fwl_export.runtimes import Session

# Repeated here because `bundle.state_file` loads NumPy; a test compares the two.
COMPRESSIONS = ("none", "fp16", "lowrank")


def read(
    bundle: BundleArgument,
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE", help="Text file to read; - is standard input.", show_default=False
        ),
    ],
    output: Annotated[
        Path, typer.Option("-o", "--output", help="State file to write.", show_default=False)
    ],
    state: StateOption = None,
    compress: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="none; fp16, half the size; or lowrank, small after short texts.",
            autocompletion=completion(*COMPRESSIONS),
        ),
    ] = "none",
    special: SpecialOption = False,
    learning_rate_scale: LearningRateScaleOption = 1.0,
    runtime: RuntimeOption = "onnxruntime",
    no_plugin: NoPluginOption = False,
    json: JsonOption = False,
) -> None:
    """Read a text and save what was learned from it.

    Read a manual once; then `fwl-export generate --state` answers from it, in any process and
    with any runtime of the same bundle.

    Example:
      fwl-export read demo-bundle manual.txt -o manual.state
    """
    from dataclasses import asdict

    _check_compression(compress)  # before the work, not after it
    session, tokenizer = open_reader(bundle, runtime, no_plugin, learning_rate_scale, state)
    ids = text_ids(file, tokenizer, session, special)
    began = time.perf_counter()
    read_tokens(session, ids)
    seconds = time.perf_counter() - began
    saved = session.save_state(output, compress=compress)
    if json:
        print_json({"file": str(file), "output": str(output), "read": len(ids), **asdict(saved)})
        return
    print(f"{shown_name(file)}: {counted(len(ids))} read, {rate(len(ids), seconds)}")
    error = f", error {saved.error:.1e} of the largest value" if compress != "none" else ""
    print(
        f"wrote {output}\n{size(saved.file_bytes)}, {size(saved.state_bytes)} in memory, at token "
        f"{saved.tokens[0]}{error}"
    )


def _check_compression(compress: str) -> None:
    from fwl_export.bundle.state_file import COMPRESSIONS as KNOWN
    from fwl_export.errors import ConfigError

    if compress not in KNOWN:
        raise ConfigError(f"--compress is '{compress}'; expected {', '.join(KNOWN)}")


def open_reader(
    bundle: Path,
    runtime: str,
    no_plugin: bool,
    learning_rate_scale: float,
    state: Path | None,
) -> tuple[Session, TextTokenizer]:
    """Open a bundle to read text.

    Args:
      bundle: Folder of the bundle.
      runtime: Name of the runtime.
      no_plugin: Whether to do without our kernel.
      learning_rate_scale: Factor of the learning rates.
      state: State file to continue from.
    """
    from fwl_export.bundle.manifest import read_bundle
    from fwl_export.bundle.text_tokenizer import bundle_text_tokenizer
    from fwl_export.runtimes import open_session

    opened = read_bundle(bundle)
    tokenizer = bundle_text_tokenizer(opened)
    with spinner("opening the model"):
        session = open_session(opened, runtime, plugin="none" if no_plugin else "auto")
    session.learning_rate_scale = learning_rate_scale
    if state is not None:
        session.load_state(state)
    return session, tokenizer


def read_tokens(session: Session, ids: Any) -> None:
    """Read token ids [N] into a session of one row, and show a progress bar.

    Raises:
      TokenError: The text is longer than the model can read; nothing is read then.
    """
    from fwl_export.errors import TokenError

    room = session.max_positions - session.positions[0]
    if session.max_positions and len(ids) > room:
        raise TokenError(
            f"the text has {len(ids)} tokens, but this model can read at most {room} more; read a "
            "shorter text"
        )
    with progress_bar("reading", len(ids)) as advance:
        for start in range(0, len(ids), session.max_tokens):
            part = ids[start : start + session.max_tokens]
            session.feed(part, last_only=True)
            advance(len(part))
