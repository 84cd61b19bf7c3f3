"""The reference against arithmetic by hand and a closed form, and the test cases themselves."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fwl_export.errors import ShapeError
from fwl_export.op.cases import CASES, Case
from fwl_export.op.reference import linear_attention_update
from tests.op.helpers import rounded_inputs
from tests.tolerances import assert_close

Inputs = dict[str, npt.NDArray[np.generic]]


def test_by_hand() -> None:
    # One row, two tokens, Dk = Dv = 1: 0.5 * 4 + 2 * 3 = 8, then 0.25 * 8 + 1 * 5 = 7.
    output, state = linear_attention_update(
        query=np.array([[[10.0], [100.0]]]),
        key=np.array([[[2.0], [1.0]]]),
        value=np.array([[[3.0], [5.0]]]),
        decay=np.array([[0.5, 0.25]]),
        past_state=np.array([[[4.0]]]),
    )
    assert output.tolist() == [[[80.0], [700.0]]]
    assert state.tolist() == [[[7.0]]]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_equals_the_sum_over_all_earlier_writes(case: Case) -> None:
    q, k, v, decay, past = rounded_inputs(case, "float64").values()
    output, state = linear_attention_update(q, k, v, decay, past)
    for t in range(case.sizes[1]):
        # What is left at token t of the past state and of every earlier write, as products.
        left_of_past = decay[:, : t + 1].prod(1)
        total = left_of_past[:, None, None] * past
        for j in range(t + 1):
            left = decay[:, j + 1 : t + 1].prod(1)
            total = total + left[:, None, None] * np.einsum("bk,bv->bkv", k[:, j], v[:, j])
        read = np.einsum("bk,bkv->bv", q[:, t], total)
        assert_close("op.output.float64", output[:, t], read, f"output of token {t}")
    assert_close("op.state.float64", state, total, "present_state")


@given(st.data())
def test_any_split_into_calls_gives_the_same_bits(data: st.DataObject) -> None:
    case = data.draw(st.sampled_from([c for c in CASES if 1 < c.sizes[1] < 100]))
    cut = data.draw(st.integers(1, case.sizes[1] - 1))
    inputs = rounded_inputs(case, "float64")
    output, state = linear_attention_update(**inputs)
    first, middle = linear_attention_update(**_tokens(inputs, slice(None, cut)))
    rest = {**_tokens(inputs, slice(cut, None)), "past_state": middle}
    second, end = linear_attention_update(**rest)
    np.testing.assert_array_equal(np.concatenate([first, second], 1), output)
    np.testing.assert_array_equal(end, state)


def test_a_decay_of_zero_forgets_everything_before() -> None:
    inputs = rounded_inputs(Case("forgets", (2, 5, 4, 3)), "float64")
    inputs["decay"][:, -1] = 0
    _, state = linear_attention_update(**inputs)
    last_write = np.einsum("bk,bv->bkv", inputs["key"][:, -1], inputs["value"][:, -1])
    np.testing.assert_array_equal(state, last_write)


def test_silent_tokens_leave_the_state_bitwise_unchanged() -> None:
    inputs = rounded_inputs(Case("silent", (2, 6, 4, 3), "constant", silent=1.0), "float64")
    _, state = linear_attention_update(**inputs)
    np.testing.assert_array_equal(state, inputs["past_state"])


def test_inputs_are_not_written_to() -> None:
    inputs = rounded_inputs(CASES[3], "float64")
    before = {name: array.copy() for name, array in inputs.items()}
    linear_attention_update(**inputs)
    for name, array in inputs.items():
        np.testing.assert_array_equal(array, before[name])


def test_refuses_no_tokens() -> None:
    inputs = rounded_inputs(Case("none", (1, 0, 4, 3)), "float64")
    with pytest.raises(ShapeError, match=r"T \(tokens\) is 0; expected 1 or more"):
        linear_attention_update(**inputs)


def test_refuses_sizes_that_disagree() -> None:
    inputs = rounded_inputs(Case("sizes", (1, 2, 4, 3)), "float64")
    inputs["past_state"] = inputs["past_state"].transpose(0, 2, 1)
    with pytest.raises(ShapeError, match=r"'past_state' has shape \[1, 3, 4\]; expected \[1, 4, 3"):
        linear_attention_update(**inputs)


def test_cases_have_names_of_their_own_and_cover_the_special_values() -> None:
    assert len({c.name for c in CASES}) == len(CASES)
    lengths = {c.sizes[1] for c in CASES}
    assert 1 in lengths
    assert any(n > 1 and n % 2 for n in lengths)
    assert any(c.sizes[0] > 1 for c in CASES)
    assert {c.decay for c in CASES} == {"one", "constant", "mixed", "reset", "tiny"}
    assert {c.fresh for c in CASES} == {False, True, "rows"}
    assert any(c.silent for c in CASES)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_cases_are_seeded_and_hold_what_they_say(case: Case) -> None:
    first, second = case.arrays(), case.arrays()
    for name, array in first.items():
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array, second[name])
    decay = first["decay"]
    assert (decay >= 0).all()
    assert (decay <= 1).all()
    assert (decay == 0).any() == (case.decay == "reset")
    fresh = (first["past_state"] == 0).all((1, 2))
    assert fresh.tolist() == [
        case.fresh is True or (case.fresh == "rows" and row % 2 == 0)
        for row in range(case.sizes[0])
    ]
    assert (first["value"] == 0).all(2).any() == (case.silent > 0)


def test_cases_of_other_names_differ() -> None:
    one, other = Case("one", (1, 2, 3, 4)).arrays(), Case("other", (1, 2, 3, 4)).arrays()
    assert not np.array_equal(one["query"], other["query"])


def test_an_unknown_kind_of_decay_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown kind of decay 'exponential'"):
        Case("unknown", (1, 1, 1, 1), "exponential").arrays()


def _tokens(inputs: Inputs, part: slice) -> Inputs:
    return {name: a if name == "past_state" else a[:, part] for name, a in inputs.items()}
