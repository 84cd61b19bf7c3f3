"""The tokenizer file of a checkpoint or bundle: from text to token ids.

What the file carries beside its vocabulary must not change what a model reads: stored truncation,
padding and dropout are switched off when it is loaded, tokens that its post-processor puts behind a
text are left out, and those in front of it are put there only where a session begins.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import msgspec
import numpy as np
import numpy.typing as npt
from tokenizers import Encoding, Tokenizer

from fwl_export.bundle.text_file import TextFile, open_text
from fwl_export.bundle.text_pieces import token_pieces
from fwl_export.bundle.tokenizer_facts import facts, start_ids
from fwl_export.errors import CheckpointError, FwlError, TokenError
from fwl_export.json_files import brief, read_bounded, shown

# Published tokenizers of 260 000 entries have 35 MB.
_LARGEST_FILE = 256 << 20

# Of the entries of a tokenizer, this share may lie beyond the model's ids: published tokenizers
# have a few that were added after training. One with more of them is another model's.
_LARGEST_SURPLUS = 0.1


class WithTokenizer(Protocol):
    """What `read_ids` needs of a `TextTokenizer`, see `fwl_export.bundle.text_tokenizer`.

    Attributes:
      tokenizer: The tokenizer.
    """

    tokenizer: Tokenizer


def load_tokenizer(
    path: Path,
    vocab_size: int | None = None,
    content: bytes | None = None,
) -> Tokenizer:
    """Read a tokenizer.json, without the truncation, padding and dropout that it may ask for.

    Args:
      path: File to read.
      vocab_size: Number of token ids of the model; None allows any tokenizer.
      content: Content of the file, if it was read already.

    Raises:
      CheckpointError: The file cannot be read, or its entries do not fit the model.
    """
    tokenizer = _parsed(path, content)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if getattr(tokenizer.model, "dropout", None):
        tokenizer.model.dropout = None
    facts(tokenizer).vocab_size = vocab_size
    if vocab_size is not None:
        _check_vocabulary(path, tokenizer, vocab_size)
    start_ids(tokenizer, path)
    return tokenizer


def _check_vocabulary(path: Path, tokenizer: Tokenizer, vocab_size: int) -> None:
    """Check that a tokenizer can be the model's: nearly all of its ids are ids of the model."""
    ids = tokenizer.get_vocab().values()
    beyond = sum(token >= vocab_size for token in ids)
    if beyond > max(1, _LARGEST_SURPLUS * len(ids)):
        raise CheckpointError(
            f"{path} has {len(ids)} entries, of which {beyond} have ids of {vocab_size} and more, "
            f"but the model's ids end at {vocab_size - 1}; is it the tokenizer of another model?"
        )


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


def read_ids(
    path: Path,
    tokenizer: Tokenizer | WithTokenizer,
    start: bool = True,
    special: bool = False,
    most: int = 0,
    advance: Callable[[int], None] = lambda count: None,
) -> npt.NDArray[np.int64]:
    """Return the token ids of a text file, [N] int64.

    Args:
      path: Text file in UTF-8, or `STANDARD_INPUT`; not another pipe or a device, which may have no
        end.
      tokenizer: Tokenizer of the model.
      start: Whether the text begins a fresh session, see `encode`.
      special: Whether control tokens in the text are read as such, see `encode`.
      most: Largest number of tokens to return, the first of the text; 0 means all. No more of the
        file is read than that takes.
      advance: Called with the number of bytes just read, for a progress bar.

    Raises:
      TokenError: The file is not UTF-8 text or has fewer than 2 tokens, or the tokenizer fails.
    """
    raw = tokenizer if isinstance(tokenizer, Tokenizer) else tokenizer.tokenizer
    with open_text(path) as file:
        ids = _file_ids(file, raw, start, special, most, advance)
    _check_known(ids, raw)
    if len(ids) < 2 and most != 1:
        raise TokenError(f"{file.name} has {len(ids)} tokens; expected 2 or more")
    return ids


def _file_ids(
    file: TextFile,
    tokenizer: Tokenizer,
    start: bool,
    special: bool,
    most: int,
    advance: Callable[[int], None],
) -> npt.NDArray[np.int64]:
    reader = tokenizer if special else facts(tokenizer).plain
    before = list(start_ids(tokenizer)) if start else []
    parts: list[npt.NDArray[np.int64]] = []
    missing, done = most or sys.maxsize, 0
    for ids in token_pieces(lambda text: run(reader, text), file.read, most):
        piece = ids if parts else _with_start(ids, before, special)
        parts.append(np.array(piece[:missing], np.int64))
        missing -= len(parts[-1])
        advance(file.read_bytes - done)
        done = file.read_bytes
        if not missing:
            break
    return np.concatenate(parts)


def _with_start(ids: list[int], before: list[int], special: bool) -> list[int]:
    """Return the ids behind what belongs in front of them, unless the text itself has it there."""
    return ids if special and ids[: len(before)] == before else before + ids


def encode(
    text: str, tokenizer: Tokenizer, start: bool = True, special: bool = False
) -> npt.NDArray[np.int64]:
    """Return the token ids of a text, [N] int64.

    Args:
      text: Text of any length.
      tokenizer: Tokenizer of the model.
      start: Whether the text begins a fresh session. Then the token that the model was trained to
        see at the beginning comes first, if there is one, unless the text itself begins with it.
      special: Whether control tokens in the text, such as "</s>", are read as control tokens; they
        are plain text otherwise.

    Raises:
      TokenError: The tokenizer fails, as one whose patterns backtrack too long does, or the text
        has a token that the model does not know.
    """
    before = list(start_ids(tokenizer)) if start else []
    ids = run(tokenizer if special else facts(tokenizer).plain, text).ids
    found = np.array(_with_start(ids, before, special), np.int64)
    _check_known(found, tokenizer)
    return found


def _check_known(ids: npt.NDArray[np.int64], tokenizer: Tokenizer) -> None:
    """Check that the model of a tokenizer knows all tokens of a text."""
    size = facts(tokenizer).vocab_size
    if size is not None and len(ids) and (largest := int(ids.max())) >= size:
        raise TokenError(
            f"the text contains {shown(tokenizer.id_to_token(largest))}, which is token {largest} "
            f"of the tokenizer, but the model's ids end at {size - 1}: it was added to the "
            "tokenizer and never trained; remove it from the text"
        )


def run(tokenizer: Tokenizer, text: str) -> Encoding:
    """Return the tokens of a text, without any that the text does not contain.

    Raises:
      TokenError: The tokenizer fails, or the text is no Unicode text.
    """
    try:
        with _without_panic_messages():
            found = tokenizer.encode(text, add_special_tokens=False)
        facts(tokenizer).warn_of_unknown(text, found)
        return found
    except Exception as error:
        problem: BaseException = error
    except BaseException as error:
        # Panics of Rust code are no `Exception`; Ctrl-C is none either.
        if type(error).__name__ != "PanicException":
            raise
        problem = error
    if half := re.search("[\ud800-\udfff]", text):
        raise TokenError(
            f"the text is no Unicode text: it has {half[0]!r}, half of a character, at place "
            f"{half.start()}; was it decoded with another encoding than its own?"
        )
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
