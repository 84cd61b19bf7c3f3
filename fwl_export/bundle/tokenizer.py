"""The tokenizer file of a checkpoint or bundle: from text to token ids.

What the file carries beside its vocabulary must not change what a model reads: stored truncation,
padding and dropout are switched off when it is loaded, tokens that its post-processor puts behind a
text are left out, and those in front of it are put there only where a session begins.
"""

from __future__ import annotations

import contextlib
import json
import os
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import msgspec
import numpy as np
import numpy.typing as npt
from tokenizers import Encoding, Tokenizer

from fwl_export.errors import CheckpointError, FwlError, TokenError
from fwl_export.filesystem import open_regular
from fwl_export.json_files import brief, read_bounded, shown

# Published tokenizers of 260 000 entries have 35 MB.
_LARGEST_FILE = 256 << 20

# Of the entries of a tokenizer, this share may lie beyond the model's ids: published tokenizers
# have a few that were added after training. One with more of them is another model's.
_LARGEST_SURPLUS = 0.1

_BYTE_ORDER_MARKS = {
    b"\xff\xfe\x00\x00": "UTF-32",
    b"\x00\x00\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}


class TextEncoder(Protocol):
    """What `read_ids` needs of a tokenizer; see `fwl_export.bundle.text_tokenizer`."""

    def encode(self, text: str, *, start: bool, special: bool = False) -> npt.NDArray[np.int64]:
        """Return the token ids of a text, [N] int64."""


def load_tokenizer(
    path: Path,
    vocab_size: int | None = None,
    padded: bool = True,
    content: bytes | None = None,
) -> Tokenizer:
    """Read a tokenizer.json, without the truncation, padding and dropout that it may ask for.

    Args:
      path: File to read.
      vocab_size: Number of token ids of the model; None allows any tokenizer.
      padded: Whether the tokenizer may have fewer entries than the model, as in published models.
      content: Content of the file, if it was read already.

    Raises:
      CheckpointError: The file cannot be read, or its entries do not fit the model.
    """
    tokenizer = _parsed(path, content)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if getattr(tokenizer.model, "dropout", None):
        tokenizer.model.dropout = None
    if vocab_size is not None:
        _check_vocabulary(path, tokenizer, vocab_size, padded)
    start_ids(tokenizer, path)
    return tokenizer


def _check_vocabulary(path: Path, tokenizer: Tokenizer, vocab_size: int, padded: bool) -> None:
    """Check that a tokenizer can be the model's: nearly all of its ids are ids of the model."""
    ids = tokenizer.get_vocab().values()
    beyond = sum(token >= vocab_size for token in ids)
    if beyond > max(1, _LARGEST_SURPLUS * len(ids)):
        raise CheckpointError(
            f"{path} has {len(ids)} entries, of which {beyond} have ids of {vocab_size} and more, "
            f"but the model's ids end at {vocab_size - 1}; is it the tokenizer of another model?"
        )
    if not padded and len(ids) < vocab_size:
        raise CheckpointError(
            f"{path} has {len(ids)} entries, but the model's vocab_size is {vocab_size}; "
            "is it the tokenizer of another model?"
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


def start_ids(tokenizer: Tokenizer, path: Path | str = "tokenizer.json") -> tuple[int, ...]:
    """Return the ids that the post-processor puts in front of a text, mostly none or one.

    Args:
      tokenizer: The tokenizer.
      path: Its file, for error messages.

    Raises:
      CheckpointError: The post-processor does something else than putting tokens around a text.
    """
    return template_ids(tokenizer, path)[0]


def template_ids(
    tokenizer: Tokenizer, path: Path | str = "tokenizer.json"
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the ids that the post-processor puts in front of a text, and those behind it.

    For arguments and errors, see `start_ids`.
    """
    if tokenizer.post_processor is None:
        return (), ()
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    for step in _steps(json.loads(tokenizer.post_processor.__getstate__())):
        kind = step.get("type")
        if kind in ("BertProcessing", "RobertaProcessing"):
            left, right = (step["cls"][1],), (step["sep"][1],)
        elif kind == "TemplateProcessing":
            left, right = _template(step, path)
        elif kind == "ByteLevel":
            continue  # changes offsets only
        else:
            raise CheckpointError(
                f"{path} has a post-processor of the type {shown(kind)}, which fwl-export does not "
                "know; replace it by a TemplateProcessing"
            )
        before, after = left + before, after + right
    return before, after


def _steps(processor: dict[str, Any]) -> list[dict[str, Any]]:
    if processor.get("type") != "Sequence":
        return [processor]
    return [step for part in processor["processors"] for step in _steps(part)]


def _template(step: dict[str, Any], path: Path | str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the ids in front of the text and behind it in a TemplateProcessing."""
    sides: list[list[int]] = [[]]
    for piece in step["single"]:
        if "Sequence" in piece:
            sides.append([])
        else:
            sides[-1] += step["special_tokens"][piece["SpecialToken"]["id"]]["ids"]
    if len(sides) != 2:
        raise CheckpointError(
            f"{path} has a post-processor whose template contains the text {len(sides) - 1} times; "
            "expected once"
        )
    return tuple(sides[0]), tuple(sides[1])


def read_text(path: Path) -> str:
    """Return the content of a text file: line ends as they are, a byte-order mark left out.

    Args:
      path: Text file in UTF-8; not a pipe or a device, which may have no end.

    Raises:
      TokenError: The file is not UTF-8 text.
    """
    try:
        with open_regular(path, TokenError) as stream:
            content = stream.readall()
    except OSError as error:
        raise TokenError(f"cannot read '{path}' as text: {error}") from None
    for mark, encoding in _BYTE_ORDER_MARKS.items():
        if content.startswith(mark):
            raise TokenError(
                f"cannot read '{path}' as text: it is {encoding}, as its byte-order mark says; "
                f"expected UTF-8: convert it, e.g. with `iconv -f {encoding} -t UTF-8`"
            )
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise TokenError(f"cannot read '{path}' as text: {error}") from None


def read_ids(
    path: Path, tokenizer: Tokenizer | TextEncoder, start: bool = True, special: bool = False
) -> npt.NDArray[np.int64]:
    """Return the token ids of a text file, [N] int64.

    Args:
      path: Text file in UTF-8; not a pipe or a device, which may have no end.
      tokenizer: Tokenizer of the model.
      start: Whether the text begins a fresh session, see `encode`.
      special: Whether control tokens in the text are read as such, see `encode`.

    Raises:
      TokenError: The file is not UTF-8 text or has fewer than 2 tokens, or the tokenizer fails.
    """
    text = read_text(path)
    if isinstance(tokenizer, Tokenizer):
        ids = encode(text, tokenizer, start, special)
    else:
        ids = tokenizer.encode(text, start=start, special=special)
    if len(ids) < 2:
        raise TokenError(f"'{path}' has {len(ids)} tokens; expected 2 or more")
    return ids


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
      TokenError: The tokenizer fails, as one whose patterns backtrack too long does.
    """
    ids = run(tokenizer if special else plain(tokenizer), text).ids
    before = list(start_ids(tokenizer)) if start else []
    if ids[: len(before)] != before:
        ids = before + ids
    return np.array(ids, dtype=np.int64)


def run(tokenizer: Tokenizer, text: str) -> Encoding:
    """Return the tokens of a text without any that the text does not contain.

    Raises:
      TokenError: The tokenizer fails.
    """
    try:
        with _without_panic_messages():
            return tokenizer.encode(text, add_special_tokens=False)
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


_plain: weakref.WeakKeyDictionary[Tokenizer, Tokenizer] = weakref.WeakKeyDictionary()


def plain(tokenizer: Tokenizer) -> Tokenizer:
    """Return a tokenizer that reads control tokens in a text as plain text.

    Args:
      tokenizer: Tokenizer that reads them as control tokens; it is not changed.
    """
    if not any(token.special for token in tokenizer.get_added_tokens_decoder().values()):
        return tokenizer
    if tokenizer not in _plain:
        copy = Tokenizer.from_str(tokenizer.to_str())
        copy.encode_special_tokens = True
        _plain[tokenizer] = copy
    return _plain[tokenizer]


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
