"""Sessions: tokens in, logits out, state kept. The same for every backend."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from fwl_export import state as states
from fwl_export.errors import ShapeError, StateError, TokenError
from fwl_export.state import State, TensorSpec

Array = npt.NDArray[Any]


class Runner(Protocol):
    """What a backend implements: one call of the model from one set of buffers to another.

    Buffers are the backend's own kind of memory for the state of all rows.
    """

    def new_buffers(self, batch: int) -> Any:
        """Return buffers for `batch` rows; their content does not matter."""

    def run(
        self, input_ids: Array, label_weights: Array, lengths: Array, past: Any, present: Any
    ) -> Array:
        """Read `past`, overwrite `present` (never the same buffers) and return the logits.

        Args:
          input_ids: [B, T] int64.
          label_weights: [B, T] float32.
          lengths: [B] int64.
          past: buffers to read.
          present: buffers to write.
        """

    def read(self, buffers: Any) -> State:
        """Copy buffers to arrays by name."""

    def write(self, buffers: Any, state: Mapping[str, Array]) -> None:
        """Copy arrays by name into buffers."""


class Session:
    """Rows of text that are read step by step; each row is an independent session.

    A call either returns logits and moves every row on, or raises and leaves all rows as they
    were: results go to other buffers than the current ones, which change places at the end.

    A session is not safe to use from several threads at once.
    """

    def __init__(
        self,
        runner: Runner,
        specs: Sequence[TensorSpec],
        vocab_size: int,
        max_tokens: int,
        batch: int,
        anchor_interval: int = 0,
    ) -> None:
        """Start `batch` fresh rows. Use `fwl_export.open_session`.

        Args:
          runner: the backend.
          specs: of the state.
          vocab_size: V.
          max_tokens: largest T of the runner's calls.
          batch: number of rows.
          anchor_interval: see `FastWeightsConfig`; calls of the runner do not cross an anchor.
        """
        if batch < 1:
            raise ShapeError(f"batch is {batch}; expected 1 or more rows")
        self.specs = list(specs)
        self.vocab_size = vocab_size
        self.max_tokens = max_tokens
        self.batch = batch
        self.anchor_interval = anchor_interval
        self._positions = np.zeros(batch, np.int64)
        self._runner = runner
        self._current = runner.new_buffers(batch)
        self._spare = [runner.new_buffers(batch)]
        runner.write(self._current, states.zeros(self.specs, batch))

    def feed(
        self,
        tokens: npt.ArrayLike,
        label_weights: npt.ArrayLike | None = None,
        lengths: npt.ArrayLike | None = None,
    ) -> Array:
        """Read the next tokens of every row.

        Args:
          tokens: [B, T] token ids, or [T] in a session of one row. T is 1 or more; reads longer
            than `max_tokens`, or across an anchor, are split.
          label_weights: [B, T] or [T], how much to learn from each token; 0 = read it without
            learning. Default: 1 everywhere.
          lengths: [B], real tokens of each row, 0 to T; the rest is padding. Default: T.

        Returns:
          logits [B, T, V] float32, the prediction after each token; zeros at padding.

        Raises:
          ShapeError: a shape does not fit, or T is 0.
          TokenError: an id is out of range, a weight is negative or not finite, a length is out
            of range, or the model's output is not finite. No row has moved.
        """
        ids, weights, counts = self._checked(tokens, label_weights, lengths)
        done = np.zeros(self.batch, np.int64)
        logits: Array | None = None
        past, taken = self._current, []
        while logits is None or (done < counts).any():
            here = self._next_lengths(counts - done, done)
            part_ids, part_weights = _from(done, here, ids), _from(done, here, weights)
            if not self._spare:
                self._spare.append(self._runner.new_buffers(self.batch))
            present = self._spare.pop()
            taken.append(present)
            try:
                found = self._runner.run(part_ids, part_weights, here, past, present)
                found = _real_logits(found, here)
            except BaseException:
                self._spare += [buffers for buffers in taken if buffers is not self._current]
                raise
            if past is not self._current:
                self._spare.append(past)
                taken.remove(past)
            past = present
            if (
                found.shape[1] == ids.shape[1]
            ):  # what other rows have left is filled in by later calls
                logits = found
            else:
                if logits is None:
                    logits = np.zeros((*ids.shape, found.shape[2]), found.dtype)
                for row, (start, size) in enumerate(zip(done, here, strict=True)):
                    logits[row, start : start + size] = found[row, :size]
            done = done + here
        self._spare.append(self._current)
        self._current = past
        self._positions += counts
        return logits

    def _next_lengths(self, left: Array, done: Array) -> Array:
        """Return how many tokens each row brings to the next call of the runner: [B]."""
        room: Array = np.minimum(left, self.max_tokens)
        if self.anchor_interval:
            since = (self._positions + done) % self.anchor_interval
            room = np.minimum(room, self.anchor_interval - since)
        return room

    @property
    def state(self) -> State:
        """A copy of the state: arrays [B, ...] by name, in the model's order."""
        return self._runner.read(self._current)

    @state.setter
    def state(self, state: Mapping[str, Array]) -> None:
        states.check(self.specs, state, self.batch)
        for name, array in state.items():
            if not np.isfinite(array).all():
                raise StateError(f"state '{name}' holds NaN or infinite values; do not use it")
        self._runner.write(self._spare[-1], state)
        self._current, self._spare[-1] = self._spare[-1], self._current
        self._positions = state["position"].astype(np.int64)

    def reset(self, rows: Sequence[int] | None = None) -> None:
        """Make the given rows (default: all) fresh sessions."""
        rows = range(self.batch) if rows is None else rows
        for row in rows:
            if not 0 <= row < self.batch:
                raise ShapeError(f"row {row} does not exist; expected 0 to {self.batch - 1}")
        self.state = states.reset_rows(self.state, rows)

    def _checked(
        self,
        tokens: npt.ArrayLike,
        label_weights: npt.ArrayLike | None,
        lengths: npt.ArrayLike | None,
    ) -> tuple[Array, Array, Array]:
        ids = np.asarray(tokens)
        if ids.ndim == 1 and self.batch == 1:
            ids = ids[None]
        if ids.ndim != 2 or ids.shape[0] != self.batch or ids.shape[1] < 1:
            raise ShapeError(
                f"tokens have shape {list(np.shape(tokens))}; expected [{self.batch}, T] with T "
                "of 1 or more"
            )
        if not np.issubdtype(ids.dtype, np.integer):
            raise TokenError(f"tokens are {ids.dtype}; expected whole numbers")
        counts = self._checked_lengths(lengths, ids.shape[1])
        real = np.arange(ids.shape[1]) < counts[:, None]
        wrong = real & ((ids < 0) | (ids >= self.vocab_size))
        if wrong.any():
            row, column = np.argwhere(wrong)[0]
            raise TokenError(
                f"token id {ids[row, column]} (row {row}, position {column}) is out of range; "
                f"expected 0 to {self.vocab_size - 1}"
            )
        weights = np.ones(ids.shape, np.float32)
        if label_weights is not None:
            given = np.asarray(label_weights, np.float32)
            if given.ndim == 1 and self.batch == 1:
                given = given[None]
            if given.shape != ids.shape:
                raise ShapeError(
                    f"label_weights have shape {list(given.shape)}; expected {list(ids.shape)}"
                )
            if not (np.isfinite(given) & (given >= 0))[real].all():
                raise TokenError("label_weights must be finite and 0 or more")
            weights = given
        return (
            np.where(real, ids, 0).astype(np.int64),
            np.where(real, weights, np.float32(0)),
            counts,
        )

    def _checked_lengths(self, lengths: npt.ArrayLike | None, size: int) -> Array:
        if lengths is None:
            return np.full(self.batch, size, np.int64)
        counts = np.asarray(lengths)
        if counts.shape != (self.batch,) or not np.issubdtype(counts.dtype, np.integer):
            raise ShapeError(
                f"lengths are {counts.dtype} {list(counts.shape)}; expected {self.batch} whole "
                "numbers"
            )
        if not ((counts >= 0) & (counts <= size)).all():
            raise TokenError(f"lengths are {counts.tolist()}; expected 0 to {size}")
        return counts.astype(np.int64)


def _from(start: Array, lengths: Array, values: Array) -> Array:
    """Return the next values of each row, and zeros where a row has fewer: [B, T] of [B, N]."""
    size = max(int(lengths.max()), 1)
    if size == values.shape[1]:  # then no row has begun
        return values
    columns = np.arange(size)
    found = np.take_along_axis(
        values, np.minimum(start[:, None] + columns, values.shape[1] - 1), axis=1
    )
    return np.where(columns < lengths[:, None], found, np.zeros((), values.dtype))


def _real_logits(logits: Array, lengths: Array) -> Array:
    """Return the logits with zeros at padding.

    Raises:
      TokenError: one is not finite.
    """
    padding = np.arange(logits.shape[1]) >= lengths[:, None]
    if padding.any():
        logits = np.where(padding[..., None], np.zeros((), logits.dtype), logits)
    if not np.isfinite(logits).all():
        row, column = np.argwhere(~np.isfinite(logits))[0][:2]
        raise TokenError(
            f"the model's output is not finite at row {row}, position {column} of this call; no "
            "row has moved: reset the row, or feed it with smaller label_weights"
        )
    return logits
