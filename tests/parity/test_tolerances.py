"""The table of tolerances of `check`, and the budgets that follow from it."""

from __future__ import annotations

import math

import pytest

from fwl_export.bundle.config import FastWeightsConfig, ModelConfig
from fwl_export.model.language_model import FWLModel
from fwl_export.model.streaming import state_specs
from fwl_export.parity.compare import Error
from fwl_export.parity.tolerances import (
    ROUNDING,
    TABLE,
    Budget,
    Tolerance,
    budgets,
    tolerance_for,
)

EXACT = ("position", "pending.valid")


def error(max_abs: float, relative_rms: float = 0.0, scale: float = 1.0) -> Error:
    return Error(max_abs, relative_rms, scale, None)


def test_every_row_has_a_reason_and_leaves_the_maximum_more_than_the_mean() -> None:
    for row in TABLE:
        assert len(row.reason.split()) >= 6, row
        if row.prefix in EXACT:
            assert not row.rms_factor + row.max_factor + row.floor + row.per_token
        else:
            assert 1 < row.rms_factor < row.max_factor < 10
            assert row.floor > 0


def test_every_tensor_of_a_model_has_a_row() -> None:
    config = ModelConfig(fast_weights=FastWeightsConfig(anchor_interval=64))
    names = [spec.name for spec in state_specs(config, FWLModel(config), 256)]
    for name in ("logits", *names):
        assert name.startswith(tolerance_for(name).prefix)
    assert tolerance_for("pending.valid").prefix == "pending.valid"
    assert {tolerance_for(name).prefix for name in ("logits", *names)} == {r.prefix for r in TABLE}
    with pytest.raises(KeyError, match=r"no tolerance for 'new.thing': give it a row in"):
        tolerance_for("new.thing")


def test_a_budget_is_a_factor_times_the_largest_distance_so_far() -> None:
    row = Tolerance("x", 4, 5, 0, 0, "for this test")
    own = [error(0.1, 0.01), error(0.4, 0.001), error(0.2, 0.02)]
    found = budgets(row, own, [10, 20, 30], "fp32", 0.0)
    assert [b.max_abs for b in found] == [0.5, 2.0, 2.0]
    assert [b.relative_rms for b in found] == [0.04, 0.04, 0.08]


def test_floors_count_roundings_and_remembered_tokens() -> None:
    row = Tolerance("x", 4, 5, 2, 3, "for this test")
    own = [error(0, scale=7.0)] * 3
    for precision in ROUNDING:
        found = budgets(row, own, [10, 100, 1000], precision, 100.0)
        for budget, tokens in zip(found, (10, 100, 100), strict=True):
            floor = 2 * ROUNDING[precision] + 3 * tokens * 2.0**-25
            assert budget.relative_rms == pytest.approx(floor)
            assert budget.max_abs == pytest.approx(3 * floor * 7)


def test_counters_and_copies_must_be_equal() -> None:
    for name in EXACT:
        (budget,) = budgets(tolerance_for(name), [error(1.0, 1.0)], [5], "fp16", 500.0)
        assert budget.use(error(0.0)) == 0
        assert budget.use(error(1e-9)) == math.inf


def test_the_use_of_a_budget_is_that_of_its_tighter_half() -> None:
    budget = Budget(max_abs=2.0, relative_rms=0.1)
    assert budget.use(error(1.0, 0.01)) == 0.5
    assert budget.use(error(1.0, 0.09)) == pytest.approx(0.9)
    assert budget.use(error(math.inf, 0.0)) == math.inf
