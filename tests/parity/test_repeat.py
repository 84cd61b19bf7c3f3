"""Calls that are made again must give the same bits."""

from __future__ import annotations

import numpy as np

from fwl_export.bundle.state import State
from fwl_export.parity.repeat import differences
from tests.parity.test_drift import calls, fake


def test_equal_readings_do_not_differ() -> None:
    assert list(differences(fake(), calls())) == []


def test_noise_is_found_with_its_first_call() -> None:
    rng = np.random.default_rng(0)

    def twist(call: int, logits: np.ndarray, state: State) -> np.ndarray:
        if call == 3:
            logits[0, 0, 0] += 1e-12 * rng.random()
        return logits

    found = list(differences(fake(twist), [c for c in calls() if not c.last_only]))
    assert {(d.tensor, d.step) for d in found} <= {("logits", c.step) for c in calls()}
    assert found
    assert 0 < found[0].error.max_abs < 1e-11


def test_a_state_that_differs_is_found() -> None:
    count = iter(range(10**6))

    def twist(call: int, logits: np.ndarray, state: State) -> np.ndarray:
        state["pending.last"][0, 0] = next(count)
        return logits

    assert {d.tensor for d in differences(fake(twist), calls())} == {"pending.last"}
