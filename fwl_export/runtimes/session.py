"""Sessions: tokens in, logits out, and the state in between. The same for every runtime."""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from fwl_export.bundle import state as states
from fwl_export.bundle import state_file
from fwl_export.bundle.state import Array, State, TensorSpec
from fwl_export.bundle.state_file import SavedState
from fwl_export.errors import ConfigError, ShapeError, StateError, TokenError
from fwl_export.runtimes import limits as learning
from fwl_export.runtimes.arguments import (
    check_types,
    checked_array,
    checked_batch,
    checked_list,
    checked_numbers,
    checked_rows,
    shown,
    whole_number,
)
from fwl_export.runtimes.base import Call, Runner
from fwl_export.runtimes.limits import CLIP_INTERVAL, Learned, LearningLimits
from fwl_export.runtimes.not_finite import FailedCall
from fwl_export.runtimes.sampling import Choice, Sampler

# Tokens that a row may have read in all. Positions stay far from where 64 bits overflow, and are
# exact in float64.
MOST_TOKENS = 2**53


@dataclass(frozen=True)
class SessionSpec:
    """What a session needs to know about its model.

    Attributes:
      state: Specs of the state's tensors, in the model's order.
      vocab_size: Number of token ids, V.
      max_tokens: Largest T of one call of the runner; the session splits longer reads.
      anchor_interval: Tokens between two anchors, which no call may cross; 0 means no anchors. See
        `FastWeightsConfig`.
      model_id: Identity of the model; state files carry it, and load only into the same model.
      max_positions: Tokens that a row may read in all; 0 means no limit.
      precision: Precision that the model computes in, e.g. "fp16", for messages; "" if it is not
        known.
    """

    state: Sequence[TensorSpec]
    vocab_size: int
    max_tokens: int
    anchor_interval: int = 0
    model_id: str = ""
    max_positions: int = 0
    precision: str = ""


class RowKeeper(Protocol):
    """What hands out a session's rows, as `Slots` does."""

    @property
    def free_rows(self) -> set[int]:
        """Rows that hold no text, and will be reset before they do."""


class Session:
    """Texts that a model reads step by step, one per row, and learns from while it reads.

        session = open_session("demo-bundle", batch=2)
        logits = session.feed([[11, 42, 7], [5, 5, 9]])  # [2, 3, V]
        session.save_state("texts.state")

    Rows do not influence each other. What a row has read is in its state (fast weights, attention
    cache, position), which can be copied, saved, and put into any row of the same model.

    A call either succeeds, or raises and leaves every row as it was before: the runtime writes new
    state to spare buffers, which replace the current ones only at the end.

    Threads may share a session: its methods run one at a time. Sessions that share a loaded model
    (see `another`) run at the same time. In asyncio, call
    `await asyncio.to_thread(session.feed, ids)`.

    Attributes:
      batch: Number of rows, B.
      vocab_size: Number of token ids, V.
      max_tokens: Tokens that one call of the model reads at most; `feed` splits longer reads.
      max_positions: Tokens that a row may read in all, from a fresh state; 0 means no limit.
      anchor_interval: Tokens between the anchors at which gradients are taken; 0 means none.
      model_id: Identity of the model, as hex; state files load only into the same model.
      specs: Names, shapes and dtypes of the state's tensors, in the model's order.
      spec: The attributes above, except `batch`, as one `SessionSpec`.
      limits: How much the session may learn, as `open_session` was told.
    """

    def __init__(
        self,
        runner: Runner,
        spec: SessionSpec,
        batch: int = 1,
        limits: LearningLimits | None = None,
    ) -> None:
        """Start `batch` fresh rows. Applications call `fwl_export.open_session` instead.

        Args:
          runner: The loaded model in its runtime; no other session may use it.
          spec: What the session needs to know about the model.
          batch: Number of rows.
          limits: How much the session may learn. None means the defaults.

        Raises:
          ShapeError: `batch` is less than 1, or more than the runner or the memory takes.
          ConfigError: `spec.max_tokens` is less than 1.
        """
        self.batch = checked_batch(batch)
        if spec.max_tokens < 1:
            raise ConfigError(f"spec.max_tokens is {spec.max_tokens}; expected 1 or more tokens")
        self.spec = spec
        self.limits = limits or LearningLimits()
        self.specs = list(spec.state)
        self.vocab_size = spec.vocab_size
        self.max_tokens = spec.max_tokens
        self.anchor_interval = spec.anchor_interval
        self.model_id = spec.model_id
        self.max_positions = spec.max_positions
        clips = self.limits.clip_update_norm != math.inf
        # Positions that are multiples of these lie between two calls of the model.
        self._intervals = [
            *([spec.anchor_interval] if spec.anchor_interval else []),
            *([CLIP_INTERVAL] if clips else []),
        ]
        self._lock = threading.RLock()
        # A list, not an array: a few NumPy calls take as long as a step of a small model.
        self._positions = [0] * self.batch
        self._learning_rate_scale = np.ones(self.batch, np.float32)
        learning.check_scale(self._learning_rate_scale, self.limits.max_learning_weight)
        self._plain: tuple[tuple[int, bool], Call] | None = None  # see _plain_call
        self._slots: weakref.ref[RowKeeper] | None = None  # see hand_over
        self._runner = runner
        try:
            self._current = runner.new_buffers(self.batch)
            self._spare = [runner.new_buffers(self.batch)]
        except MemoryError:
            size = 2 * self.batch * sum(each.bytes_per_row for each in self.specs)
            raise ShapeError(
                f"batch is {self.batch}, for which the state takes {size / 1e9:.1f} GB, more than "
                "there is memory; take fewer rows, or a smaller model"
            ) from None

    def __repr__(self) -> str:
        shown = self._positions[:8]
        more = ", ..." if self.batch > len(shown) else ""
        runtime = type(self._runner).__name__.removesuffix("Runner")
        return (
            f"<Session in {runtime}: batch={self.batch}, "
            f"positions=[{', '.join(map(str, shown))}{more}], vocab_size={self.vocab_size}, "
            f"max_tokens={self.max_tokens}>"
        )

    def hand_over(self, keeper: RowKeeper) -> None:
        """Let somebody hand out the rows from now on, as `Slots` does.

        Whatever would give a text to a row that is free is refused as long as the keeper lives,
        since the row would be handed out again, and its text lost without a word.

        Args:
          keeper: Knows which rows are free.

        Raises:
          ShapeError: Another keeper hands the rows out.
        """
        with self._lock:
            if self._slots is not None and self._slots() is not None:
                raise ShapeError(
                    "the rows of this session are handed out by other Slots; use those, or open "
                    "another session: session.another(batch=...)"
                )
            self._slots = weakref.ref(keeper)

    def _check_not_free(self, rows: Iterable[int], action: str) -> None:
        keeper = self._slots() if self._slots is not None else None
        if keeper is not None and (free := sorted(keeper.free_rows & set(rows))):
            raise ShapeError(
                f"{action} would give a text to row {free[0]}, which is free in the Slots that "
                "hand out this session's rows; use add, feed and fork of the Slots"
            )

    def another(self, batch: int = 1) -> Session:
        """Open another session on the same loaded model; it shares no state with this one.

        Args:
          batch: Number of fresh rows.

        Raises:
          ShapeError: `batch` is less than 1, or more than the engine or the memory takes.
        """
        return Session(self._runner.another(), self.spec, batch, self.limits)

    def drop_state(self) -> None:
        """Let go of the state's memory: from now on the session only serves to open others."""
        with self._lock:
            self._runner.release(self._current)
            self._current = None
            self._spare.clear()

    def taking_turns(self) -> Session:
        """Open a session like `another`, with as many rows, that shares this one's spare memory.

        Together the two need three quarters of the memory of two sessions. While one of them
        computes, the other waits.
        """
        other = self.another(self.batch)
        other._spare, other._lock = self._spare, self._lock
        return other

    def feed(
        self,
        tokens: npt.ArrayLike,
        label_weights: npt.ArrayLike | None = None,
        lengths: npt.ArrayLike | None = None,
        last_only: bool = False,
        logit_positions: npt.ArrayLike | None = None,
    ) -> Array:
        """Read the next tokens of every row, learn from them, and predict what follows each.

        Read a document in one call or token by token, as it suits: the logits are the same up to
        rounding. Prefill is a call with many tokens, decode one with a single token per row. If a
        call raises, no row has moved: correct the arguments and call again.

        Args:
          tokens: [B, T] integer token ids, 0 to V - 1, or [T] if the session has one row. T is 1
            or more, without upper limit: `feed` splits reads longer than `max_tokens`.
          label_weights: [B, T] or [T], finite and 0 or more: how much the model learns from each
            token, as the label of the prediction before it. 1 is as trained; 0 reads a token
            without learning from it and without forgetting. None means 1 everywhere. Times the
            row's learning-rate scale it is at most the session's `max_learning_weight`, 10 by
            default.
          lengths: [B] integers, 0 to T: how many of its T tokens each row reads; the rest is
            padding, and may hold any number. None means T for all rows.
          last_only: Return only the logits after each row's last token, which saves a product with
            the vocabulary at every other position.
          logit_positions: [B, P] integers, or [P] if the session has one row, 0 to T - 1: return
            only the logits after these tokens of each row, in this order; a position may be named
            twice. It saves as much.

        Returns:
          Logits [B, T, V] float32, unnormalized: entry t predicts the token after token t. Zeros
          at padding. With `logit_positions` [B, P, V]. With `last_only` [B, V]; zeros in rows of
          length 0. With precision "fp64", float64. The array belongs to the caller.

        Raises:
          ShapeError: An argument has the wrong shape, or T is 0.
          TokenError: A token id, weight or length is out of range, or a row would read more than
            `max_positions` tokens in all.
          NotFiniteError: The model's output has a NaN or infinite value; a `TokenError` too. It
            names the row, the token, the cause and what to do.
          UpdateNormError: A row would have learned more than the session's `max_update_norm`; a
            `TokenError` too.
          DeviceError, EngineError: The GPU or TensorRT refused the call.
        """
        if not isinstance(last_only, (bool, np.bool_)):
            raise ShapeError(f"last_only is {last_only!r}; expected True or False")
        ids, weights, counts = self._checked(tokens, label_weights, lengths)
        wanted = self._checked_wanted(logit_positions, ids.shape[1], last_only)
        with self._lock:
            if self._slots is not None:
                moving = (row for row, count in enumerate(counts) if count)
                self._check_not_free(moving, "feed")
            self._check_positions(counts)
            if weights is not None:
                limit = self.limits.max_learning_weight
                learning.check_weights(weights, self._learning_rate_scale, limit, ids)
            positions = [a + b for a, b in zip(self._positions, counts, strict=True)]
            at_once = self._next_lengths(counts, [0] * self.batch) == counts
            if at_once and max(counts) == ids.shape[1]:
                logits = self._feed_at_once(ids, weights, counts, last_only, wanted)
            else:
                logits = self._feed_in_parts(ids, weights, counts, last_only, wanted)
            self._positions = positions
            return logits[:, 0] if last_only else logits

    def _check_positions(self, counts: list[int]) -> None:
        if not self.max_positions:
            return
        for row, (position, count) in enumerate(zip(self._positions, counts, strict=True)):
            if position + count > self.max_positions:
                raise TokenError(
                    f"row {row} has read {position} tokens and would read {count} more, but this "
                    f"model reads at most {self.max_positions}; reset the row, or read a shorter "
                    "text"
                )

    def _feed_at_once(
        self,
        ids: Array,
        weights: Array | None,
        counts: list[int],
        last_only: bool,
        wanted: Array | None,
    ) -> Array:
        if wanted is not None:
            ones = np.ones(ids.shape, np.float32)
            call = self._call(ids.astype(np.int64), ones if weights is None else weights, counts)
            call = replace(call, logit_positions=wanted)
        elif weights is None:
            call = self._plain_call(ids, counts, last_only)
        else:
            call = self._call(ids, weights, counts, last_only)
        present = self._spare_buffers()
        logits = self._run(call, self._current, present, counts, [0] * self.batch)
        self._current, self._spare[0] = present, self._current
        return logits

    def _run(
        self, call: Call, past: Any, present: Any, counts: list[int], done: list[int]
    ) -> Array:
        """Run a call of the model, and check what it returned and what the rows have learned.

        Args:
          call: The call.
          past: Buffers with the state before it.
          present: Buffers for the state after it.
          counts: Tokens that each row reads in it.
          done: Tokens that each row has read since this `feed` began.
        """
        logits = _real_logits(self._runner.run(call, past, present), call, counts)
        if not _is_finite(logits):
            failed = FailedCall(
                self._runner,
                call,
                past,
                present,
                self.specs,
                self.spec.precision,
                done,
                self._positions,
            )
            raise failed.error(logits)
        if self.limits.clip_update_norm != math.inf:
            read = [a + b for a, b in zip(done, counts, strict=True)]
            positions = [a + b for a, b in zip(self._positions, read, strict=True)]
            due = [position % CLIP_INTERVAL == 0 for position in positions]
            self._clip(present, [row for row in range(self.batch) if counts[row] and due[row]])
        limit = self.limits.max_update_norm
        if limit != math.inf:
            state = self._runner.read(present, slice(None))
            learning.check_update(learning.learned(self.specs, state), limit)
        return logits

    def _clip(self, present: Any, rows: list[int]) -> None:
        """Scale what some rows have learned down to the session's `clip_update_norm`."""
        if rows:
            state = learning.clipped(
                self.specs, self._runner.read(present, rows), rows, self.limits.clip_update_norm
            )
            if state:
                self._runner.write(present, state, rows)

    def _plain_call(self, ids: Array, counts: list[int], last_only: bool) -> Call:
        """Return a call that reads all ids with weight 1.

        The call is kept, and only its ids are replaced next time: in a decoding loop the model has
        evicted this code from the caches, and each NumPy call left out saves microseconds.
        """
        key = (ids.shape[1], last_only)
        if self._plain is None or self._plain[0] != key:
            weights = np.ones(ids.shape, np.float32)
            self._plain = key, self._call(ids.astype(np.int64), weights, counts, last_only)
        call = self._plain[1]
        call.input_ids[:] = ids
        return call

    def _spare_buffers(self) -> Any:
        if not self._spare:
            self._spare.append(self._runner.new_buffers(self.batch))
        return self._spare[-1]

    def _feed_in_parts(
        self,
        ids: Array,
        weights: Array | None,
        counts: list[int],
        last_only: bool,
        wanted: Array | None,
    ) -> Array:
        if weights is None:
            weights = np.ones(ids.shape, np.float32)
        done, left = [0] * self.batch, counts
        logits: Array | None = None
        past, taken = self._current, []
        while logits is None or any(left):
            here = self._next_lengths(left, done)
            call = self._call(_from(done, here, ids), _from(done, here, weights), here, last_only)
            if wanted is not None:
                places = wanted - np.array(done)[:, None]
                inside = (places >= 0) & (places < np.array(here)[:, None])
                places = np.where(inside, places, 0)
                if wanted.shape[1] <= call.input_ids.shape[1]:
                    call = replace(call, logit_positions=places)
                    places = np.broadcast_to(np.arange(wanted.shape[1]), wanted.shape)
            present = self._spare_buffers()
            taken.append(self._spare.pop())
            try:
                found = self._run(call, past, present, here, done)
            except BaseException:
                self._spare += [buffers for buffers in taken if buffers is not self._current]
                self._keep_one_spare()
                raise
            if past is not self._current:
                self._spare.append(past)
                taken.remove(past)
            past = present
            if wanted is not None:
                found = np.take_along_axis(found, places[..., None], 1)
                logits = np.zeros_like(found) if logits is None else logits
                logits[inside] = found[inside]
            elif logits is None and (last_only or found.shape[1] == ids.shape[1]):
                logits = found  # later calls fill in what other rows have left
            elif last_only:
                assert logits is not None
                read = np.greater(here, 0)
                logits[read] = found[read]
            else:
                if logits is None:
                    logits = np.zeros((*ids.shape, found.shape[2]), found.dtype)
                for row, (start, size) in enumerate(zip(done, here, strict=True)):
                    logits[row, start : start + size] = found[row, :size]
            done = [a + b for a, b in zip(done, here, strict=True)]
            left = [a - b for a, b in zip(left, here, strict=True)]
        self._spare.append(self._current)
        self._current = past
        self._keep_one_spare()
        return logits

    def _call(
        self, ids: Array, weights: Array, lengths: list[int], last_only: bool = False
    ) -> Call:
        if last_only:
            positions = np.array([[max(length - 1, 0)] for length in lengths], np.int64)
        else:
            positions = np.tile(np.arange(ids.shape[1], dtype=np.int64), (len(ids), 1))
        return Call(
            np.ascontiguousarray(ids),
            np.ascontiguousarray(weights),
            np.array(lengths, np.int64),
            positions,
            self._learning_rate_scale,
        )

    def _keep_one_spare(self) -> None:
        while len(self._spare) > 1:
            self._runner.release(self._spare.pop())

    def _next_lengths(self, left: list[int], done: list[int]) -> list[int]:
        """Return how many tokens each row reads in the next call of the runner.

        Args:
          left: Tokens that each row has yet to read.
          done: Tokens that each row has read since this `feed` began.
        """
        room = [min(count, self.max_tokens) for count in left]
        for interval in self._intervals:
            room = [
                min(count, interval - (position + read) % interval)
                for count, position, read in zip(room, self._positions, done, strict=True)
            ]
        return room

    def generate(
        self,
        prompt: npt.ArrayLike,
        count: int,
        sampler: Callable[[Array], int] | None = None,
        stop_tokens: Sequence[int] = (),
        learn: bool = True,
        on_token: Callable[[int], object] = lambda token: None,
    ) -> Iterator[int]:
        """Yield tokens that continue a prompt. The session must have one row.

            for token in session.generate(prompt, 100, Sampler(temperature=0.8), stop_tokens=[0]):
                print(tokenizer.decode([token]), end="", flush=True)

        The session reads a token when the caller asks for the next one, so it has not read the last
        token that was yielded. It continues from its state: what it read before still counts.

        Args:
          prompt: [N] token ids, N of 1 or more; read first.
          count: Most tokens to yield.
          sampler: Chooses each token from the logits, [V]: a `Sampler`, which also gets the ids so
            far, or any callable. None takes the most likely token (greedy).
          stop_tokens: Token ids that end the text; the one that ends it is yielded too.
          learn: Whether the session learns from the prompt and from its own output.
          on_token: Called with each token before it is yielded, so that a caller who collects all
            tokens with `list` can show them as they come.

        Raises:
          ConfigError: `count` is not a whole number of 0 or more, or an argument has the wrong
            type.
          ShapeError: The session has more than one row, or the prompt has the wrong shape.
          TokenError: A token of the prompt is out of range; see `feed`.
        """
        check_types(sampler=sampler, learn=learn)
        most = whole_number(count)
        if most is None or most < 0:
            raise ConfigError(f"count is {count!r}; expected a whole number of 0 or more tokens")
        stops = [whole_number(token) for token in checked_list("stop_tokens", stop_tokens)]
        if None in stops:
            raise ShapeError(f"stop_tokens are {shown(stop_tokens)}; expected whole numbers")
        if self.batch != 1:
            raise ShapeError(f"generate needs a session of one row; this one has {self.batch} rows")
        tokens = checked_array("prompt", prompt)
        chosen = Choice(Sampler() if sampler is None else sampler, tokens)
        return self._generate(tokens, most, chosen, stops, learn, on_token)

    def _generate(
        self,
        tokens: Array,
        count: int,
        sampler: Callable[[Array], int],
        stop_tokens: Sequence[int | None],
        learn: bool,
        on_token: Callable[[int], object],
    ) -> Iterator[int]:
        for _ in range(count):
            weights = None if learn else np.zeros(tokens.shape, np.float32)
            token = sampler(self.feed(tokens, weights, last_only=True)[0])
            on_token(token)
            yield token
            if token in stop_tokens:
                return
            tokens = np.array([token])

    @property
    def positions(self) -> list[int]:
        """Tokens that each row has read since it was fresh; a list of B ints."""
        return list(self._positions)

    @property
    def learning_rate_scale(self) -> Array:
        """Factor of the model's learned step sizes, per row: [B] float32, initially 1.

        Assign one number for all rows, or one per row; finite, 0 or more, and at most the session's
        `max_learning_weight`, 10 by default. It applies to tokens read from then on and leaves what
        was learned before, and the rate of forgetting, as they are. At 0 a row learns nothing but
        still forgets while it reads; with label weights of 0 it does neither. The factor belongs to
        the row, not to its text: `reset` does not change it, and state files do not contain it.
        """
        return self._learning_rate_scale.copy()

    @learning_rate_scale.setter
    def learning_rate_scale(self, scale: npt.ArrayLike) -> None:
        given = checked_numbers("learning_rate_scale", scale)
        if given.shape not in ((), (self.batch,)):
            raise ShapeError(
                f"learning_rate_scale has shape {list(given.shape)}; expected one number, or "
                f"one for each of the {self.batch} rows"
            )
        if not (np.isfinite(given) & (given >= 0)).all():
            raise ConfigError(
                f"learning_rate_scale is {given.tolist()}; expected finite numbers of 0 or more"
            )
        scales = np.broadcast_to(given, self.batch).copy()
        learning.check_scale(scales, self.limits.max_learning_weight)
        with self._lock:
            self._learning_rate_scale = scales
            self._plain = None

    def learned(self) -> Learned:
        """Return how much each row has learned, as norms; 0 for fresh rows.

            session.feed(document)
            print(session.learned().norms)  # [812.4]

        Watch them, and roll back what learned too much. They take well under a millisecond per row
        of the demo model; from a GPU the state is copied first.
        """
        with self._lock:
            return learning.learned(self.specs, self.peek())

    @property
    def state(self) -> State:
        """Copy of the state of all rows: arrays [B, ...] by name, in the model's order.

        Assigning a state of the same form puts it into all rows, see `write_rows`.
        """
        return self.read_rows(range(self.batch))

    @state.setter
    def state(self, state: Mapping[str, Array]) -> None:
        self.write_rows(range(self.batch), state)

    def peek(self) -> State:
        """Return the state of all rows without copying it where possible: [B, ...] by name.

        For callers that look at the state after every step and keep nothing. On the CPU the arrays
        alias the session's own buffers: do not write to them, and expect later calls to change
        them. From a GPU the state is copied.
        """
        with self._lock:
            return self._runner.read(self._current, slice(None))

    def read_rows(self, rows: Sequence[int]) -> State:
        """Return a copy of some rows' state.

        Args:
          rows: Row numbers, 0 to B - 1, each once.

        Returns:
          Arrays [len(rows), ...] by name, in the given order of rows.

        Raises:
          ShapeError: A row does not exist or is named twice, or there are none.
        """
        chosen = self._checked_rows(rows)
        with self._lock:
            return self._runner.read(self._current, chosen)

    def write_rows(self, rows: Sequence[int], state: Mapping[str, Array]) -> None:
        """Replace the state of some rows; they continue from there. Nothing changes on an error.

        Args:
          rows: Row numbers, 0 to B - 1, each once.
          state: Arrays [len(rows), ...] by name, as `read_rows` returns them.

        Raises:
          ShapeError: A row does not exist or is named twice, or there are none.
          StateError: The state does not fit this model, has NaN or infinite values or a position
            out of range, or has learned more than the session's `max_update_norm`.
        """
        chosen = self._checked_rows(rows)
        states.check(self.specs, state, len(chosen))
        states.check_finite(state)
        self._check_given(state)
        with self._lock:
            self._check_not_free(chosen, "a state that is written")
            self._write_rows(chosen, state)

    def _write_rows(self, chosen: list[int], state: Mapping[str, Array]) -> None:
        with self._lock:
            if len(chosen) == self.batch:  # no row keeps its state
                written = self._spare_buffers()
                self._runner.write(written, state, chosen)
                self._current, self._spare[0] = written, self._current
            else:
                before = self._runner.read(self._current, chosen)
                try:
                    self._runner.write(self._current, state, chosen)
                except BaseException:
                    self._runner.write(self._current, before, chosen)
                    raise
            for row, position in zip(chosen, state["position"], strict=True):
                self._positions[row] = int(position)

    def _check_given(self, state: Mapping[str, Array]) -> None:
        most = self.max_positions or MOST_TOKENS
        for row, position in enumerate(state["position"].tolist()):
            if not 0 <= position <= most:
                raise StateError(
                    f"row {row} of the state is at position {position}; expected 0 to {most}: do "
                    "not use this state"
                )
        if self.limits.max_update_norm != math.inf:
            found = learning.learned(self.specs, state)
            learning.check_state(found, self.limits.max_update_norm)

    def reset(self, rows: Sequence[int] | None = None) -> None:
        """Forget all that some rows have read and learned; their next text starts afresh.

        Args:
          rows: Row numbers, 0 to B - 1, each once; None means all rows.

        Raises:
          ShapeError: A row does not exist or is named twice, or there are none.
        """
        chosen = self._checked_rows(range(self.batch) if rows is None else rows)
        self._write_rows(chosen, states.zeros(self.specs, len(chosen)))

    def fork(self, source: int, targets: Sequence[int]) -> None:
        """Copy one row's state to other rows: read a document once, continue it many times.

        Args:
          source: Row to copy from.
          targets: Rows whose state is replaced.

        Raises:
          ShapeError: A row does not exist or is named twice, or there are no targets.
        """
        chosen = self._checked_rows(targets)
        with self._lock:
            self._check_not_free(chosen, "fork")
            state = self.read_rows([source])
            self.write_rows(chosen, {n: np.repeat(a, len(chosen), 0) for n, a in state.items()})

    def save_state(
        self, path: str | Path, rows: Sequence[int] | None = None, compress: str = "none"
    ) -> SavedState:
        """Save the state of some rows to a file, from which any runtime can continue.

        Args:
          path: File to write. An existing file is replaced, but only once all is written.
          rows: Rows to save, in this order; None means all rows.
          compress: "none"; "fp16", about half the size with a relative error near 2**-11; or
            "lowrank", factors of the fast weights, far smaller after few tokens, with an error
            like that of float32 rounding.

        Returns:
          Sizes in bytes, positions of the rows, and the error of the compression.

        Raises:
          ConfigError: There is no such compression, or an argument has the wrong type.
          ShapeError: A row does not exist or is named twice, or there are none.
          StateError: The state has NaN or infinite values.
          OSError: The file cannot be written; what was at `path` is as before.
        """
        check_types(path=path, compress=compress)
        state = self.read_rows(range(self.batch) if rows is None else rows)
        return state_file.save_state(Path(path), self.specs, state, self.model_id, compress)

    def load_state(self, path: str | Path, rows: Sequence[int] | None = None) -> None:
        """Continue from a file that `save_state` wrote. Nothing changes on an error.

        Args:
          path: File to read.
          rows: Rows that take the file's rows, in this order and as many; None means all rows.

        Raises:
          ConfigError: `path` is not a path.
          StateError: The file is not a state file, is damaged or was changed, comes from another
            model, or stands at a position that the model cannot reach.
          ShapeError: The file has another number of rows, or a row does not exist.
          OSError: The file cannot be read.
        """
        chosen = self._checked_rows(range(self.batch) if rows is None else rows)
        check_types(path=path)
        state = state_file.load_state(
            Path(path), self.specs, self.model_id, len(chosen), self.max_positions
        )
        self.write_rows(chosen, state)

    def _checked_rows(self, rows: Sequence[int]) -> list[int]:
        return checked_rows(rows, self.batch)

    def _checked(
        self,
        tokens: npt.ArrayLike,
        label_weights: npt.ArrayLike | None,
        lengths: npt.ArrayLike | None,
    ) -> tuple[Array, Array | None, list[int]]:
        """Return ids [B, T], weights [B, T], and lengths.

        Weights are None where all are 1 and nothing is padding.
        """
        ids = self._checked_ids(tokens)
        counts = self._checked_lengths(lengths, ids.shape[1])
        if lengths is None and label_weights is None and self._all_in_range(ids):
            return ids, None, counts
        real = np.arange(ids.shape[1]) < np.array(counts)[:, None]
        wrong = real & ((ids < 0) | (ids >= self.vocab_size))
        if wrong.any():
            row, column = np.argwhere(wrong)[0]
            raise TokenError(
                f"token id {ids[row, column]} (row {row}, position {column}) is out of range; "
                f"expected 0 to {self.vocab_size - 1}"
            )
        weights = self._checked_weights(label_weights, real)
        return (
            np.where(real, ids, 0).astype(np.int64),
            np.where(real, weights, np.float32(0)),
            counts,
        )

    def _checked_ids(self, tokens: npt.ArrayLike) -> Array:
        ids = checked_array("tokens", tokens)
        if ids.ndim == 1 and self.batch == 1:
            ids = ids[None]
        if ids.ndim != 2 or ids.shape[0] != self.batch or ids.shape[1] < 1:
            raise ShapeError(
                f"tokens have shape {list(np.shape(tokens))}; expected [{self.batch}, T] with T "
                "of 1 or more"
            )
        if ids.dtype.kind not in "iu":
            raise TokenError(f"tokens are {ids.dtype}; expected whole numbers")
        return ids

    def _checked_weights(self, label_weights: npt.ArrayLike | None, real: Array) -> Array:
        """Return the weights [B, T]; those at padding, where `real` is False, may be anything."""
        if label_weights is None:
            return np.ones(real.shape, np.float32)
        weights = checked_numbers("label_weights", label_weights)
        if weights.ndim == 1 and self.batch == 1:
            weights = weights[None]
        if weights.shape != real.shape:
            raise ShapeError(
                f"label_weights have shape {list(weights.shape)}; expected {list(real.shape)}"
            )
        wrong = real & ~(np.isfinite(weights) & (weights >= 0))
        if wrong.any():
            raise TokenError(
                f"label_weights contains {weights[wrong][0]:g}; expected finite numbers of 0 or "
                "more"
            )
        return weights

    def _checked_wanted(
        self, logit_positions: npt.ArrayLike | None, size: int, last_only: bool
    ) -> Array | None:
        """Return the positions whose logits are wanted, [B, P] int64, or None."""
        if logit_positions is None:
            return None
        if last_only:
            raise ConfigError(
                "last_only and logit_positions were both given; each says whose logits to return, "
                "so give only one"
            )
        wanted = checked_array("logit_positions", logit_positions)
        if wanted.dtype.kind not in "iu":
            raise TokenError(f"logit_positions are {wanted.dtype}; expected whole numbers")
        if wanted.ndim == 1 and self.batch == 1:
            wanted = wanted[None]
        if wanted.ndim != 2 or len(wanted) != self.batch or not wanted.size:
            raise ShapeError(
                f"logit_positions have shape {list(wanted.shape)}; expected [{self.batch}, P] with "
                "P of 1 or more"
            )
        if wanted.min() < 0 or wanted.max() >= size:
            raise TokenError(
                f"logit_positions are from {wanted.min()} to {wanted.max()}; expected 0 to "
                f"{size - 1}"
            )
        return wanted.astype(np.int64)

    def _all_in_range(self, ids: Array) -> bool:
        values = ids.ravel().tolist()  # faster than NumPy for one token, see _plain_call
        return min(values) >= 0 and max(values) < self.vocab_size

    def _checked_lengths(self, lengths: npt.ArrayLike | None, size: int) -> list[int]:
        if lengths is None:
            return [size] * self.batch
        counts = checked_array("lengths", lengths)
        if counts.shape != (self.batch,) or not np.issubdtype(counts.dtype, np.integer):
            raise ShapeError(
                f"lengths are {counts.dtype} {list(counts.shape)}; expected {self.batch} whole "
                "numbers"
            )
        if not ((counts >= 0) & (counts <= size)).all():
            raise TokenError(f"lengths are {counts.tolist()}; expected 0 to {size}")
        return [int(count) for count in counts]


def _from(start: list[int], lengths: list[int], values: Array) -> Array:
    """Return the next values of each row, padded with zeros to the longest: [B, N] -> [B, T].

    Args:
      start: Position of each row's first value.
      lengths: Number of values of each row.
      values: [B, N], all values of this `feed`.
    """
    size = max(*lengths, 1)
    if size == values.shape[1]:  # no row has begun
        return values
    columns = np.arange(size)
    found = np.take_along_axis(
        values, np.minimum(np.array(start)[:, None] + columns, values.shape[1] - 1), axis=1
    )
    return np.where(columns < np.array(lengths)[:, None], found, np.zeros((), values.dtype))


def _real_logits(logits: Array, call: Call, lengths: list[int]) -> Array:
    """Return the logits [B, P, V] with zeros at padding."""
    if min(lengths) < call.input_ids.shape[1]:
        padding = call.logit_positions >= call.lengths[:, None]
        logits = np.where(padding[..., None], np.zeros((), logits.dtype), logits)
    return logits


def _is_finite(logits: Array) -> bool:
    # max and min are both NaN if any logit is.
    return math.isfinite(logits.max()) and math.isfinite(logits.min())
