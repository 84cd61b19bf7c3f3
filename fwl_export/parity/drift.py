"""Drive sessions side by side over a schedule and measure how far they drift apart.

Every session carries its own state from the first call to the last (free running), so what a
runtime gets wrong once goes on to act on everything after it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fwl_export.errors import StateError
from fwl_export.parity.compare import Error, Prediction, PredictionSum, TensorSum
from fwl_export.parity.schedule import Call
from fwl_export.runtimes import Session
from fwl_export.state import State

Array = npt.NDArray[Any]

LOGITS = "logits"

# Every call writes these anew: what is wrong after one call may be gone after the next, so they
# are compared after each. Caches and sums remember; they are compared at the depths.
_COMPARED_EVERY_CALL = ("position", "pending.")


class Pair(NamedTuple):
    """Names of two runtimes, the second of which counts as right."""

    candidate: str
    reference: str


@dataclass(frozen=True)
class Failure:
    """A runtime that could not go on.

    Attributes:
      runtime: its name.
      step: number of the call.
      depth: tokens the first row would have read after that call.
      message: what happened.
    """

    runtime: str
    step: int
    depth: int
    message: str


@dataclass
class PairDrift:
    """How far a candidate is from a reference, at one depth after the other.

    Attributes:
      errors: by tensor, "logits" first, one entry per depth. Logits, position and pending tensors
        are compared after every call, and an entry is over all since the depth before; the rest
        of the state is compared at the depth.
      predictions: of all calls since the depth before.
    """

    errors: dict[str, list[Error]] = field(default_factory=dict)
    predictions: list[Prediction] = field(default_factory=list)


@dataclass
class Drift:
    """What a run over a schedule measured.

    Attributes:
      depths: tokens the first row had read where the state was compared.
      pairs: the measurements of each pair; shorter than `depths` if one of the two failed.
      failures: by name of the runtime.
      calls: number of calls.
      largest_call: the largest T among them.
    """

    depths: list[int] = field(default_factory=list)
    pairs: dict[Pair, PairDrift] = field(default_factory=dict)
    failures: dict[str, Failure] = field(default_factory=dict)
    calls: int = 0
    largest_call: int = 0


def measure_drift(
    sessions: Mapping[str, Session],
    pairs: Sequence[Pair],
    calls: Iterable[Call],
    advance: Callable[[int], None] = lambda tokens: None,
) -> Drift:
    """Feed every session the same calls and compare logits and states.

    A session that raises, or whose output or state is not finite, is left behind with a
    `Failure`; the others go on while there is something to compare, apart from references with
    one another.

    Args:
      sessions: fresh, by name, of as many rows as the calls.
      pairs: which to compare with which.
      calls: e.g. a `Schedule`.
      advance: called with the number of tokens the first row has moved, for a progress bar.

    Raises:
      StateError: the sessions of a pair have other states, hence are of two models.
    """
    for pair in pairs:
        _check_pair(pair, sessions)
    drift = Drift(pairs={pair: PairDrift() for pair in pairs})
    references = {pair.reference for pair in pairs}
    since: dict[Pair, _Since] = {}
    depth = 0
    for call in calls:
        outputs = _feed_all(sessions, call, drift.failures)
        alive = [pair for pair in pairs if pair.candidate in outputs and pair.reference in outputs]
        if all(pair.candidate in references for pair in alive):
            break
        for pair in alive:
            sums = since.setdefault(pair, _Since(sessions[pair.reference]))
            sums.add(outputs[pair.candidate], outputs[pair.reference], call)
            if call.compare_state:
                since.pop(pair).finish(drift.pairs[pair])
        if call.compare_state:
            drift.depths.append(call.depth)
        drift.calls += 1
        drift.largest_call = max(drift.largest_call, call.ids.shape[1])
        advance(call.depth - depth)
        depth = call.depth
    return drift


class _Output(NamedTuple):
    """What one call of one session returned: logits [B, T, V] and the state after it."""

    logits: Array
    state: State


class _Since:
    """What the differences of a pair add up to since the last depth."""

    def __init__(self, session: Session) -> None:
        names = [LOGITS, *(spec.name for spec in session.specs)]
        self._tensors = {name: TensorSum(session.batch) for name in names}
        self._predictions = PredictionSum()

    def add(self, candidate: _Output, reference: _Output, call: Call) -> None:
        at = (call.step, call.depth)
        for row, length in enumerate(call.lengths):
            real = (row, slice(0, int(length)))
            found, expected = candidate.logits[real], reference.logits[real]
            place = int(call.positions[row])
            self._tensors[LOGITS].add(row, found, expected, *at, offset=place)
            self._predictions.add(found, expected, call.labels[real])
            for name, tensor in reference.state.items():
                if call.compare_state or name.startswith(_COMPARED_EVERY_CALL):
                    self._tensors[name].add(row, candidate.state[name][row], tensor[row], *at)

    def finish(self, drift: PairDrift) -> None:
        for name, total in self._tensors.items():
            drift.errors.setdefault(name, []).append(total.result())
        drift.predictions.append(self._predictions.result())


def _check_pair(pair: Pair, sessions: Mapping[str, Session]) -> None:
    found, expected = (
        {spec.name: (session.batch, *spec.shape) for spec in session.specs}
        for session in (sessions[pair.candidate], sessions[pair.reference])
    )
    if found == expected:
        return
    name = next(n for n in {**expected, **found} if found.get(n) != expected.get(n))
    raise StateError(
        f"state '{name}' is {found.get(name)} in {pair.candidate}, but {expected.get(name)} in "
        f"{pair.reference}; compare runtimes of one bundle, with equally many rows"
    )


def _feed_all(
    sessions: Mapping[str, Session], call: Call, failures: dict[str, Failure]
) -> dict[str, _Output]:
    """Feed the sessions that have not failed; one that fails now is added to `failures`."""
    outputs: dict[str, _Output] = {}
    for name, session in sessions.items():
        if name not in failures:
            output = _feed(session, call)
            if isinstance(output, str):
                failures[name] = Failure(name, call.step, call.depth, output)
            else:
                outputs[name] = output
    return outputs


def _feed(session: Session, call: Call) -> _Output | str:
    """Return what a session made of a call, or what went wrong."""
    try:
        if call.reset:
            session.reset(call.reset)
        output = _Output(session.feed(call.ids, call.weights, call.lengths), session.state)
    except Exception as error:  # a backend may raise anything; the others go on without it
        return str(error) or type(error).__name__
    expected = (*call.ids.shape, session.vocab_size)
    if output.logits.shape != expected:
        return f"logits have shape {list(output.logits.shape)}; expected {list(expected)}"
    return _not_finite(output.state) or output


def _not_finite(state: State) -> str:
    for name, array in state.items():
        if not np.isfinite(array).all():
            row, *index = np.argwhere(~np.isfinite(array))[0].tolist()
            value = array[(row, *index)]
            return f"state '{name}' is {value} in row {row}, element {index}"
    return ""
