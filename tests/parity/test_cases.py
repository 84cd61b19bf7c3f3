"""Cases by name, and the calls that they make."""

from __future__ import annotations

import numpy as np
import pytest

from fwl_export.errors import ConfigError
from fwl_export.parity import CASES, choose_cases

TEXT = np.random.default_rng(0).integers(1, 100, 300)
MAX_TOKENS = 16


def test_the_number_of_tokens_comes_from_the_user_the_text_or_the_case() -> None:
    chosen = choose_cases("text,long,mixed@500,decode", 40, MAX_TOKENS, limit=200)
    found = [(case.name, case.tokens) for case in chosen]
    assert found == [("text", 40), ("long", 32), ("mixed", 200), ("decode", 40)]


def test_chosen_cases_are_kept_as_they_are() -> None:
    chosen = choose_cases(["text", "decode@5000"], 40, MAX_TOKENS)
    assert choose_cases(chosen, 10, 4, limit=5) == chosen
    with pytest.raises(ConfigError, match="case 'text' is named twice"):
        choose_cases(["text", *chosen], 40, MAX_TOKENS)


@pytest.mark.parametrize("name", ["texts", "text@", "decode@0", ""])
def test_what_is_not_a_case_is_named(name: str) -> None:
    with pytest.raises(ConfigError, match=f"'{name}' is not a case; expected text, mixed, repeat"):
        choose_cases([name], 40, MAX_TOKENS)


@pytest.mark.parametrize("name", [case.name for case in CASES])
def test_calls_are_the_same_each_time_and_read_the_tokens(name: str) -> None:
    (case,) = choose_cases([f"{name}@50"], 50, MAX_TOKENS)
    calls = case.calls(TEXT, MAX_TOKENS, seed=3)
    first, again = list(calls), list(calls)
    assert first[-1].tokens_read == 50
    assert first[-1].compare_state
    assert max(call.ids.shape[1] for call in first) <= MAX_TOKENS
    for call, same in zip(first, again, strict=True):
        assert call.ids.shape[0] == case.rows
        np.testing.assert_array_equal(call.ids, same.ids)
        np.testing.assert_array_equal(call.scale, same.scale)
