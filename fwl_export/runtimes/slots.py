"""Continuous batching: texts come and go in the rows of one session while others continue."""

from __future__ import annotations

import threading
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from fwl_export.bundle.state import Array, State
from fwl_export.errors import NotFiniteError, ShapeError, TokenError
from fwl_export.runtimes.arguments import checked_array, checked_numbers, shown, whole_number
from fwl_export.runtimes.session import Session


class Slots:
    """Slots for independent texts in the rows of one session (continuous batching).

        session = open_session("demo-bundle", batch=8)
        slots = Slots(session)
        slot = slots.add()
        logits = slots.feed({slot: prompt_ids})[slot]  # [V]: what may follow the prompt
        state = slots.remove(slot)  # to continue later: slots.add(state)

    A slot is the number of a row that the caller holds. Slots that a call does not name stay as
    they are. Threads may share a `Slots` object: its methods run one at a time.

    Attributes:
      session: The session whose rows are handed out.
    """

    def __init__(self, session: Session) -> None:
        """Take over a session.

        Args:
          session: Session with one row for each slot. As long as the `Slots` object lives, it
            refuses to feed, or to write, rows that are free here.

        Raises:
          ShapeError: Other `Slots` hand out the session's rows.
        """
        session.hand_over(self)
        self.session = session
        self._lock = threading.RLock()
        self._free = list(range(session.batch))

    def __repr__(self) -> str:
        used = self.used
        shown = ", ".join(map(str, used[:8])) + (", ..." if len(used) > 8 else "")
        return f"<Slots: {len(used)} of {self.session.batch} in use: [{shown}]>"

    @property
    def used(self) -> list[int]:
        """Slots in use, in ascending order."""
        return sorted(set(range(self.session.batch)) - set(self._free))

    @property
    def free_rows(self) -> set[int]:
        """Slots that are not in use."""
        return set(self._free)

    def add(self, state: State | None = None) -> int:
        """Take a free slot into use.

        Args:
          state: State of one row, as `remove` returns it: the slot continues from there. None
            starts afresh.

        Returns:
          Number of the slot, 0 to B - 1; it is the session's row too.

        Raises:
          ShapeError: All slots are in use.
          StateError: The state does not fit the model, or has NaN or infinite values. The slot
            stays free.
        """
        with self._lock:
            return self._take(1, state)[0]

    def fork(self, slot: int, count: int | None = None) -> list[int]:
        """Take free slots into use that continue from where another slot stands.

            first, second = slots.fork(document, 2)  # one document, two questions

        The slot itself stays as it is. The copies share nothing with it from then on; the
        learning-rate scale belongs to the row, and is not copied.

        Args:
          slot: Slot in use to copy.
          count: Number of copies, 1 or more; None takes all free slots.

        Returns:
          Numbers of the new slots, in ascending order.

        Raises:
          ShapeError: The slot is not in use, or there are not as many free slots; nothing has
            changed.
        """
        with self._lock:
            self._check(slot)
            number = len(self._free) or 1 if count is None else whole_number(count)
            if number is None or number < 1:
                raise ShapeError(f"count is {shown(count)}; expected 1 or more copies, or None")
            if not 0 < number <= len(self._free):
                raise ShapeError(
                    f"there are {len(self._free)} free slots for {number} copies of slot {slot}; "
                    "remove some, or open the session with a larger batch"
                )
            state = self.session.read_rows([slot])
            return self._take(number, {n: np.repeat(a, number, 0) for n, a in state.items()})

    def _take(self, count: int, state: State | None) -> list[int]:
        """Take free slots into use, fresh or with the rows of a state; none if that fails."""
        if count > len(self._free):
            raise ShapeError(
                f"all {self.session.batch} slots are in use; remove one, or open the session "
                "with a larger batch"
            )
        before = list(self._free)
        taken, self._free = sorted(before[:count]), before[count:]
        try:
            if state is None:
                self.session.reset(taken)
            else:
                self.session.write_rows(taken, state)
        except BaseException:
            self._free = before
            raise
        return taken

    def remove(self, slot: int) -> State:
        """Free a slot, and return its state so that its text can continue later.

        Args:
          slot: Slot in use.

        Returns:
          Arrays [1, ...] by name, a copy.

        Raises:
          ShapeError: The slot is not in use.
        """
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
        """Read the next tokens of some slots, in one batch; the other slots do not move.

        A call takes as long as its longest read. Feed long prompts in parts, so that they do not
        hold up others.

        Args:
          tokens: Token ids [T] of each slot to move, by slot; T is 1 or more and may differ.
          label_weights: How much to learn from each token, [T] or one number, by slot; see
            `Session.feed`. Slots that are missing here take 1; slots that `tokens` does not name
            are an error.

        Returns:
          Logits [V] float32 after each slot's last token, by slot.

        Raises:
          ShapeError: A slot is not in use, a shape does not fit, or no slot is named.
          TokenError: A token id or weight is out of range, or a slot would have learned too much;
            see `Session.feed`. No slot has moved.
        """
        with self._lock:
            return self._feed(tokens, label_weights)

    def _feed(
        self,
        tokens: Mapping[int, npt.ArrayLike],
        label_weights: Mapping[int, npt.ArrayLike] | None,
    ) -> dict[int, Array]:
        chosen = {} if label_weights is None else label_weights
        for name, value in (("tokens", tokens), ("label_weights", chosen)):
            if not isinstance(value, Mapping):
                raise ShapeError(f"{name} is {shown(value)}; expected a mapping by slot")
        given = {slot: self._checked_ids(slot, ids) for slot, ids in tokens.items()}
        if not given:
            raise ShapeError("tokens is empty; expected token ids for at least one slot")
        if others := set(chosen) - set(given):
            raise ShapeError(f"label_weights names {shown(others)}, but tokens does not")
        shape = (self.session.batch, max(map(len, given.values())))
        batch, weights = np.zeros(shape, np.int64), np.zeros(shape, np.float32)
        lengths = np.zeros(shape[0], np.int64)
        for slot, ids in given.items():
            batch[slot, : len(ids)], lengths[slot] = ids, len(ids)
            weight = checked_numbers("label_weights", chosen.get(slot, 1.0))
            if weight.shape not in ((), ids.shape):
                raise ShapeError(
                    f"label_weights of slot {slot} have shape {list(weight.shape)}; expected "
                    f"{list(ids.shape)}"
                )
            weights[slot, : len(ids)] = weight
        try:
            logits = self.session.feed(batch, weights, lengths, last_only=True)
        except NotFiniteError as error:
            error.args = (f"slot {error.row}: {error}",)
            raise
        return {slot: logits[slot] for slot in given}

    def _checked_ids(self, slot: int, tokens: npt.ArrayLike) -> Array:
        self._check(slot)
        ids = checked_array(f"tokens of slot {slot}", tokens)
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
        number = whole_number(slot)
        if number is None or number in self._free or not 0 <= number < self.session.batch:
            raise ShapeError(f"slot {shown(slot)} is not in use; those in use are {self.used}")
