"""Name a fault around the graph: in the session, or in the state that it carries.

Here every node of the graph is right when it is given correct inputs, and yet the call went wrong.
So the call is made again with one thing changed, until it is right.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from fwl_export.bisect.finding import ISOLATION, ROWS, SELECTION, STATE, UNREPEATABLE
from fwl_export.bisect.steps import LOGITS, Suspect, made_by
from fwl_export.bundle.manifest import Bundle
from fwl_export.bundle.state import State
from fwl_export.parity.schedule import ScheduledCall
from fwl_export.runtimes import Session, open_session

_RIGHT = "every node is right when given correct inputs; "


class Named(NamedTuple):
    """A fault around the graph.

    Attributes:
      kind: Kind of the finding.
      tensor: Name of the tensor that shows it.
      note: Explanation in words.
    """

    kind: str
    tensor: str
    note: str


@dataclass(frozen=True)
class Around:
    """The search around the graph.

    Attributes:
      bundle: Bundle under check.
      session: Session of the candidate with as many rows as the call; others are opened like it.
      suspect: Call that went wrong.
    """

    bundle: Bundle
    session: Session
    suspect: Suspect

    def find(self) -> Named:
        """Return the most specific explanation."""
        found = self._wrong_rows() or self._wrong_state() or self._stale_state()
        return (
            found or self._unrepeatable() or self._selection() or self._isolation() or self._any()
        )

    @property
    def _call(self) -> ScheduledCall:
        return self.suspect.expected.call

    @property
    def _first(self) -> str:
        """Name of the first state tensor that is wrong, or of the logits."""
        return next((n for n in self.suspect.outside if n != LOGITS), LOGITS)

    def _wrong_rows(self) -> Named | None:
        if not self.suspect.before_the_call:
            return None
        call = self._call
        done = [
            f"row{'s' * (len(call.reset) > 1)} {_listed(call.reset)} reset" if call.reset else "",
            *(f"row {source} copied to row {target}" for source, target in call.forks),
            *(f"row {row} moved to position {position}" for row, position in call.moves),
        ]
        what = ", ".join(part for part in done if part)
        wrong = self.suspect.failure or f"the session then held another '{self._first}'"
        return Named(ROWS, self._first, f"before the call, {what}; {wrong}")

    def _wrong_state(self) -> Named | None:
        """Name the one state tensor that is wrong after a call from the right state."""
        outside = list(self.suspect.outside)
        if not self.suspect.teacher_forced or len(outside) != 1 or outside[0] == LOGITS:
            return None
        note = f"{_RIGHT}the model returns the right state, but the session holds another one"
        if self._is_right_again():
            note += "; made again from the same state, the call is right"
        return Named(STATE, outside[0], note)

    def _stale_state(self) -> Named | None:
        """Name the state tensor that, read one call late, explains the outputs."""
        earlier, past = self.suspect.earlier, self.suspect.expected.past
        if earlier is None or not self.suspect.outside:
            return None
        rows = len(self._call.ids)
        reference = open_session(self.bundle, "torch", rows, "fp64")
        for name in past:
            if np.array_equal(earlier[name], past[name]) or name == "position":
                continue
            reference.state = {**past, name: earlier[name]}
            outputs = made_by(reference, self._call)
            if not self._outside(self.suspect.found, outputs):
                note = f"{_RIGHT}the call read '{name}' as it was one call earlier"
                return Named(STATE, name, note)
        return None

    def _outside(self, found: State, expected: State) -> bool:
        """Return whether outputs that were wrong are still wrong."""
        names = self.suspect.outside
        judge, forced = self.suspect.judge, self.suspect.teacher_forced
        chosen = {name: expected[name] for name in names}
        return bool(judge.outside(found, chosen, self._call.tokens_read, forced))

    def _made(self, session: Session, call: ScheduledCall, state: State) -> State | None:
        """Make a call from a state; returns the outputs, or None if the session raises."""
        try:
            session.state = state
            return made_by(session, call)
        except Exception:  # runtimes raise exceptions of any type
            return None

    def _is_right_again(self) -> bool:
        """Return whether the same call is right when another session makes it."""
        again = self.session.another(self.session.batch)
        found = self._made(again, self._call, self.suspect.carried)
        return found is not None and not self._outside(found, self.suspect.expected.outputs)

    def _unrepeatable(self) -> Named | None:
        if not self.suspect.outside or not self._is_right_again():
            return None
        note = (
            f"{_RIGHT}and made again from the same state in another session, the call is right: "
            "its result depends on something else than its inputs"
        )
        return Named(UNREPEATABLE, self._first, note)

    def _selection(self) -> Named | None:
        """Ask for all logits and take the wanted ones from them."""
        call = self._call
        if list(self.suspect.outside) != [LOGITS]:
            return None
        whole = replace(call, last_only=False, logit_positions=None)
        again = self.session.another(self.session.batch)
        found = self._made(again, whole, self.suspect.carried)
        if found is None:
            return None
        wanted = np.take_along_axis(found[LOGITS], call.wanted[..., None], 1)
        real = call.wanted < call.lengths[:, None]
        wanted = np.where(real[..., None], wanted, 0)
        if self._outside({**found, LOGITS: wanted}, self.suspect.expected.outputs):
            return None
        which = "the last" if call.last_only else "some"
        note = (
            f"{_RIGHT}the logits are right when all are asked for, and wrong when {which} are: "
            "the session returns those of other positions"
        )
        return Named(SELECTION, LOGITS, note)

    def _isolation(self) -> Named | None:
        """Make the call with one row alone."""
        rows = range(len(self._call.ids))
        if len(rows) == 1 or not self.suspect.outside:
            return None
        wrong = [row for row in rows if self._row_is_wrong(row, self.suspect.found)]
        alone = self.session.another(1)
        for row in wrong:
            state = {name: array[row : row + 1] for name, array in self.suspect.carried.items()}
            found = self._made(alone, _only(self._call, row), state)
            if found is None or self._row_is_wrong(row, found, alone=True):
                return None
        if not wrong:
            return None
        note = (
            f"{_RIGHT}row{'s' * (len(wrong) > 1)} {_listed(wrong)} of {len(rows)} went wrong, and "
            "alone in a session each is right"
        )
        return Named(ISOLATION, self._first, note)

    def _row_is_wrong(self, row: int, found: State, alone: bool = False) -> bool:
        place = slice(row, row + 1)
        expected = {n: array[place] for n, array in self.suspect.expected.outputs.items()}
        return self._outside(
            found if alone else {name: array[place] for name, array in found.items()}, expected
        )

    def _any(self) -> Named:
        note = _RIGHT
        if self.suspect.failure:
            note += f"but the session raised: {self.suspect.failure}"
        elif self.suspect.teacher_forced:
            note += "from the same inputs and state, the session returns something else"
        else:
            note += "the error builds up in the state that is carried from call to call"
        return Named(STATE, self._first, note)


def _only(call: ScheduledCall, row: int) -> ScheduledCall:
    """Return the call with one row."""
    one = slice(row, row + 1)
    wanted = None if call.logit_positions is None else call.logit_positions[one]
    return replace(
        call,
        ids=call.ids[one],
        weights=call.weights[one],
        lengths=call.lengths[one],
        scale=call.scale[one],
        labels=call.labels[one],
        logit_positions=wanted,
    )


def _listed(rows: Sequence[int]) -> str:
    return ", ".join(str(row) for row in rows)
