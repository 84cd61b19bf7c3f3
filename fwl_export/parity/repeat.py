"""Make the same calls again, beside another session: results must not depend on when they ran."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from fwl_export.bundle.state import Array, State
from fwl_export.parity.compare import Error, TensorSum
from fwl_export.parity.schedule import ScheduledCall
from fwl_export.runtimes import Session

LOGITS = "logits"


class Difference(NamedTuple):
    """A tensor that differs between two readings of the same calls.

    Attributes:
      tensor: Name of the tensor, "logits" or one of the state.
      step: Number of the call; for the state, of the last one.
      error: Distance of the second reading from the first.
    """

    tensor: str
    step: int
    error: Error


def differences(session: Session, calls: Iterable[ScheduledCall]) -> Iterator[Difference]:
    """Yield what differs when a session's runtime reads the same calls twice.

    The second time, another session on the same loaded model reads other tokens at the same time,
    so a buffer that the two share shows, too.

    Args:
      session: Session of the runtime; others are opened like it.
      calls: Calls to make.
    """
    made = list(calls)
    rows = len(made[0].ids)
    first = _read(session.another(rows), made)
    # Made before the threads start: opening a session may write to what sessions share.
    again, other = session.another(rows), session.another(rows)
    backwards = [replace(call, ids=call.ids[:, ::-1].copy()) for call in made]
    with ThreadPoolExecutor(1) as beside:
        reading = beside.submit(_read, other, backwards)
        second = _read(again, made)
        reading.result()
    for call, one, two in zip(made, first.logits, second.logits, strict=True):
        yield from _difference(LOGITS, call.step, one, two)
    for name, array in first.state.items():
        yield from _difference(name, made[-1].step, array, second.state[name])


class _Reading(NamedTuple):
    logits: list[Array]
    state: State


def _read(session: Session, calls: Iterable[ScheduledCall]) -> _Reading:
    logits = []
    for call in calls:
        call.prepare(session)
        logits.append(call.feed(session))
    return _Reading(logits, session.state)


def _difference(name: str, step: int, first: Array, second: Array) -> Iterator[Difference]:
    if np.array_equal(first, second):
        return
    total = TensorSum(len(first))
    for row in range(len(first)):
        total.add(row, second[row], first[row], step)
    yield Difference(name, step, total.result())
