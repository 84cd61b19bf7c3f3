"""Text files on the command line: their token ids, with a progress bar for long ones."""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fwl_export.cli.terminal import progress_bar

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from fwl_export.bundle.text_tokenizer import TextTokenizer
    from fwl_export.runtimes import Session

# Shorter files are tokenized in less than a second.
_LONG = 1_000_000  # bytes
_BYTES_PER_TOKEN = 4
# A check reads no case that is longer than four times `tokens`, and takes three rows from the text.
_TEXTS_PER_CHECK = 12
_ENOUGH = 1 << 17  # tokens that are read at once


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
    start = session is None or not session.positions[0]
    return _read(path, tokenizer, start, special, most)


def checked_ids(
    path: Path,
    tokenizer: Tokenizer | TextTokenizer,
    tokens: int,
    cases: str = "",
    special: bool = False,
) -> Any:
    """Return as many token ids of a text file as a check can need, [N] int64.

    Args:
      path: Text file in UTF-8; "-" is standard input.
      tokenizer: Tokenizer of the model.
      tokens: Tokens of the text that the check reads.
      cases: The cases of the check; what they read stands behind their names, as in "decode@5000".
      special: Whether control tokens in the text are read as such.

    Raises:
      TokenError: See `fwl_export.bundle.tokenizer.read_ids`.
    """
    longest = max([tokens, *map(int, re.findall(r"@(\d+)", cases))])
    return _read(path, tokenizer, True, special, max(_ENOUGH, _TEXTS_PER_CHECK * longest + 1))


def _read(
    path: Path, tokenizer: Tokenizer | TextTokenizer, start: bool, special: bool, most: int
) -> Any:
    """Read a text file, with a progress bar if it is long."""
    from fwl_export.bundle.tokenizer import read_ids

    size = path.stat().st_size if path.is_file() else 0
    if min(size, most * _BYTES_PER_TOKEN or size) < _LONG:
        return read_ids(path, tokenizer, start, special, most)
    with progress_bar("tokenizing", size) as advance:
        return read_ids(path, tokenizer, start, special, most, advance)


def shown_name(path: Path) -> str:
    """Return what to call a text file."""
    return "standard input" if path == Path("-") else path.name


def typed_text(text: str) -> str:
    """Return a text from the command line as UTF-8, where the locale could not decode it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        with contextlib.suppress(UnicodeError):
            return os.fsencode(text).decode()
    return text
