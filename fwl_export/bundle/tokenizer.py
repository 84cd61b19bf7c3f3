"""The tokenizer file of a checkpoint or bundle: from text to token ids."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from fwl_export.errors import CheckpointError, FwlError, TokenError
from fwl_export.filesystem import open_regular
from fwl_export.json_files import brief, read_bounded

# Published tokenizers of 260 000 entries have 35 MB.
_LARGEST_FILE = 256 << 20


def load_tokenizer(
    path: Path,
    vocab_size: int | None = None,
    padded: bool = False,
    content: bytes | None = None,
) -> Tokenizer:
    """Read a tokenizer.json.

    Args:
      path: File to read.
      vocab_size: Number of entries that the tokenizer must have, the model's; None allows any.
      padded: Whether the tokenizer may have fewer entries than the model, as in published models.
      content: Content of the file, if it was read already.

    Raises:
      CheckpointError: The file cannot be read, or its number of entries does not fit the model.
    """
    tokenizer = _parsed(path, content)
    found = tokenizer.get_vocab_size()
    if vocab_size is not None and (found > vocab_size or (found < vocab_size and not padded)):
        raise CheckpointError(
            f"{path} has {found} entries, but the model's vocab_size is {vocab_size}; "
            "is it the tokenizer of another model?"
        )
    largest = max(tokenizer.get_vocab().values(), default=0)
    if vocab_size is not None and largest >= vocab_size:
        raise CheckpointError(
            f"{path} has a token of id {largest}, but the model's ids end at {vocab_size - 1}; "
            "is it the tokenizer of another model?"
        )
    return tokenizer


class _Model(msgspec.Struct):
    type: str | None = None


class _TokenizerFile(msgspec.Struct):
    model: _Model


def _parsed(path: Path, content: bytes | None) -> Tokenizer:
    """Return the tokenizer of a file; its outer form is checked first, see `_TokenizerFile`."""
    try:
        if content is None:
            content = read_bounded(path, CheckpointError, _LARGEST_FILE)
        msgspec.json.decode(content, type=_TokenizerFile)
        return Tokenizer.from_str(content.decode())
    except (FwlError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library raises nothing narrower, and panics in Rust
        raise CheckpointError(f"{path} is not a tokenizer file ({brief(error)})") from None


def read_ids(path: Path, tokenizer: Tokenizer) -> npt.NDArray[np.int64]:
    """Return the token ids of a text file, [N] int64.

    Args:
      path: Text file in UTF-8; not a pipe or a device, which may have no end.
      tokenizer: Tokenizer of the model.

    Raises:
      TokenError: The file is not UTF-8 text or has fewer than 2 tokens, or the tokenizer fails.
    """
    ids = encode(read_text(path), tokenizer)
    if len(ids) < 2:
        raise TokenError(f"'{path}' has {len(ids)} tokens; expected 2 or more")
    return ids


def read_text(path: Path) -> str:
    """Return the content of a text file.

    Args:
      path: Text file in UTF-8; not a pipe or a device, which may have no end.

    Raises:
      TokenError: The file cannot be read, or is not UTF-8 text.
    """
    try:
        with open_regular(path, TokenError) as stream:
            return stream.readall().decode()
    except (OSError, UnicodeDecodeError) as error:
        raise TokenError(f"cannot read '{path}' as text: {error}") from None


def encode(text: str, tokenizer: Tokenizer) -> npt.NDArray[np.int64]:
    """Return the token ids of a text, [N] int64.

    Args:
      text: Text of any length.
      tokenizer: Tokenizer of the model.

    Raises:
      TokenError: The tokenizer fails, as one whose patterns backtrack too long does.
    """
    try:
        with _without_panic_messages():
            return np.array(tokenizer.encode(text).ids, dtype=np.int64)
    except Exception as error:
        problem: BaseException = error
    except BaseException as error:
        # Panics of Rust code are no `Exception`; Ctrl-C is none either.
        if type(error).__name__ != "PanicException":
            raise
        problem = error
    first, _, _ = str(problem).partition("\n")
    raise TokenError(
        f"the tokenizer cannot split this text into tokens ({first}); was tokenizer.json damaged, "
        "or does it come from somebody you do not know?"
    ) from None


@contextlib.contextmanager
def _without_panic_messages() -> Iterator[None]:
    """Send standard error nowhere meanwhile: Rust prints its panics there, besides raising them."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # standard error is closed
            before, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
            stack.callback(os.close, before)
            stack.callback(os.close, nowhere)
            stack.callback(os.dup2, before, 2)
            os.dup2(nowhere, 2)
        yield
