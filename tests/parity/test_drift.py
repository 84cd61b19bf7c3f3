"""Sessions side by side: what is measured at which point, and what happens if one fails."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fwl_export.bundle import state as states
from fwl_export.bundle.state import State, TensorSpec
from fwl_export.parity.drift import (
    FREE_RUNNING,
    TEACHER_FORCED,
    Drift,
    RunDrift,
    RunKey,
    measure_drift,
)
from fwl_export.parity.schedule import ROWS, Schedule, ScheduledCall
from fwl_export.runtimes import Session, SessionSpec
from fwl_export.runtimes.base import Call, Rows, Runner, index

VOCABULARY = 5
SPECS = [
    TensorSpec("position", (), "int64"),
    TensorSpec("fast.sum", (2,), "float64"),
    TensorSpec("pending.last", (3,), "float64"),
]
TEXT = np.random.default_rng(0).integers(0, VOCABULARY, 300)

Twist = Callable[[int, np.ndarray, State], np.ndarray]


class FakeRunner:
    """A fake model in numpy. `twist(call, logits, state)` may change its results."""

    def __init__(self, twist: Twist) -> None:
        self.twist = twist
        self.calls = 0

    def another(self) -> Runner:
        return FakeRunner(self.twist)

    def new_buffers(self, batch: int) -> dict[str, Any]:
        return states.zeros(SPECS, batch)

    def run(self, call: Call, past: Any, present: Any) -> np.ndarray:
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
        return np.take_along_axis(logits, call.logit_positions[..., None], 1)

    def read(self, buffers: dict[str, Any], rows: Rows) -> State:
        return {name: value[index(rows)] for name, value in buffers.items()}

    def write(self, buffers: dict[str, Any], state: Mapping[str, Any], rows: Sequence[int]) -> None:
        for name, value in buffers.items():
            value[list(rows)] = state[name]

    def release(self, buffers: dict[str, Any]) -> None:
        pass


def fake(twist: Twist = lambda call, logits, state: logits, batch: int = ROWS) -> Session:
    return Session(FakeRunner(twist), SessionSpec(SPECS, VOCABULARY, 16), batch)


def drift_of(twist: Twist, tokens: int = 100) -> Drift:
    return measure_drift(("right", fake()), {"found": fake(twist)}, calls(tokens))


def run_of(drift: Drift, mode: str = FREE_RUNNING, name: str = "found") -> RunDrift:
    return drift.runs[RunKey(name, mode)]


def calls(tokens: int = 100) -> list[ScheduledCall]:
    """Return calls which teacher-forced sessions make too, so that both modes count alike."""
    return [replace(call, forced=True) for call in Schedule(TEXT, tokens, 16)]


def test_equal_sessions_do_not_differ_anywhere() -> None:
    drift = drift_of(lambda call, logits, state: logits)
    assert drift.failure is None
    assert drift.calls == len(calls())
    assert drift.largest_call == 16
    for mode in (FREE_RUNNING, TEACHER_FORCED):
        found = run_of(drift, mode)
        assert found.failure is None
        assert found.tokens_read == [call.tokens_read for call in calls() if call.compare_state]
        assert list(found.errors) == ["logits", "position", "fast.sum", "pending.last"]
        for errors in found.errors.values():
            assert len(errors) == len(found.tokens_read)
            assert all(error.max_abs == error.relative_rms == 0 for error in errors)
        tokens = sum(int((call.wanted < call.lengths[:, None]).sum()) for call in calls())
        assert sum(p.tokens for p in found.predictions) == tokens
        assert found.ulp["logits"].tolist()[0] == tokens * VOCABULARY
        assert "position" not in found.ulp


def test_teacher_forced_sessions_make_the_calls_that_say_so() -> None:
    planned = list(Schedule(TEXT, 100, 16))
    drift = measure_drift(("right", fake()), {"found": fake()}, planned)
    chosen = [call for call in planned if call.forced]
    assert 0 < len(chosen) < len(planned)
    assert all(call.forced for call in planned if call.compare_state)
    tokens = sum(int((call.wanted < call.lengths[:, None]).sum()) for call in chosen)
    assert sum(p.tokens for p in run_of(drift, TEACHER_FORCED).predictions) == tokens
    assert run_of(drift, TEACHER_FORCED).tokens_read == run_of(drift).tokens_read


def test_rows_are_reset_copied_and_moved_in_every_session_before_a_call() -> None:
    call = calls()[0]
    planned = [
        call,
        replace(call, step=1, reset=(0,), forks=((1, 2),), moves=((1, 4000),), tokens_read=20),
    ]
    seen: list[Sequence[int]] = []
    drift = measure_drift(
        ("right", fake()),
        {"found": fake()},
        [replace(c, compare_state=True) for c in planned],
        observe=lambda call, before: seen.append(before),
    )
    read = call.lengths.tolist()
    assert seen == [[0, 0, 0], [0, 4000, read[1]]]
    for mode in (FREE_RUNNING, TEACHER_FORCED):
        assert all(error.max_abs == 0 for error in run_of(drift, mode).errors["position"])


def test_the_advance_adds_up_to_the_tokens() -> None:
    moved: list[int] = []
    measure_drift(("right", fake()), {"found": fake()}, calls(), advance=moved.append)
    assert sum(moved) == 100


def test_a_wrong_logit_is_found_at_its_row_position_and_token() -> None:
    chosen = next(
        c for c in calls() if c.step > 8 and c.lengths[2] >= 3 and (c.wanted[2] == 1).any()
    )

    def twist(call: int, logits: np.ndarray, state: State) -> np.ndarray:
        if call == chosen.step:
            logits[2, 1, 4] += 0.25
        return logits

    drift = drift_of(twist)
    wrong = [error for error in run_of(drift).errors["logits"] if error.max_abs]
    assert [error.max_abs for error in wrong] == [0.25]
    place = wrong[0].worst
    assert place is not None
    assert (place.step, place.tokens_read) == (chosen.step, chosen.tokens_read)
    assert place.index == (2, int(chosen.positions[2]) + 1, 4)
    assert sum(p.kl > 0 for p in run_of(drift).predictions) == 1


def test_padding_is_not_compared() -> None:
    lengths = [call.lengths for call in calls()]

    def twist(call: int, logits: np.ndarray, state: State) -> np.ndarray:
        for row, length in enumerate(lengths[call]):
            logits[row, length:] = 1e3
        return logits

    assert any(counts.min() < counts.max() for counts in lengths)
    assert all(error.max_abs == 0 for error in run_of(drift_of(twist)).errors["logits"])


def test_a_pending_tensor_that_is_wrong_for_one_call_between_points_is_found() -> None:
    between = next(c.step for c in calls() if c.step > 8 and not c.compare_state)

    def twist(call: int, logits: np.ndarray, state: State) -> np.ndarray:
        if call == between:
            state["pending.last"][1, 2] += 1
        return logits

    errors = run_of(drift_of(twist)).errors["pending.last"]
    assert sum(error.max_abs == 1 for error in errors) == 1


def test_when_free_running_a_wrong_sum_stays_wrong_until_its_row_is_reset() -> None:
    def twist(call: int, logits: np.ndarray, state: State) -> np.ndarray:
        if call == 3:
            state["fast.sum"][2] += 1
        return logits

    drift = drift_of(twist)
    compared = [call for call in calls() if call.compare_state]
    reset = next(call.step for call in calls() if call.reset)
    expected = [1.0 if 3 <= call.step < reset else 0.0 for call in compared]
    assert [e.max_abs for e in run_of(drift).errors["fast.sum"]] == expected
    assert 0 < sum(expected) < len(expected)
    # With the state corrected before every call, only call 3 is wrong, between two points.
    assert not calls()[3].compare_state
    assert all(e.max_abs == 0 for e in run_of(drift, TEACHER_FORCED).errors["fast.sum"])


def test_an_error_of_every_step_adds_up_only_when_free_running() -> None:
    def twist(call: int, logits: np.ndarray, state: State) -> np.ndarray:
        state["fast.sum"] += 0.5
        return logits

    drift = drift_of(twist)
    free_running, teacher_forced = (
        [e.max_abs for e in run_of(drift, mode).errors["fast.sum"]]
        for mode in (FREE_RUNNING, TEACHER_FORCED)
    )
    assert set(teacher_forced) == {0.5}
    assert free_running == [0.5 * (call.step + 1) for call in calls() if call.compare_state]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_state_that_is_not_finite_ends_with_its_first_step_and_place(value: float) -> None:
    def twist(call: int, logits: np.ndarray, state: State) -> np.ndarray:
        if call >= 7:
            state["fast.sum"][1, 0] = value
        return logits

    drift = drift_of(twist)
    failure = run_of(drift).failure
    assert failure is not None
    assert (failure.step, failure.tokens_read) == (7, calls()[7].tokens_read)
    assert (failure.kind, failure.tensor) == ("not finite", "fast.sum")
    assert failure.message == f"state 'fast.sum' is {value} in row 1, element [0]"
    assert len(run_of(drift).predictions) < len(calls())
    assert run_of(drift, TEACHER_FORCED).failure == failure
    assert drift.calls == 8, "nothing is left to compare"


def test_logits_that_are_not_finite_end_with_the_first_step() -> None:
    def twist(call: int, logits: np.ndarray, state: State) -> np.ndarray:
        if call == 5:
            logits[0, 0, 0] = np.nan
        return logits

    failure = run_of(drift_of(twist)).failure
    assert failure is not None
    assert (failure.step, failure.tensor, failure.row) == (5, "logits", 0)
    call = calls()[5]
    assert failure.token_id == call.ids[0, failure.token_in_call]
    assert failure.sentence.startswith(f"not finite at token {failure.token} of row 0 (id ")
    assert failure.message.startswith("the state is finite, but the logits are not")


def test_a_runtime_that_dies_is_dropped_and_the_others_continue() -> None:
    def die(call: int, logits: np.ndarray, state: State) -> np.ndarray:
        if call == 4:
            raise RuntimeError("out of memory")
        return logits

    runtimes = {"dies": fake(die), "lives": fake()}
    drift = measure_drift(("right", fake()), runtimes, Schedule(TEXT, 100, 16))
    failure = run_of(drift, name="dies").failure
    assert failure is not None
    assert (failure.message, failure.kind) == ("out of memory", "error")
    assert run_of(drift, name="lives").failure is None
    assert run_of(drift, name="lives").tokens_read[-1] == 100
    assert len(run_of(drift, name="dies").tokens_read) < len(
        run_of(drift, name="lives").tokens_read
    )


def test_a_reference_that_dies_ends_the_run() -> None:
    def die(call: int, logits: np.ndarray, state: State) -> np.ndarray:
        raise RuntimeError

    drift = measure_drift(("right", fake(die)), {"found": fake()}, Schedule(TEXT, 100, 16))
    assert drift.failure is not None
    assert (drift.failure.runtime, drift.failure.message) == ("right", "RuntimeError")
    assert drift.calls == 0


def test_logits_of_another_shape_are_a_failure() -> None:
    failure = run_of(drift_of(lambda call, logits, state: logits[..., :-1])).failure
    assert failure is not None
    assert failure.kind == "shape"
    assert "logits has shape [3, 3, 4]; expected [3, 3, 5]" in failure.message


def test_a_state_of_another_shape_is_a_failure() -> None:
    def twist(call: int, logits: np.ndarray, state: State) -> np.ndarray:
        state["fast.sum"] = state["fast.sum"][:, :1]
        return logits

    failure = run_of(drift_of(twist)).failure
    assert failure is not None
    assert (failure.kind, failure.tensor) == ("shape", "fast.sum")


def test_a_session_of_another_model_is_dropped_at_once() -> None:
    other = Session(FakeRunner(lambda c, x, s: x), SessionSpec(SPECS[:2], VOCABULARY, 16), ROWS)
    drift = measure_drift(("right", fake()), {"found": other}, Schedule(TEXT, 100, 16))
    failure = run_of(drift).failure
    assert failure is not None
    assert "state 'pending.last' has shape None, but (3, 3) in the reference" in failure.message


def test_a_slow_runtime_stops_at_its_limit_and_the_others_continue() -> None:
    runtimes = {"slow": fake(), "found": fake()}
    drift = measure_drift(("right", fake()), runtimes, Schedule(TEXT, 100, 16), {"slow": 30})
    slow = run_of(drift, name="slow")
    assert slow.stopped
    assert slow.failure is None
    assert slow.tokens_read == [d for d in run_of(drift).tokens_read if d <= slow.tokens_read[-1]]
    assert 30 <= slow.tokens_read[-1] < 100 == run_of(drift).tokens_read[-1]


def test_a_state_that_half_precision_cannot_hold_is_reported() -> None:
    half = [TensorSpec(s.name, s.shape, s.dtype.replace("float64", "float16")) for s in SPECS]
    candidate = Session(FakeRunner(lambda c, x, s: x), SessionSpec(half, VOCABULARY, 16), ROWS)

    def large(call: int, logits: np.ndarray, state: State) -> np.ndarray:
        state["fast.sum"] += 1e6
        return logits

    drift = measure_drift(
        ("right", fake(large)), {"found": candidate}, Schedule(TEXT, 50, 16), modes=[TEACHER_FORCED]
    )
    failure = run_of(drift, TEACHER_FORCED).failure
    assert failure is not None
    assert failure.kind == "not finite"
    assert "the reference's value is too large for float16" in failure.message
