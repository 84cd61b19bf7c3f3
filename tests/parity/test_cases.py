"""Cases by name, and the calls that they make."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from fwl_export.errors import ConfigError
from fwl_export.parity import CASES, choose_cases, design
from fwl_export.parity.cases import (
    Case,
    ModelLimits,
    cases_with_rows,
    far_positions,
    ids_to_read,
    plan_calls,
)
from fwl_export.parity.schedule import ScheduledCall

TEXT = np.random.default_rng(0).integers(1, 100, 7000)
MAX_TOKENS = 16
LIMITS = ModelLimits(MAX_TOKENS, 0, 100, 12, 23)
DEMO = ModelLimits(256, 0, 2048, 256, 383)


def calls_of(name: str, limits: ModelLimits = LIMITS, tokens: int = 576) -> list[ScheduledCall]:
    chosen = choose_cases(name, tokens, limits)
    planned = plan_calls(chosen, TEXT, limits, 0)
    return [call for case in chosen for call in planned[case.name]]


def test_the_number_of_tokens_comes_from_the_user_the_text_or_the_case() -> None:
    limits = replace(LIMITS, max_positions=200)
    chosen = choose_cases("text,long,repeat@500,decode", 40, limits)
    found = [(case.name, case.tokens) for case in chosen]
    assert found == [("text", 40), ("long", 160), ("repeat", 500), ("decode", 48)]
    assert choose_cases("text@300,decode@300", 40, limits)[1].tokens == 200


def test_mixed_stands_for_all_numbers_of_rows() -> None:
    chosen = choose_cases("mixed,decode@20", 576, LIMITS)
    assert [case.name for case in chosen] == ["mixed1", "mixed2", "mixed5", "mixed8", "decode"]
    assert [case.rows for case in chosen] == [1, 2, 5, 8, 1]


def test_chosen_cases_are_kept_as_they_are() -> None:
    chosen = choose_cases(["text", "decode@5000"], 40, MAX_TOKENS)
    assert choose_cases(chosen, 10, 4) == chosen
    with pytest.raises(ConfigError, match="case 'text' is named twice"):
        choose_cases(["text", *chosen], 40, MAX_TOKENS)
    with pytest.raises(ConfigError, match="case 'mixed2' is named twice"):
        choose_cases("mixed,mixed2", 40, MAX_TOKENS)


@pytest.mark.parametrize("name", ["texts", "text@", "decode@0", "", "mixed3", "decode1"])
def test_what_is_not_a_case_is_named(name: str) -> None:
    with pytest.raises(ConfigError, match=f"'{name}' is not a case; expected text, mixed1, mixed2"):
        choose_cases([name], 40, MAX_TOKENS)


@pytest.mark.parametrize("name", [case.name for case in CASES])
def test_calls_are_the_same_each_time_and_read_the_tokens(name: str) -> None:
    (case,) = choose_cases(f"{name}@20", 50, LIMITS)
    calls = case.calls(TEXT, LIMITS, seed=3)
    first, again = list(calls), list(calls)
    assert first[-1].tokens_read == 20
    assert first[-1].compare_state
    assert max(call.ids.shape[1] for call in first) <= MAX_TOKENS
    for call, same in zip(first, again, strict=True):
        assert call.ids.shape[0] == case.rows
        for field, value in vars(call).items():
            np.testing.assert_array_equal(value, getattr(same, field), err_msg=field)


@pytest.mark.parametrize("limits", [LIMITS, DEMO, ModelLimits(1, 0, 40, 0, 8)])
def test_inputs_are_what_sessions_accept(limits: ModelLimits) -> None:
    text = TEXT % limits.vocab_size
    chosen = choose_cases("mixed,repeat,long,decode,far,again", 576, limits)
    for call in (call for calls in plan_calls(chosen, text, limits, 0).values() for call in calls):
        rows, size = call.ids.shape
        assert 1 <= size <= limits.max_tokens
        assert call.lengths.shape == call.scale.shape == (rows,)
        assert 0 <= call.lengths.min() <= call.lengths.max() <= size
        real = np.arange(size) < call.lengths[:, None]
        assert 0 <= call.ids.min() <= call.ids.max() < limits.vocab_size
        assert not call.ids[~real].any()
        assert 0 <= call.wanted.min() <= call.wanted.max() < size
        assert (call.weights * call.scale[:, None]).max() <= 10
        assert call.forced or not call.compare_state


@pytest.mark.parametrize("name", ["mixed", "long", "decode", "far", "again", "repeat", "endless"])
def test_no_row_reads_more_than_the_model_can(name: str) -> None:
    limits = ModelLimits(16, 40, 100, 0, 23)
    for case in choose_cases(name, 500, limits):
        positions = [0] * case.rows
        for call in case.calls(TEXT, limits, 0):
            positions = after(call, positions)
            assert max(positions) <= 40


def after(call: ScheduledCall, positions: Sequence[int]) -> list[int]:
    """Return the positions of the rows after a call."""
    found = [0 if row in call.reset else place for row, place in enumerate(positions)]
    for source, target in call.forks:
        found[target] = found[source]
    for row, place in call.moves:
        found[row] = place
    return [place + int(length) for place, length in zip(found, call.lengths, strict=True)]


def test_the_design_is_in_its_calls() -> None:
    calls = calls_of("mixed", DEMO)
    (full,) = [call for call in calls if call.setting is None]
    assert full.ids.shape == (8, 256)  # beside the design, which bounds B times T
    for call in calls:
        if call.setting is None:
            continue
        rows, size = call.ids.shape
        assert rows == call.setting.rows
        if call.setting.lengths == "padded":
            assert call.lengths.max() < size
        if call.setting.lengths == "first empty":
            assert call.lengths[0] == 0 < call.lengths.max()
        if call.setting.lengths == "last longest" and size > 1:
            assert call.lengths[:-1].max() < call.lengths[-1] == size
        if call.setting.weights == "fractions":
            assert 0 < call.weights.max() < 1
        if call.setting.scale == "by row":
            assert len(set(call.scale.tolist())) == min(rows, 5)
        if call.setting.ids == "high":
            assert call.ids.max() >= DEMO.vocab_size // 2
        assert call.last_only == (call.setting.logits == "last")
    assert any(call.forks for call in calls)
    assert any(call.ids.max() == DEMO.vocab_size - 1 for call in calls)


@pytest.mark.parametrize("limits", [DEMO, replace(DEMO, anchor_interval=0)])
def test_every_size_reaches_the_runtime(limits: ModelLimits) -> None:
    sizes = set()
    for case in choose_cases("mixed", 576, limits):
        positions = [0] * case.rows
        for call in case.calls(TEXT, limits, 0):
            before = after(replace(call, lengths=call.lengths * 0), positions)
            positions = after(call, positions)
            interval = limits.anchor_interval
            if not any(
                interval and start % interval + length > interval
                for start, length in zip(before, call.lengths, strict=True)
            ):
                sizes.add(int(call.lengths.max()))
    assert {size for near in design.sizes(256).values() for size in near} <= sizes


def test_long_reads_every_token_id_and_learns_from_it() -> None:
    calls = calls_of("long", DEMO)
    ids = np.concatenate([call.ids[0] for call in calls])
    assert set(ids[1:].tolist()) == set(range(2048))
    assert all(call.wanted.shape[1] == 3 for call in calls)
    big = replace(DEMO, vocab_size=5000)
    (case,) = choose_cases("long", 576, big, all_ids=True)
    ids = np.concatenate([call.ids[0] for call in case.calls(TEXT, big, 0)])
    assert len(ids) == 5001
    assert set(ids[1:].tolist()) == set(range(5000))


def test_the_first_ids_to_read_are_those_at_which_tables_end() -> None:
    order = ids_to_read(np.random.default_rng(0), 49152)
    assert sorted(order.tolist()) == list(range(49152))
    assert {0, 1, 49151, 1023, 1024, 1025, 32768} <= set(order[:60].tolist())


@pytest.mark.parametrize("interval", [12, 256])
def test_decoding_crosses_two_anchors_token_by_token(interval: int) -> None:
    limits = replace(DEMO, anchor_interval=interval)
    crossed, positions = set(), [0]
    for call in calls_of("decode", limits):
        if call.ids.shape[1] == 1:
            crossed.add(positions[0])
        positions = after(call, positions)
    assert {interval - 1, interval, 2 * interval - 1, 2 * interval} <= crossed


def test_rows_read_past_every_power_of_two_to_100_000() -> None:
    assert {64, 4096, 8192, 65536, 100_000, 383, 766, 256} <= set(far_positions(DEMO))
    passed = set()
    positions = [0] * 8
    for call in calls_of("far", DEMO):
        start = after(replace(call, lengths=call.lengths * 0), positions)
        positions = after(call, positions)
        passed |= {n for a, b in zip(start, positions, strict=True) for n in range(a, b)}
    for place in far_positions(DEMO):
        assert {place - 2, place - 1, place, place + 1} <= passed
    limits = replace(DEMO, max_positions=1000)
    assert max(far_positions(limits)) == 998


def test_every_case_says_what_it_is_for() -> None:
    assert all(isinstance(case, Case) and case.about for case in CASES)


def test_repeated_tokens_are_read_in_rows_side_by_side_in_the_largest_calls() -> None:
    made = calls_of("endless", DEMO)
    assert [call.ids.shape for call in made] == [(8, 256)] * 4
    for row in range(8):
        read = np.concatenate([call.ids[row] for call in made])
        assert len(np.unique(read)) <= 2
        assert (read[2:] == read[:-2]).all()
    assert len({tuple(np.unique(row)) for row in made[0].ids}) == 8
    assert all((call.weights == 1).all() and not call.last_only for call in made)
    for call in made:
        wanted = call.wanted[0].tolist()
        assert wanted[-1] == 255
        assert max(np.diff(wanted)) == 8
    assert [call.forced for call in made] == [False, False, False, True]


def test_tokens_of_the_tokenizer_are_among_them() -> None:
    limits = replace(DEMO, repeated={"newline": 1999, "dash": 1888})
    (first, *_) = calls_of("endless", limits)
    assert first.ids[:2, 0].tolist() == [1999, 1888]


@pytest.mark.parametrize("rows", [1, 3, 5])
def test_fewer_rows_read_all_repeated_tokens_one_after_the_other(rows: int) -> None:
    (case,) = choose_cases("endless", 576, DEMO)
    (smaller,) = cases_with_rows([case], rows, DEMO, 0)
    made = list(smaller.calls(TEXT, DEMO, 0))
    rounds = -(-8 // rows)
    assert (smaller.rows, smaller.tokens, len(made)) == (rows, 1024 * rounds, 4 * rounds)
    assert [call.reset for call in made[:5]] == [(), (), (), (), tuple(range(rows))][:5]
    whole = {tuple(np.unique(row)) for row in next(iter(case.calls(TEXT, DEMO, 0))).ids}
    assert {tuple(np.unique(row)) for call in made for row in call.ids} == whole


def test_repeated_tokens_end_where_the_model_does() -> None:
    made = calls_of("endless", ModelLimits(16, 40, 100, 0, 23))
    assert sum(call.ids.shape[1] for call in made) == 40
    assert not any(call.reset for call in made)
