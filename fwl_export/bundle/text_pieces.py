"""The token ids of a long text, window by window: the same ids as of the whole text at once.

A cut through a text changes the tokens around it, and no rule says how far: patterns look ahead,
merges reach back, and a text need not have a single space. So windows overlap. Where two of them,
which begin and end at different places, agree about all tokens of half of their overlap, the first
is followed up to there and the second from there on. Where they do not, the first window grows and
both are tried again, in the worst case until it holds the whole text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from tokenizers import Encoding

# Characters of a window. No multiple of a small number, so that patterns which count from the end
# of the text, such as groups of three digits, differ between one window and the next.
_WINDOW = 262147
_SMALLEST = 4099
_OVERLAP = 8192
# No published tokenizer has fewer tokens per character in texts; more only cost another window.
_CHARACTERS_PER_TOKEN = 8

# Of the overlap, this many tokens must agree at least.
_FEWEST = 8

_Token = tuple[int, int, int]


def token_pieces(
    tokenize: Callable[[str], Encoding], read: Callable[[int], str], most: int = 0
) -> Iterator[list[int]]:
    """Yield the token ids of a text, piece by piece.

    Args:
      tokenize: Function that returns the tokens of a text.
      read: Function that returns the next characters of the text, as many as it is asked for, and
        fewer at its end.
      most: Number of tokens that the caller needs, which makes windows smaller; 0 means all.
    """
    size = _WINDOW
    if most:
        size = min(_WINDOW, max(_SMALLEST, most * _CHARACTERS_PER_TOKEN | 1))
    text = read(size + 1)
    here, joint, first = tokenize(text[:size]), _Joint(0, 0, []), 0
    while len(text) > size:
        after = _joint(here, size, first)
        if after:
            text += read(max(0, after.begin + size + 1 - len(text)))
            there = tokenize(text[after.begin : after.begin + size])
            if place := _place(there, after.tokens):
                yield here.ids[first : after.cut]
                text, here, joint, first = text[after.begin :], there, after, place
                continue
        size = 2 * size + 1
        text += read(max(0, size + 1 - len(text)))
        here = tokenize(text[:size])
        first = _place(here, joint.tokens) or first
    yield here.ids[first:]


@dataclass(frozen=True)
class _Joint:
    """Where one window hands over to the next.

    Attributes:
      begin: Where the next window begins, in characters of this one; here a token begins.
      cut: Number of tokens of this window before the place where the next one takes over.
      tokens: Tokens before that place: id, start and end in characters of the next window.
    """

    begin: int
    cut: int
    tokens: list[_Token]


def _joint(found: Encoding, size: int, first: int) -> _Joint | None:
    """Return where a window could hand over to the next; None if it is too short for that.

    Args:
      found: Tokens of the window.
      size: Its size in characters.
      first: Number of its first tokens that belong to the window before.
    """
    overlap = min(_OVERLAP, size // 8)
    ids, offsets = found.ids, found.offsets
    cut = len(ids)
    while cut and offsets[cut - 1][1] > size - overlap:
        cut -= 1
    after = cut
    while after and offsets[after - 1][0] >= size - 2 * overlap:
        after -= 1
    if after <= first or after == len(ids):
        return None
    begin = offsets[after][0]
    tokens = [
        (token, start - begin, end - begin)
        for token, (start, end) in zip(ids[after:cut], offsets[after:cut], strict=True)
        if start >= begin + overlap // 2
    ]
    return _Joint(begin, cut, tokens) if len(tokens) >= _FEWEST else None


def _place(found: Encoding, tokens: list[_Token]) -> int | None:
    """Return the number of tokens up to the end of those given; None if they are not in a row.

    Args:
      found: Tokens of a window.
      tokens: Id, start and end of each token to be found.
    """
    if not tokens:
        return None
    there = [(token, *place) for token, place in zip(found.ids, found.offsets, strict=True)]
    for index, token in enumerate(there):
        if token[1] > tokens[0][1]:
            return None
        if token == tokens[0] and there[index : index + len(tokens)] == tokens:
            return index + len(tokens)
    return None
