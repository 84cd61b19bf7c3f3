"""A covering design: few calls in which every pair of settings of two factors meets.

    FACTORS (what a call may be like)  ->  covering_design (rows of settings)  ->  cases (calls)

A fault often needs two settings at once: a scale other than 1 and a single token, or five rows and
an empty first one. All combinations would be some hundred thousand calls. A pairwise covering
design has every *pair* of settings in fewer than a hundred; the package allpairspy finds one.
Pairs that exclude each other, such as one row and rows of different lengths, are left out.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from allpairspy import AllPairs

ROWS = (1, 2, 5, 8)
"""Numbers of rows, B. Engines take up to 8 unless they are built for more."""

Pair = tuple[tuple[str, Any], ...]

_TRIES = 8  # settings of which the one with most missing pairs is taken

# Larger calls meet fewer settings, because each costs as much as ten others.
_LARGE = 128
_OF_LARGE_CALLS = {
    *("equal", "ragged", "padded"),
    *("one", "some zero", "large"),
    *("three", "by row"),
    *("last", "few", "more"),
    *("nothing", "reset deepest"),
    *("text", "any", "high"),
}

# Tokens of one call over all rows: with 8 rows a call of 65 tokens each, with one row any call.
_CALL_TOKENS = 528

LENGTHS = {
    "equal": "all rows have T tokens",
    "ragged": "rows have any number of tokens, one of them T",
    "first empty": "the first row has no token",
    "last longest": "only the last row has T tokens",
    "padded": "no row has T tokens",
}
WEIGHTS = {
    "one": "1 for every token",
    "zero": "0 for every token",
    "some zero": "0 or 1",
    "fractions": "any number from 0 to 1",
    "small": "1e-3",
    "large": "0.5, 1, 2, 5 or 8",
}
SCALES = {
    "one": "1 in every row",
    "zero": "0 in every row",
    "half": "0.5 in every row",
    "three": "3 in every row",
    "by row": "another one of 0, 0.5, 1, 1.5, 2 in each row",
}
LOGITS = {
    "all": "after every token",
    "last": "after the last token of each row (`last_only`)",
    "few": "after fewer than T tokens, another choice in each row",
    "unordered": "after T positions in any order, some more than once",
    "more": "after more than T positions",
}
BEFORE = {
    "nothing": "rows read on",
    "reset any": "some rows are reset",
    "reset deepest": "the row that has read most is reset",
    "fork": "the row that has read most is copied to another",
}
IDS = {
    "text": "a text",
    "any": "any token ids",
    "repeated": "one token id in each row",
    "high": "token ids of the upper half, the last one among them",
}


class Setting(NamedTuple):
    """What one call is like: a setting of every factor.

    Attributes:
      rows: Number of rows, B.
      power: The size T is this power of two, or next to it.
      lengths: Key of `LENGTHS`.
      weights: Key of `WEIGHTS`.
      scale: Key of `SCALES`.
      logits: Key of `LOGITS`.
      before: Key of `BEFORE`.
      ids: Key of `IDS`.
    """

    rows: int
    power: int
    lengths: str
    weights: str
    scale: str
    logits: str
    before: str
    ids: str


def sizes(max_tokens: int) -> dict[int, list[int]]:
    """Return the sizes T that are tried, by the power of two that they are next to.

    Args:
      max_tokens: Largest T of a call; it and its predecessor are among them.
    """
    powers = [2**k for k in range(max_tokens.bit_length() + 1)]
    near = {power + step for power in powers for step in (-1, 0, 1)} | {max_tokens - 1, max_tokens}
    found: dict[int, list[int]] = {}
    for size in sorted(size for size in near if 1 <= size <= max_tokens):
        power = min(powers, key=lambda p: (abs(p - size) / p, p))
        found.setdefault(power, []).append(size)
    return found


@lru_cache(maxsize=8)
def covering_design(max_tokens: int, seed: int) -> tuple[tuple[Setting, int], ...]:
    """Return settings in which every possible pair meets, each with its size T.

    Args:
      max_tokens: Largest T of a call.
      seed: Seed of the order of settings, which decides which triples meet.
    """
    rng = np.random.default_rng([seed, max_tokens])
    near = sizes(max_tokens)
    levels: list[list[Any]] = [list(names) for names in _levels(near)]
    for names in levels[2:]:
        rng.shuffle(names)

    rows = list(_all_pairs(levels, near))
    rows += _remaining(rows, levels, near)
    rows = [rows[index] for index in rng.permutation(len(rows))]
    # The first of a group that is tried is its power of two, at which kernels change their tiles.
    turns = {
        power: itertools.cycle(sorted(rng.permutation(each).tolist(), key=lambda n: n != power))
        for power, each in near.items()
    }
    return tuple((row, _size(row, next(turns[row.power]))) for row in rows)


def pairs(settings: Sequence[Setting]) -> set[Pair]:
    """Return the pairs of settings that meet, each as two (factor, setting)."""
    return {pair for row in settings for pair in itertools.combinations(row._asdict().items(), 2)}


def possible_pairs(max_tokens: int) -> int:
    """Return how many pairs of settings there are that do not exclude each other."""
    return len(_possible_pairs(sizes(max_tokens)))


def _possible_pairs(near: Mapping[int, Sequence[int]]) -> set[Pair]:
    named = zip(Setting._fields, _levels(near), strict=True)
    items = [[(name, level) for level in each] for name, each in named]
    return {
        pair
        for one, two in itertools.combinations(items, 2)
        for pair in itertools.product(one, two)
        # Two settings may need numbers of rows that exclude each other.
        if any(_is_possible({"rows": rows, **dict(pair)}, near) for rows in ROWS)
    }


def _remaining(
    rows: Sequence[Setting], levels: Sequence[list[Any]], near: Mapping[int, Sequence[int]]
) -> Iterator[Setting]:
    """Yield settings with the pairs that are missing: with exclusions, allpairspy stops early."""
    missing = _possible_pairs(near) - pairs(rows)
    while missing:
        wanted = dict(min(missing, key=str))
        named = zip(Setting._fields, levels, strict=True)
        narrowed = [[wanted[name]] if name in wanted else each for name, each in named]
        found = itertools.islice(_all_pairs(narrowed, near), _TRIES)
        best = max(found, key=lambda row: len(missing & pairs([row])))
        missing -= pairs([best])
        yield best


def _all_pairs(levels: Sequence[list[Any]], near: Mapping[int, Sequence[int]]) -> Iterator[Setting]:
    def possible(partial: Sequence[Any]) -> bool:
        return _is_possible(dict(zip(Setting._fields, partial, strict=False)), near)

    return (Setting(*row) for row in AllPairs(levels, filter_func=possible))


def _levels(near: Mapping[int, Sequence[int]]) -> Iterator[Sequence[int] | Sequence[str]]:
    yield ROWS
    yield list(near)
    for names in (LENGTHS, WEIGHTS, SCALES, LOGITS, BEFORE, IDS):
        yield list(names)


def _is_possible(row: Mapping[str, object], near: Mapping[int, Sequence[int]]) -> bool:
    """Return whether the settings of a row, which may be incomplete, do not exclude each other."""
    rows, power = row.get("rows"), row.get("power")
    tried = (
        near[power] if isinstance(power, int) else [size for each in near.values() for size in each]
    )
    one_row, one_token = rows == 1, max(tried) == 1
    several_rows = {"first empty", "last longest", "ragged", "by row", "fork"}
    several_tokens = {"padded", "few", "unordered", "more"}
    chosen = {value for value in row.values() if isinstance(value, str)}
    if (one_row and chosen & several_rows) or (one_token and chosen & several_tokens):
        return False
    if isinstance(power, int) and power > _LARGE and chosen - _OF_LARGE_CALLS:
        return False
    if isinstance(rows, int) and isinstance(power, int):
        return rows == 1 or rows * power <= _CALL_TOKENS
    return True


def _size(row: Setting, size: int) -> int:
    needs_two = row.lengths == "padded" or row.logits in ("few", "unordered", "more")
    return max(size, 2) if needs_two and row.power > 1 else size
