"""The calls of a parity check over text: in uneven chunks, the same for every runtime.

Other kinds of calls are in `cases`. A schedule is replayable from its seed. Its calls together
hold what goes wrong in streaming models: T of 1 and the largest T; odd sizes that leave the ring
buffers at every offset; rows at different positions, a row that starts late, rows that bring fewer
tokens than others or none;
tokens that are read without learning, one by one and whole calls of them; a reset in mid-stream.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile

import numpy as np

from fwl_export.bundle.state import Array
from fwl_export.errors import TokenError

# Row 0 reads all the time, row 1 starts late, row 2 is reset in mid-stream.
ROWS = 3
_STARTS = (0.0, 0.25, 0.0)  # of the first row's way
_RESET_AT = 0.55
_RESET_ROW = 2

_FIRST_POINT = 16  # tokens; with fewer, errors are too few to say how large they usually are
_POINTS_PER_DOUBLING = 2

_RAGGED = 0.5  # share of calls in which rows bring different numbers of tokens
_WEIGHTED = 0.4  # share of calls in which some tokens have weight 0 or 0.5
_SILENT = 0.06  # share of calls in which all tokens have weight 0
_DECODE_RUN = 16  # calls of one token come in runs, as they do when text is generated


@dataclass(frozen=True)
class ScheduledCall:
    """One call of the model on all rows.

    Attributes:
      step: number of the call, from 0.
      ids: [B, T] int64, padding 0.
      weights: [B, T] float32, how much to learn from each token.
      lengths: [B] int64, real tokens of each row.
      scale: [B] float32, times the model's step sizes.
      labels: [B, T] int64, the token after each; padding 0.
      positions: [B] int64, tokens that each row has read before (not set back by a reset).
      reset: rows that start afresh before this call.
      tokens_read: tokens the first row has read after this call.
      compare_state: whether the state is compared after this call.
    """

    step: int
    ids: Array
    weights: Array
    lengths: Array
    scale: Array
    labels: Array
    positions: Array
    reset: tuple[int, ...]
    tokens_read: int
    compare_state: bool


@dataclass(frozen=True)
class Schedule:
    """Seeded calls over a text; iterate it for the calls, as often as needed.

    Attributes:
      ids: [N] int64, the text; rows start at different places and go round at its end.
      tokens: how many the first row reads.
      max_tokens: largest T.
      seed: of everything random.
      limit: tokens that a row may read; 0: without end.
    """

    ids: Array
    tokens: int
    max_tokens: int
    seed: int = 0
    limit: int = 0

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise TokenError(f"tokens is {self.tokens}; expected 1 or more")
        if len(self.ids) < self.tokens + 1:
            raise TokenError(
                f"the text has {len(self.ids)} tokens; reading {self.tokens} and predicting the "
                f"next takes {self.tokens + 1}: give a longer text, or read "
                f"{max(len(self.ids) - 1, 1)} (--tokens)"
            )

    def __iter__(self) -> Iterator[ScheduledCall]:
        rng = np.random.default_rng(self.seed)
        sizes = _sizes(rng, self.max_tokens)
        marks = comparison_points(self.tokens)
        starts = [row * (len(self.ids) // ROWS) for row in range(ROWS)]
        texts = [np.roll(self.ids, -start) for start in starts]
        positions = np.zeros(ROWS, np.int64)
        step, pending_reset = 0, True
        while positions[0] < self.tokens:
            size = min(next(sizes), int(self.tokens - positions[0]))
            due = bool(marks) and positions[0] + size >= marks[0]
            lengths = self._lengths(rng, size, positions, force_ragged=due)
            reset = pending_reset and positions[0] >= _RESET_AT * self.tokens
            pending_reset = pending_reset and not reset
            weights = _weights(rng, (ROWS, int(lengths.max())))
            rows = (_RESET_ROW,) if reset else ()
            yield make_call(step, texts, positions, lengths, weights, rows, marks)
            positions += lengths
            step += 1

    def _lengths(
        self, rng: np.random.Generator, size: int, positions: Array, force_ragged: bool
    ) -> Array:
        """Return how many tokens each row brings; at least one row brings `size`."""
        lengths: Array = np.full(ROWS, size, np.int64)
        if rng.random() < _RAGGED or force_ragged:
            fewer = rng.integers(0, size + 1, ROWS)
            lengths = np.where(rng.random(ROWS) < 0.25, 0, fewer)
            lengths[rng.integers(ROWS)] = size
        begun = positions[0] >= np.array(_STARTS) * self.tokens
        lengths = np.where(begun, lengths, 0)
        if force_ragged or not lengths.any():
            lengths[0] = size
        if self.limit:
            lengths = np.minimum(lengths, self.limit - positions)
            lengths[0] = lengths[0] if lengths.any() else size
        return lengths


def comparison_points(tokens: int) -> list[int]:
    """Return the depths at which states are compared: dense where drift starts, `tokens` last."""
    steps = range(64 * _POINTS_PER_DOUBLING)
    marks = (round(_FIRST_POINT * 2 ** (step / _POINTS_PER_DOUBLING)) for step in steps)
    return [*takewhile(lambda mark: mark < tokens, marks), tokens]


def make_call(
    step: int,
    texts: Sequence[Array],
    positions: Array,
    lengths: Array,
    weights: Array,
    reset: tuple[int, ...],
    marks: list[int],
    scale: Array | None = None,
) -> ScheduledCall:
    """Return the call in which each row reads on in its text.

    Args:
      step: number of the call.
      texts: [N] int64 for each row, which goes round at its end.
      positions: [B] where the rows stand in them.
      lengths: [B] how many tokens they bring.
      weights: [B, T].
      reset: rows that start afresh before.
      marks: depths at which states are still to be compared; those reached are taken out.
      scale: [B] times the model's step sizes; default: 1.
    """
    size = int(lengths.max())
    real = np.arange(size) < lengths[:, None]
    places = positions[:, None] + np.arange(size)
    rows = range(len(texts))
    ids, labels = (
        np.stack([texts[row][(places[row] + shift) % len(texts[row])] for row in rows])
        for shift in (0, 1)
    )
    tokens_read = int(positions[0] + lengths[0])
    compare = bool(marks) and tokens_read >= marks[0]
    while marks and tokens_read >= marks[0]:
        marks.pop(0)
    return ScheduledCall(
        step,
        np.where(real, ids, 0),
        np.where(real, weights, np.float32(0)),
        lengths,
        np.ones(len(texts), np.float32) if scale is None else scale.astype(np.float32),
        np.where(real, labels, 0),
        positions.copy(),
        reset,
        tokens_read,
        compare,
    )


def _weights(rng: np.random.Generator, shape: tuple[int, int]) -> Array:
    kind = rng.random()
    if kind < _SILENT:
        return np.zeros(shape, np.float32)
    if kind < _SILENT + _WEIGHTED:
        return rng.choice(np.array([0, 0.5, 1], np.float32), shape, p=(0.2, 0.1, 0.7))
    return np.ones(shape, np.float32)


def _sizes(rng: np.random.Generator, max_tokens: int) -> Iterator[int]:
    """Yield T of one call after the other: all kinds in every round, in a new order.

    The first round begins with its smaller half, so that early depths are seen.
    """
    odd = {2, 3, 5, 7, 13, 17, 31, 61, max_tokens // 2 + 1, max_tokens - 1, max_tokens}
    blocks = [[size] for size in sorted(odd) if 1 <= size <= max_tokens]
    blocks = [[1] * _DECODE_RUN] * 3 + blocks
    half = len(blocks) // 2
    yield from (size for index in rng.permutation(half) for size in blocks[index])
    yield from (
        size for index in rng.permutation(len(blocks) - half) for size in blocks[half + index]
    )
    while True:
        for index in rng.permutation(len(blocks)):
            yield from blocks[index]
