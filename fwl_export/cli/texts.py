"""Text files on the command line: their token ids, with a progress bar for long ones."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from fwl_export.cli.terminal import progress_bar

if TYPE_CHECKING:
    from fwl_export.bundle.text_tokenizer import TextTokenizer
    from fwl_export.runtimes import Session

# Shorter files are tokenized in less than a second.
_LONG = 1_000_000  # bytes


def text_ids(
    path: Path,
    tokenizer: TextTokenizer,
    session: Session | None = None,
    special: bool = False,
    most: int = 0,
) -> Any:
    """Return the token ids of a text file, [N] int64.

    Args:
      path: Text file in UTF-8; "-" is standard input.
      tokenizer: Tokenizer of the model.
      session: Session of one row that will read the text; None means a fresh one.
      special: Whether control tokens in the text are read as such.
      most: Largest number of tokens to return; 0 means all.

    Raises:
      TokenError: See `fwl_export.bundle.tokenizer.read_ids`.
    """
    from fwl_export.bundle.tokenizer import read_ids

    start = session is None or not session.positions[0]
    size = path.stat().st_size if path.is_file() else 0
    if size < _LONG or most:
        return read_ids(path, tokenizer, start, special, most)
    with progress_bar("tokenizing", size) as advance:
        return read_ids(path, tokenizer, start, special, most, advance)


def shown_name(path: Path) -> str:
    """Return what to call a text file."""
    return "standard input" if path == Path("-") else path.name
