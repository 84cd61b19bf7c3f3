"""What a tokenizer does beside splitting text: control tokens around it and in it, unknown text."""

from __future__ import annotations

import contextlib
import json
import warnings
import weakref
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Encoding, Tokenizer
from tokenizers.pre_tokenizers import ByteLevel

from fwl_export.errors import CheckpointError
from fwl_export.json_files import brief, shown

# Control tokens that stand in the vocabulary itself get this in front of them in the tokenizer for
# plain text: a noncharacter, which no text contains.
_UNREACHABLE = "\ufdd0"
_BYTES = 256


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
    left: tuple[int, ...]
    right: tuple[int, ...]
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
            token = piece["SpecialToken"]["id"]
            if token not in step["special_tokens"]:
                raise CheckpointError(
                    f"{path} puts {shown(token)} around a text, but does not say which token it is"
                )
            sides[-1] += step["special_tokens"][token]["ids"]
    if len(sides) != 2:
        raise CheckpointError(
            f"{path} has a post-processor whose template contains the text {len(sides) - 1} times; "
            "expected once"
        )
    return tuple(sides[0]), tuple(sides[1])


class TextWarning(UserWarning):
    """A text is not read as it is, because the tokenizer has no token for a part of it."""


class Facts:
    """What is known about a tokenizer; `facts` returns it.

    Attributes:
      controls: Text of tokens which are control tokens though tokenizer.json does not call them
        special, such as those that the chat template writes.
      vocab_size: Number of token ids of the model; None if it is not known.
      files: Content of the files that stood beside tokenizer.json, by name; a checkpoint that is
        written with this tokenizer gets them too.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Begin with nothing known.

        Args:
          tokenizer: The tokenizer.
        """
        self.controls: frozenset[str] = frozenset()
        self.vocab_size: int | None = None
        self.files: dict[str, bytes] = {}
        # `facts` keeps this object as long as the tokenizer exists, so it must not keep it alive.
        self._tokenizer = weakref.proxy(tokenizer)
        self._itself = weakref.ref(tokenizer)
        self._copy: Tokenizer | None = None
        self._seen: set[str] = set()
        self._warned = False

    @property
    def plain(self) -> Tokenizer:
        """The tokenizer for plain text, which reads control tokens as the characters they are."""
        added = self._tokenizer.get_added_tokens_decoder().values()
        controls = {token.content for token in added if token.special} | self.controls
        if not controls:
            itself = self._itself()
            assert itself is not None
            return itself
        if self._copy is None:
            with _panics_as_errors():
                self._copy = _without_controls(self._tokenizer.to_str(), controls)
            self._copy.encode_special_tokens = True
        return self._copy

    def warn_of_unknown(self, text: str, found: Encoding) -> None:
        """Warn, once, if characters of a text were replaced by the unknown token or left out.

        Args:
          text: The text.
          found: Its tokens.

        Warns:
          TextWarning: They were.
        """
        if self._warned:
            return
        if self.unknown_id is not None:
            places = (
                place
                for token, place in zip(found.ids, found.offsets, strict=True)
                if token == self.unknown_id
            )
            texts = (text[first:last] for first, last in places)
            if lost := next((each for each in texts if each != self.unknown_text), None):
                self._warn(
                    f"has no token for {shown(lost)} and reads it as {shown(self.unknown_text)}"
                )
                return
        if self._drops and (new := set(text) - self._seen):
            self._seen |= new
            if lost := "".join(sorted(filter(self._is_dropped, new))):
                self._warn(f"has no token for {shown(lost)} and leaves it out")

    def _warn(self, what: str) -> None:
        self._warned = True
        warnings.warn(
            f"the tokenizer {what}, as it will do with other characters that it does not know: "
            "the model does not see what the text says there",
            TextWarning,
            stacklevel=2,
        )

    @cached_property
    def unknown_text(self) -> str | None:
        """Text of the token for what the tokenizer has no token for; None if there is none."""
        model = self._tokenizer.model
        if hasattr(model, "unk_token"):
            token: str | None = model.unk_token
            return token
        number = json.loads(self._tokenizer.to_str())["model"].get("unk_id")
        return None if number is None else self._tokenizer.id_to_token(number)

    @cached_property
    def unknown_id(self) -> int | None:
        """Id of that token."""
        text = self.unknown_text
        return None if text is None else self._tokenizer.token_to_id(text)

    @cached_property
    def _drops(self) -> bool:
        """Whether the tokenizer leaves out characters that it does not know, as some BPE models."""
        model = self._tokenizer.model
        if type(model).__name__ != "BPE" or self.unknown_id is not None:
            return False
        steps = str(self._tokenizer.pre_tokenizer) + str(self._tokenizer.normalizer)
        if "ByteLevel" in steps:
            return any(self._tokenizer.token_to_id(each) is None for each in ByteLevel.alphabet())
        if model.byte_fallback:
            names = (f"<0x{byte:02X}>" for byte in range(_BYTES))
            return any(self._tokenizer.token_to_id(name) is None for name in names)
        return True

    def _is_dropped(self, character: str) -> bool:
        """Return whether the model has no token for a character, once it is normalized."""
        tokenizer = self._tokenizer
        if tokenizer.normalizer is not None:
            character = tokenizer.normalizer.normalize_str(character)
        pieces = [character]
        if tokenizer.pre_tokenizer is not None:
            pieces = [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str(character)]
        return any(not tokenizer.model.tokenize(part) for part in set("".join(pieces)))


@contextlib.contextmanager
def _panics_as_errors() -> Iterator[None]:
    """Name the tokenizer in whatever the library raises when it cannot be made for plain text."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:
        raise CheckpointError(
            f"tokenizer.json cannot be changed so that control tokens in a text are read as text "
            f"({brief(error)}); read the text with --special, or `special=True`"
        ) from None


def _without_controls(text: str, controls: set[str]) -> Tokenizer:
    """Return a tokenizer in which no text leads to a control token.

    Args:
      text: The tokenizer, as JSON.
      controls: Text of the control tokens.
    """
    data = json.loads(text)
    model = data["model"]
    hidden = {each for each in controls if len(each) > 1} - {model.get("unk_token")}
    vocabulary = model["vocab"]
    if isinstance(vocabulary, dict):
        hidden &= vocabulary.keys()
        model["vocab"] = {
            _UNREACHABLE + key if key in hidden else key: token for key, token in vocabulary.items()
        }
    else:
        unknown = model.get("unk_id")
        hidden &= {key for number, (key, _) in enumerate(vocabulary) if number != unknown}
        model["vocab"] = [
            [_UNREACHABLE + key if key in hidden else key, score] for key, score in vocabulary
        ]
    if model.get("merges"):
        pairs = (pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"])
        model["merges"] = [pair for pair in pairs if hidden.isdisjoint(("".join(pair), *pair))]
    # Those that stand in the vocabulary have their ids from there; the others keep theirs here.
    data["added_tokens"] = [
        token | {"special": token["special"] or token["content"] in controls}
        for token in data["added_tokens"]
        if token["content"] not in hidden
    ]
    return Tokenizer.from_str(json.dumps(data))


_facts: weakref.WeakKeyDictionary[Tokenizer, Facts] = weakref.WeakKeyDictionary()


def facts(tokenizer: Tokenizer) -> Facts:
    """Return what is known about a tokenizer; the same object each time.

    Args:
      tokenizer: The tokenizer, which must not be changed afterwards.
    """
    if tokenizer not in _facts:
        _facts[tokenizer] = Facts(tokenizer)
    return _facts[tokenizer]
