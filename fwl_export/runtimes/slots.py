"""Continuous batching: rows of a session that come and go while the others go on reading."""

from __future__ import annotations

import threading
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from fwl_export.bundle.state import Array, State
from fwl_export.errors import ShapeError, TokenError
from fwl_export.runtimes.session import Session


class Slots:
    """A session's rows, handed out and taken back.

    session = open_session("bundle", batch=8)
    slots = Slots(session)
    slot = slots.add()
    logits = slots.feed({slot: prompt_ids})[slot]

    Several threads may use it, as they may use the session.
    """

    def __init__(self, session: Session) -> None:
        """Take over a session; nobody else should use its rows."""
        self.session = session
        self._lock = threading.RLock()
        self._free = list(range(session.batch))

    def __repr__(self) -> str:
        used = self.used
        shown = ", ".join(map(str, used[:8])) + (", ..." if len(used) > 8 else "")
        return f"<Slots: {len(used)} of {self.session.batch} in use: [{shown}]>"

    @property
    def used(self) -> list[int]:
        """The slots that were handed out."""
        return sorted(set(range(self.session.batch)) - set(self._free))

    def add(self, state: State | None = None) -> int:
        """Hand out a slot: a fresh one, or one that goes on from the state of one row.

        Raises:
          ShapeError: all slots are in use.
          StateError: the state does not fit the model.
        """
        with self._lock:
            if not self._free:
                raise ShapeError(
                    f"all {self.session.batch} slots are in use; remove one, or open the session "
                    "with a larger batch"
                )
            slot = self._free[0]
            if state is None:
                self.session.reset([slot])
            else:
                self.session.write_rows([slot], state)
            return self._free.pop(0)

    def remove(self, slot: int) -> State:
        """Take a slot back; returns its state, to be saved or added again later."""
        with self._lock:
            self._check(slot)
            state = self.session.read_rows([slot])
            self._free.append(slot)
            return state

    def feed(
        self,
        tokens: Mapping[int, npt.ArrayLike],
        label_weights: Mapping[int, npt.ArrayLike] | None = None,
    ) -> dict[int, Array]:
        """Read the next tokens of some slots; the others do not move.

        Args:
          tokens: by slot, [T] ids each; T may differ.
          label_weights: by slot, [T]; see `Session.feed`. Default: 1.

        Returns:
          The prediction after each slot's last token, by slot: [V] float32.

        Raises:
          ShapeError: a slot was not handed out, or a shape does not fit.
          TokenError: see `Session.feed`.
        """
        with self._lock:
            return self._feed(tokens, label_weights)

    def _feed(
        self,
        tokens: Mapping[int, npt.ArrayLike],
        label_weights: Mapping[int, npt.ArrayLike] | None,
    ) -> dict[int, Array]:
        given = {slot: self._checked_ids(slot, ids) for slot, ids in tokens.items()}
        if not given:
            raise ShapeError("no slot was given tokens")
        shape = (self.session.batch, max(map(len, given.values())))
        batch, weights = np.zeros(shape, np.int64), np.zeros(shape, np.float32)
        lengths = np.zeros(shape[0], np.int64)
        for slot, ids in given.items():
            batch[slot, : len(ids)], lengths[slot] = ids, len(ids)
            weight = np.asarray(1.0 if label_weights is None else label_weights.get(slot, 1.0))
            if weight.shape not in ((), ids.shape):
                raise ShapeError(
                    f"label_weights of slot {slot} have shape {list(weight.shape)}; expected "
                    f"{list(ids.shape)}"
                )
            weights[slot, : len(ids)] = weight
        logits = self.session.feed(batch, weights, lengths, last_only=True)
        return {slot: logits[slot] for slot in given}

    def _checked_ids(self, slot: int, tokens: npt.ArrayLike) -> Array:
        ids = np.asarray(tokens)
        self._check(slot)
        if ids.ndim != 1 or not len(ids):
            raise ShapeError(f"tokens of slot {slot} have shape {list(ids.shape)}; expected [T]")
        # Checked per slot, since dtypes differ: an id beyond int64 would not fit the batch.
        if ids.dtype.kind not in "iu":
            raise TokenError(f"tokens of slot {slot} are {ids.dtype}; expected whole numbers")
        if ids.max() >= self.session.vocab_size:
            raise TokenError(
                f"token id {ids.max()} of slot {slot} is out of range; expected 0 to "
                f"{self.session.vocab_size - 1}"
            )
        return ids

    def _check(self, slot: int) -> None:
        if slot in self._free or not 0 <= slot < self.session.batch:
            raise ShapeError(f"slot {slot} is not in use; those in use are {self.used}")
