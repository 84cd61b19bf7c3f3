"""Sessions side by side: what is measured when, and what happens when one cannot go on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from fwl_export import state as states
from fwl_export.errors import StateError
from fwl_export.parity.drift import Drift, Pair, measure_drift
from fwl_export.parity.schedule import ROWS, Call, Schedule
from fwl_export.runtimes import Session
from fwl_export.runtimes.base import Call as ModelCall
from fwl_export.runtimes.base import Runner
from fwl_export.state import State, TensorSpec

VOCABULARY = 5
SPECS = [
    TensorSpec("position", (), "int64"),
    TensorSpec("fast.sum", (2,), "float64"),
    TensorSpec("pending.last", (3,), "float64"),
]
TEXT = np.random.default_rng(0).integers(0, VOCABULARY, 300)
PAIR = Pair("found", "right")

Twist = Callable[[int, np.ndarray, State], np.ndarray]


class FakeRunner:
    """A model in a few lines of numpy; `twist(call, logits, state)` may change its results."""

    def __init__(self, twist: Twist) -> None:
        self.twist = twist
        self.calls = 0

    def another(self) -> Runner:
        raise NotImplementedError

    def new_buffers(self, batch: int) -> dict[str, Any]:
        return states.zeros(SPECS, batch)

    def run(self, call: ModelCall, past: Any, present: Any) -> np.ndarray:
        input_ids, label_weights, lengths = call.input_ids, call.label_weights, call.lengths
        logits = np.eye(VOCABULARY)[input_ids] + past["fast.sum"][:, None, :1]
        row = np.arange(len(lengths))
        last = np.where(lengths > 0, input_ids[row, np.maximum(lengths - 1, 0)], -1.0)
        state = {
            "position": past["position"] + lengths,
            "fast.sum": past["fast.sum"] + label_weights.sum(1)[:, None],
            "pending.last": np.repeat(last[:, None], 3, 1),
        }
        logits = self.twist(self.calls, logits, state)
        present.update(state)
        self.calls += 1
        return logits

    def read(self, buffers: dict[str, Any], rows: Sequence[int]) -> State:
        return {name: value[list(rows)] for name, value in buffers.items()}

    def write(self, buffers: dict[str, Any], state: Mapping[str, Any], rows: Sequence[int]) -> None:
        for name, value in buffers.items():
            value[list(rows)] = state[name]

    def release(self, buffers: dict[str, Any]) -> None:
        pass


def fake(twist: Twist = lambda call, logits, state: logits, batch: int = ROWS) -> Session:
    return Session(FakeRunner(twist), SPECS, VOCABULARY, 16, batch)


def drift_of(twist: Twist, tokens: int = 100) -> Drift:
    sessions = {"right": fake(), "found": fake(twist)}
    return measure_drift(sessions, [PAIR], Schedule(TEXT, tokens, 16))


def calls(tokens: int = 100) -> list[Call]:
    return list(Schedule(TEXT, tokens, 16))


def test_equal_sessions_do_not_differ_anywhere() -> None:
    drift = drift_of(lambda call, logits, state: logits)
    assert drift.failures == {}
    assert drift.calls == len(calls())
    assert drift.largest_call == 16
    assert drift.depths == [call.depth for call in calls() if call.compare_state]
    assert list(drift.pairs[PAIR].errors) == ["logits", "position", "fast.sum", "pending.last"]
    for errors in drift.pairs[PAIR].errors.values():
        assert len(errors) == len(drift.depths)
        assert all(error.max_abs == error.relative_rms == 0 for error in errors)
    assert sum(p.tokens for p in drift.pairs[PAIR].predictions) == sum(
        int(call.lengths.sum()) for call in calls()
    )


def test_the_advance_adds_up_to_the_tokens() -> None:
    moved: list[int] = []
    sessions = {"right": fake(), "found": fake()}
    measure_drift(sessions, [PAIR], Schedule(TEXT, 100, 16), moved.append)
    assert sum(moved) == 100


def test_a_wrong_logit_is_found_at_its_row_position_and_token() -> None:
    chosen = next(c for c in calls() if c.step > 20 and c.lengths[2] >= 3)

    def twist(call: int, logits: np.ndarray, state: State) -> np.ndarray:
        if call == chosen.step:
            logits[2, 1, 4] += 0.25
        return logits

    drift = drift_of(twist)
    wrong = [error for error in drift.pairs[PAIR].errors["logits"] if error.max_abs]
    assert [error.max_abs for error in wrong] == [0.25]
    place = wrong[0].worst
    assert place is not None
    assert (place.step, place.depth) == (chosen.step, chosen.depth)
    assert place.index == (2, int(chosen.positions[2]) + 1, 4)
    assert sum(p.kl > 0 for p in drift.pairs[PAIR].predictions) == 1


def test_padding_is_not_compared() -> None:
    lengths = [call.lengths for call in calls()]

    def twist(call: int, logits: np.ndarray, state: State) -> np.ndarray:
        for row, length in enumerate(lengths[call]):
            logits[row, length:] = 1e3
        return logits

    assert any(counts.min() < counts.max() for counts in lengths)
    assert all(error.max_abs == 0 for error in drift_of(twist).pairs[PAIR].errors["logits"])


def test_a_pending_tensor_that_is_wrong_for_one_call_between_depths_is_found() -> None:
    between = next(c.step for c in calls() if c.step > 20 and not c.compare_state)

    def twist(call: int, logits: np.ndarray, state: State) -> np.ndarray:
        if call == between:
            state["pending.last"][1, 2] += 1
        return logits

    errors = drift_of(twist).pairs[PAIR].errors["pending.last"]
    assert sum(error.max_abs == 1 for error in errors) == 1


def test_sessions_run_free_so_that_a_wrong_sum_stays_wrong_until_its_row_is_reset() -> None:
    def twist(call: int, logits: np.ndarray, state: State) -> np.ndarray:
        if call == 3:
            state["fast.sum"][2] += 1
        return logits

    drift = drift_of(twist)
    compared = [call for call in calls() if call.compare_state]
    reset = next(call.step for call in calls() if call.reset)
    expected = [1.0 if 3 <= call.step < reset else 0.0 for call in compared]
    assert [e.max_abs for e in drift.pairs[PAIR].errors["fast.sum"]] == expected
    assert 0 < sum(expected) < len(expected)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_state_that_is_not_finite_ends_with_its_first_step_and_place(value: float) -> None:
    def twist(call: int, logits: np.ndarray, state: State) -> np.ndarray:
        if call >= 7:
            state["fast.sum"][1, 0] = value
        return logits

    drift = drift_of(twist)
    failure = drift.failures["found"]
    assert (failure.step, failure.depth) == (7, calls()[7].depth)
    assert failure.message == f"state 'fast.sum' is {value} in row 1, element [0]"
    assert len(drift.pairs[PAIR].predictions) < len(calls())
    assert drift.calls == 7, "nothing is left to compare"


def test_logits_that_are_not_finite_end_with_the_first_step() -> None:
    def twist(call: int, logits: np.ndarray, state: State) -> np.ndarray:
        if call == 5:
            logits[0, 0, 0] = np.nan
        return logits

    failure = drift_of(twist).failures["found"]
    assert failure.step == 5
    assert "output is not finite at row 0, position 0 of this call" in failure.message


def test_a_runtime_that_dies_is_left_behind_and_the_others_go_on() -> None:
    def die(call: int, logits: np.ndarray, state: State) -> np.ndarray:
        if call == 4:
            raise RuntimeError("out of memory")
        return logits

    sessions = {"right": fake(), "dies": fake(die), "lives": fake()}
    pairs = [Pair("dies", "right"), Pair("lives", "right")]
    drift = measure_drift(sessions, pairs, Schedule(TEXT, 100, 16))
    assert drift.failures["dies"].message == "out of memory"
    assert list(drift.failures) == ["dies"]
    assert len(drift.pairs[pairs[1]].predictions) == len(drift.depths)
    assert len(drift.pairs[pairs[0]].predictions) < len(drift.depths)


def test_a_reference_that_dies_ends_the_run() -> None:
    def die(call: int, logits: np.ndarray, state: State) -> np.ndarray:
        raise RuntimeError

    sessions = {"right": fake(die), "found": fake()}
    drift = measure_drift(sessions, [PAIR], Schedule(TEXT, 100, 16))
    assert drift.failures["right"].message == "RuntimeError"
    assert drift.calls == 0


def test_logits_of_another_shape_are_a_failure() -> None:
    failure = drift_of(lambda call, logits, state: logits[..., :-1]).failures["found"]
    assert "logits have shape [3, 1, 4]; expected [3, 1, 5]" in failure.message


def test_sessions_of_different_models_or_sizes_are_refused() -> None:
    other = Session(FakeRunner(lambda c, x, s: x), SPECS[:2], VOCABULARY, 16, ROWS)
    for wrong, name in ((other, "pending.last"), (fake(batch=2), "position")):
        with pytest.raises(StateError, match=f"state '{name}' is .* in found, but .* in right"):
            measure_drift({"right": fake(), "found": wrong}, [PAIR], [])
