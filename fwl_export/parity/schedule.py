"""A planned call, and the calls over text: uneven chunks, the same for every runtime.

`cases` has the other kinds of calls. A schedule can be replayed from its seed. Its calls cover what
tends to go wrong in streaming models: T of 1 and the largest T; odd sizes, which leave the ring
buffers at every offset; rows at different positions, a row that starts late, and rows with fewer
tokens than others or none; tokens that are read without learning, singly and in whole calls; logits
after some of the tokens only; and a reset in mid-stream.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import TYPE_CHECKING

import numpy as np

from fwl_export.bundle.state import Array
from fwl_export.errors import TokenError
from fwl_export.parity.design import Setting

if TYPE_CHECKING:
    from fwl_export.runtimes import Session

# Row 0 reads from start to end, row 1 starts late, row 2 is reset in mid-stream.
ROWS = 3
_STARTS = (0.0, 0.25, 0.0)  # as shares of the tokens that the first row reads
_RESET_AT = 0.55
_RESET_ROW = 2

FIRST_POINT = 16  # tokens; fewer give too few errors to tell how large they usually are
_POINTS_PER_DOUBLING = 2

_RAGGED = 0.5  # share of calls in which rows have different lengths
_WEIGHTED = 0.4  # share of calls in which some tokens have weight 0 or 0.5
_SILENT = 0.06  # share of calls in which all tokens have weight 0
_SOME_LOGITS = 0.5  # share of calls of which not all logits are wanted
_FORCED_EVERY = 4  # calls of which teacher-forced sessions make one
_DECODE_RUN = 8  # consecutive calls of one token, as when text is generated


@dataclass(frozen=True)
class ScheduledCall:
    """One planned call of every session, on all rows.

    Attributes:
      step: Number of the call, from 0.
      ids: Token ids, [B, T] int64, 0 at padding.
      weights: Label weights, [B, T] float32: how much to learn from each token.
      lengths: Number of real tokens in each row, [B] int64.
      scale: Factor on the model's step sizes in each row, [B] float32.
      labels: Token that follows each token in the text, [B, T] int64, 0 at padding.
      positions: Tokens that each row has read before this call, [B] int64. Resets do not lower it.
      reset: Rows to reset before this call.
      tokens_read: Tokens the first row has read after this call. In the cases of the covering
        design, whose first row may be idle, the sum of T so far.
      compare_state: Whether the whole state is compared after this call.
      logit_positions: Positions in this call whose logits are wanted, [B, P] int64; None means
        all T of each row.
      last_only: Whether only the logits after each row's last token are wanted.
      forks: Rows to copy to other rows before the call, as (source, target).
      moves: Rows to put at another position before the call, as (row, position).
      forced: Whether teacher-forced sessions make this call. They do where states are compared.
      setting: What the call covers of the covering design, or None outside of it.
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
    logit_positions: Array | None = None
    last_only: bool = False
    forks: tuple[tuple[int, int], ...] = ()
    moves: tuple[tuple[int, int], ...] = ()
    forced: bool = True
    setting: Setting | None = None

    @property
    def prepares(self) -> bool:
        """Whether rows change before the call."""
        return bool(self.reset or self.forks or self.moves)

    @property
    def wanted(self) -> Array:
        """Positions in this call whose logits are returned, [B, P] int64."""
        if self.last_only:
            return np.maximum(self.lengths - 1, 0)[:, None]
        if self.logit_positions is not None:
            return self.logit_positions
        return np.tile(np.arange(self.ids.shape[1]), (len(self.ids), 1))

    def prepare(self, session: Session) -> None:
        """Reset, copy and move the rows of a session as planned before the call."""
        if self.reset:
            session.reset(self.reset)
        for source, target in self.forks:
            session.fork(source, [target])
        if self.moves:
            rows = [row for row, _ in self.moves]
            positions = np.array([position for _, position in self.moves], np.int64)
            session.write_rows(rows, {**session.read_rows(rows), "position": positions})

    def feed(self, session: Session) -> Array:
        """Make the call; returns the logits at the wanted positions, [B, P, V]."""
        session.learning_rate_scale = self.scale
        # Where nothing is padded or weighted, sessions take a faster path, as applications do.
        plain = (self.lengths == self.ids.shape[1]).all() and (self.weights == 1).all()
        weights, lengths = (None, None) if plain else (self.weights, self.lengths)
        if self.last_only:
            return session.feed(self.ids, weights, lengths, last_only=True)[:, None]
        return session.feed(self.ids, weights, lengths, logit_positions=self.logit_positions)


@dataclass(frozen=True)
class Schedule:
    """Seeded calls over a text. Iterating yields the calls, the same ones each time.

    Attributes:
      ids: Token ids of the text, [N] int64. Rows start at different places and wrap around.
      tokens: Number of tokens that the first row reads.
      max_tokens: Largest T of a call.
      seed: Seed of all random choices.
      limit: Largest number of tokens that a row may read; 0 means no limit.
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
                f"next one takes {self.tokens + 1}. Give a longer text, or read fewer tokens: "
                f"--tokens {max(len(self.ids) - 1, 1)}"
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
            call = make_call(step, texts, positions, lengths, weights, rows, marks)
            forced = call.compare_state or step % _FORCED_EVERY == 0
            yield replace(some_logits(rng, call), forced=forced)
            positions += lengths
            step += 1

    def _lengths(
        self, rng: np.random.Generator, size: int, positions: Array, force_ragged: bool
    ) -> Array:
        """Return the length of each row [B]; at least one row has `size` tokens."""
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
    """Return the comparison points: tokens read by the first row at which states are compared.

    Their spacing grows with the tokens read; the last point is `tokens`.
    """
    steps = range(64 * _POINTS_PER_DOUBLING)
    marks = (round(FIRST_POINT * 2 ** (step / _POINTS_PER_DOUBLING)) for step in steps)
    return [*takewhile(lambda mark: mark < tokens, marks), tokens]


def some_logits(rng: np.random.Generator, call: ScheduledCall) -> ScheduledCall:
    """Return the call, half of the time with logits after some of its tokens only."""
    size = call.ids.shape[1]
    if size == 1 or rng.random() >= _SOME_LOGITS:
        return call
    if rng.random() < 0.5:
        return replace(call, last_only=True)
    count = int(rng.integers(1, size))
    return replace(call, logit_positions=rng.integers(0, size, (len(call.ids), count)))


def make_call(
    step: int,
    texts: Sequence[Array],
    positions: Array,
    lengths: Array,
    weights: Array,
    reset: tuple[int, ...],
    marks: list[int],
    scale: Array | None = None,
    size: int = 0,
) -> ScheduledCall:
    """Return the call in which each row reads on in its text.

    Args:
      step: Number of the call.
      texts: Token ids of each row's text, [N] int64. Reading wraps around at its end.
      positions: Position of each row in its text, [B].
      lengths: Number of tokens that each row reads, [B].
      weights: Label weights, [B, T].
      reset: Rows to reset before the call.
      marks: Comparison points that are still ahead. Those that the call reaches are removed.
      scale: Factor on the model's step sizes in each row, [B]; None means 1.
      size: T; 0 means the largest of the lengths.
    """
    size = size or int(lengths.max())
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
    """Yield T of each call. Every round has all sizes, in a new random order.

    The first round begins with the smaller half, so that it reaches early comparison points.
    """
    odd = {2, 3, 5, 7, 13, 17, 31, 61, max_tokens // 2 + 1, max_tokens - 1, max_tokens}
    blocks = [[size] for size in sorted(odd) if 1 <= size <= max_tokens]
    blocks = [[1] * _DECODE_RUN, *blocks]
    half = len(blocks) // 2
    yield from (size for index in rng.permutation(half) for size in blocks[index])
    yield from (
        size for index in rng.permutation(len(blocks) - half) for size in blocks[half + index]
    )
    while True:
        for index in rng.permutation(len(blocks)):
            yield from blocks[index]
