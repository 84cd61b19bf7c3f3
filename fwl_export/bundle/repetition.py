"""Texts that repeat one token, or two in turn, longer than real texts do: tokens chosen to hurt.

Sums of gradients grow most while the same thing is read over and over: blank lines, a rule of
dashes, a column of zeros, a damaged file. What holds over such a text for `LENGTH` tokens holds in
a stream of hours, because by then the model has learned all there is, or forgets as much as it
learns.
"""

from __future__ import annotations

import contextlib
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from fwl_export.bundle.tokenizer import encode
from fwl_export.errors import TokenError

LENGTH = 1024
"""Tokens of each text, unless the model reads fewer."""

COUNT = 8
"""Number of texts that are tried."""

# What texts repeat: blank lines, rules, columns of figures, indentation.
_TEXTS = {"newline": "\n", "dash": "-", "digit": "0", "space": " "}
_CONTROL = "control token"
_LONG = 256  # characters of a text from which its token is taken; tokenizers merge them


class Repetition(NamedTuple):
    """A text that repeats some tokens.

    Attributes:
      name: What is repeated, in words.
      ids: Token ids that follow each other over and over.
    """

    name: str
    ids: tuple[int, ...]

    def read(self, start: int, count: int) -> npt.NDArray[np.int64]:
        """Return some of its tokens, [count] int64, of which the first has the number `start`."""
        return np.array(self.ids, np.int64)[np.arange(start, start + count) % len(self.ids)]


def repeated_tokens(tokenizer: Tokenizer) -> dict[str, int]:
    """Return the token ids that texts of blanks, dashes and zeros consist of, and a control token.

    Args:
      tokenizer: Tokenizer of the model.

    Returns:
      Token ids by what they are, those that matter most first.
    """
    found: dict[str, int] = {}
    for name, character in _TEXTS.items():
        # A tokenizer need not know every character, nor read every text.
        with contextlib.suppress(TokenError), warnings.catch_warnings(action="ignore"):
            ids = encode(character * _LONG, tokenizer, start=False).tolist()
            if ids:
                found[name] = Counter(ids).most_common(1)[0][0]
    control = [number for number, t in tokenizer.get_added_tokens_decoder().items() if t.special]
    if control:
        found[_CONTROL] = min(control)
    return found


def repetitions(
    by_text: Mapping[str, int], ids: npt.NDArray[np.int64], vocabulary: int = 0
) -> list[Repetition]:
    """Return `COUNT` texts that repeat different tokens, those that matter most first.

    Args:
      by_text: Token ids by what they are, see `repeated_tokens`; empty without a tokenizer.
      ids: Token ids of a text, [N] int64, in which tokens are frequent or rare; N may be 0.
      vocabulary: Number of token ids; 0 means those of the text only.
    """
    vocabulary = vocabulary or int(ids.max(initial=0)) + 1
    found: dict[tuple[int, ...], str] = {}
    for name, pattern in _candidates(by_text, ids, vocabulary):
        if all(0 <= token < vocabulary for token in pattern):
            found.setdefault(pattern, name)
    chosen = [Repetition(name, pattern) for pattern, name in found.items()][:COUNT]
    return [chosen[number % len(chosen)] for number in range(COUNT)]


def _candidates(
    by_text: Mapping[str, int], ids: npt.NDArray[np.int64], vocabulary: int
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield names and token ids, those that matter most first; some more than once."""
    counts = np.bincount(ids, minlength=vocabulary)
    frequent = [int(token) for token in np.argsort(-counts, kind="stable") if counts[token]]
    absent = [int(token) for token in np.flatnonzero(counts == 0)]
    special, common = list(by_text.items()), frequent or absent
    yield from ((name, (token,)) for name, token in special[:2])
    yield "most frequent token", (common[0],)
    others = [*by_text.values(), *common]
    yield "two tokens in turn", (common[0], next((t for t in others if t != common[0]), common[0]))
    yield from (("rarest token", (token,)) for token in [*frequent, *absent][-1:])
    yield from ((name, (token,)) for name, token in special[2:])
    yield from (("rare token of the text", (token,)) for token in frequent[-1:])
    yield from (("frequent token", (token,)) for token in frequent[1:])
    spread = np.linspace(0, max(len(absent) - 1, 0), COUNT).astype(int)
    yield from (("token that the text lacks", (absent[place],)) for place in spread if absent)
