"""The kinds of calls that a check makes: real text, and patterns that break streaming models.

All are seeded, so that the text's token ids and the seed are enough to repeat them.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from fwl_export.bundle.state import Array
from fwl_export.errors import ConfigError
from fwl_export.parity.schedule import ROWS, Schedule, ScheduledCall, comparison_points, make_call

TEXT, MIXED = "text", "mixed"


@dataclass(frozen=True)
class Case:
    """One kind of calls.

    Attributes:
      name: Name of the case, as `--cases` takes it.
      about: What the calls are like, in words.
      rows: Number of rows in the batch.
      tokens: Number of tokens that the first row reads. In `CASES`, 0 means two calls of the
        largest size.
    """

    name: str
    about: str
    rows: int
    tokens: int

    def calls(
        self, ids: Array, max_tokens: int, seed: int, limit: int = 0
    ) -> Iterable[ScheduledCall]:
        """Return the calls, the same ones each time they are iterated.

        Args:
          ids: Token ids of the text, [N] int64.
          max_tokens: Largest T of a call.
          seed: Seed of all random choices.
          limit: Largest number of tokens that a row may read; 0 means no limit.

        Raises:
          TokenError: The text is too short.
        """
        if self.name == TEXT:
            return Schedule(ids, self.tokens, max_tokens, seed, limit)
        return _SeededCalls(self, ids, max_tokens, seed)


@dataclass(frozen=True)
class _SeededCalls:
    case: Case
    ids: Array
    max_tokens: int
    seed: int

    def __iter__(self) -> Iterator[ScheduledCall]:
        rng = np.random.default_rng([self.seed, zlib.crc32(self.case.name.encode())])
        return _MAKERS[self.case.name](rng, self.ids, self.case.tokens, self.max_tokens)


CASES = (
    Case(TEXT, "real text in uneven calls: ragged rows, label weights of 0, a reset", ROWS, 2000),
    Case(
        MIXED,
        "rows that are reset often next to one that never is; step sizes that change by row",
        4,
        96,
    ),
    Case("repeat", "repeated tokens, which make the fast weights large", 3, 128),
    Case("long", "calls of the largest size that the model takes", 1, 0),
    Case("decode", "one row, one token per call", 1, 48),
)


def choose_cases(
    cases: str | Sequence[str | Case], tokens: int, max_tokens: int, limit: int = 0
) -> list[Case]:
    """Return cases by name, each with its number of tokens.

    Args:
      cases: Names, such as "text,decode@5000" or a list of such names. Cases that an earlier call
        returned are kept as they are.
      tokens: Tokens to read of the text. A case that is named without a number is never longer.
      max_tokens: Largest T of a call.
      limit: Tokens that a row of the model can read, which caps every case. 0 means no limit.

    Raises:
      ConfigError: A name is not a case, or a case is named twice.
    """
    chosen: dict[str, Case] = {}
    for named in cases.split(",") if isinstance(cases, str) else cases:
        case = named
        if isinstance(case, str):
            case = _named_case(case, tokens, max_tokens, limit)
        if case.name in chosen:
            raise ConfigError(f"case '{case.name}' is named twice; name every case once")
        chosen[case.name] = case
    return list(chosen.values())


def _named_case(name: str, tokens: int, max_tokens: int, limit: int) -> Case:
    known = {case.name: case for case in CASES}
    found = re.fullmatch(r"(\w+)(?:@([1-9]\d*))?", name.strip())
    if found is None or found[1] not in known:
        raise ConfigError(
            f"'{name}' is not a case; expected {', '.join(known)}, each optionally with a number "
            "of tokens, for example decode@5000"
        )
    case = known[found[1]]
    usual = tokens if case.name == TEXT else min(case.tokens or 2 * max_tokens, tokens)
    wanted = int(found[2]) if found[2] else usual
    return replace(case, tokens=min(wanted, limit) if limit else wanted)


# Factors on step sizes in the mixed case: 0 means that a row learns nothing.
_SCALES = np.array([0, 0.5, 1, 1.5], np.float32)


class _CasePlan(NamedTuple):
    """What the rows do in the next call of a case.

    Attributes:
      lengths: Number of tokens that each row reads, [B].
      reset: Rows to reset before the call.
      scale: Factor on the model's step sizes in each row, [B]; None means 1.
    """

    lengths: Array
    reset: tuple[int, ...] = ()
    scale: Array | None = None


def _mixed(
    rng: np.random.Generator, ids: Array, tokens: int, max_tokens: int
) -> Iterator[ScheduledCall]:
    sizes = [size for size in (1, 2, 3, 5, 8, 17) if size <= max_tokens]

    def plan(rows: int) -> _CasePlan:
        lengths = rng.integers(0, int(rng.choice(sizes)) + 1, rows)
        lengths[0] = max(lengths[0], 1)
        again = rng.random(rows) < 0.25
        reset = tuple(int(row) for row in range(1, rows) if again[row])
        return _CasePlan(lengths, reset, rng.choice(_SCALES, rows))

    starts = rng.integers(0, len(ids), 4)
    return _stream([np.roll(ids, -start) for start in starts], tokens, plan)


def _repeat(
    rng: np.random.Generator, ids: Array, tokens: int, max_tokens: int
) -> Iterator[ScheduledCall]:
    start = int(rng.integers(0, len(ids)))
    texts = [np.roll(ids, -start)[:period] for period in (1, 2, 7)]

    def plan(rows: int) -> _CasePlan:
        return _CasePlan(np.full(rows, min(int(rng.choice((1, 3, 16, 61))), max_tokens)))

    return _stream(texts, tokens, plan)


def _long(
    rng: np.random.Generator, ids: Array, tokens: int, max_tokens: int
) -> Iterator[ScheduledCall]:
    start = int(rng.integers(0, len(ids)))
    return _stream(
        [np.roll(ids, -start)], tokens, lambda rows: _CasePlan(np.full(rows, max_tokens))
    )


def _decode(
    rng: np.random.Generator, ids: Array, tokens: int, max_tokens: int
) -> Iterator[ScheduledCall]:
    start = int(rng.integers(0, len(ids)))
    return _stream([np.roll(ids, -start)], tokens, lambda rows: _CasePlan(np.ones(rows, np.int64)))


_MAKERS: dict[str, Callable[[np.random.Generator, Array, int, int], Iterator[ScheduledCall]]] = {
    MIXED: _mixed,
    "repeat": _repeat,
    "long": _long,
    "decode": _decode,
}


def _stream(
    texts: Sequence[Array], tokens: int, plan: Callable[[int], _CasePlan]
) -> Iterator[ScheduledCall]:
    """Yield calls until the first row has read `tokens`; no row reads more."""
    positions = np.zeros(len(texts), np.int64)
    marks = comparison_points(tokens)
    step = 0
    while positions[0] < tokens:
        lengths, reset, scale = plan(len(texts))
        lengths = np.minimum(lengths, tokens - positions).astype(np.int64)
        weights = np.ones((len(texts), int(lengths.max())), np.float32)
        yield make_call(step, texts, positions, lengths, weights, reset, marks, scale)
        positions += lengths
        step += 1
