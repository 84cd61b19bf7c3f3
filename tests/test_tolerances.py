"""The tests' table of tolerances: every row has a reason, and the comparison can fail."""

from __future__ import annotations

import numpy as np
import pytest

from tests.tolerances import TOLERANCES, assert_close


@pytest.mark.parametrize("name", TOLERANCES)
def test_every_row_is_explicit_and_has_a_reason(name: str) -> None:
    row = TOLERANCES[name]
    assert row.atol >= 0
    assert row.rtol >= 0
    assert row.atol + row.rtol > 0
    assert len(row.reason.split()) >= 3


@pytest.mark.parametrize("name", TOLERANCES)
def test_just_inside_passes_and_twice_as_far_fails(name: str) -> None:
    row = TOLERANCES[name]
    bound = row.atol + row.rtol * 2
    assert_close(name, [2 + 0.9 * bound], [2.0])
    with pytest.raises(AssertionError, match=name):
        assert_close(name, [2 + 2 * bound], [2.0])


@pytest.mark.parametrize("wrong", [[np.nan], [np.inf], [[1.0]], [1.0, 1.0]])
def test_nan_infinity_and_other_shapes_fail(wrong: list[object]) -> None:
    with pytest.raises(AssertionError):
        assert_close(next(iter(TOLERANCES)), wrong, [1.0])
