"""The calls of a check: replayable, in the text's order, and covering what tends to go wrong."""

from __future__ import annotations

import numpy as np
import pytest

from fwl_export.errors import TokenError
from fwl_export.parity.schedule import ROWS, Schedule

TEXT = np.random.default_rng(3).integers(1, 1000, 2500)  # without 0, which is padding
MAX_TOKENS = 64


@pytest.fixture(params=[0, 1, 2])
def schedule(request: pytest.FixtureRequest) -> Schedule:
    return Schedule(TEXT, 2000, MAX_TOKENS, request.param)


def test_the_same_seed_gives_the_same_calls_and_another_gives_others() -> None:
    first, again, other = (list(Schedule(TEXT, 500, MAX_TOKENS, seed)) for seed in (1, 1, 2))
    assert len(first) == len(again)
    for call, same in zip(first, again, strict=True):
        for name, value in vars(call).items():
            np.testing.assert_array_equal(value, getattr(same, name), err_msg=name)
    assert [c.ids.shape for c in first] != [c.ids.shape for c in other]


def test_every_row_reads_its_text_in_order_with_the_next_token_as_label(
    schedule: Schedule,
) -> None:
    read: list[list[int]] = [[] for _ in range(ROWS)]
    labels: list[list[int]] = [[] for _ in range(ROWS)]
    for call in schedule:
        assert call.positions.tolist() == [len(row) for row in read]
        for row, length in enumerate(call.lengths):
            read[row] += call.ids[row, :length].tolist()
            labels[row] += call.labels[row, :length].tolist()
            for padding in (call.ids, call.labels, call.weights):
                assert not padding[row, length:].any()
    for row in range(ROWS):
        start = row * (len(TEXT) // ROWS)
        text = np.roll(TEXT, -start)
        assert read[row] == text[: len(read[row])].tolist()
        assert labels[row] == text[1 : len(read[row]) + 1].tolist()
    assert len(read[0]) == 2000


def test_the_schedule_covers_what_goes_wrong_in_streams(schedule: Schedule) -> None:
    calls = list(schedule)
    sizes = [call.ids.shape[1] for call in calls]
    assert min(sizes) == 1
    assert max(sizes) == MAX_TOKENS
    assert sum(size == 1 for size in sizes) >= 20
    assert len({size for size in sizes if size % 2}) >= 6
    assert all(call.lengths.max() == call.ids.shape[1] for call in calls)
    several = [call.lengths for call in calls if call.ids.shape[1] > 1]
    assert sum(len(set(lengths.tolist())) == ROWS for lengths in several) >= 5
    for row in range(ROWS):
        assert any(call.lengths[row] == 0 < call.positions[row] for call in calls), "an idle row"
    assert any(len(set(call.positions.tolist())) == ROWS for call in calls)
    begin = next(call for call in calls if call.lengths[1] > 0)
    assert begin.positions[0] >= 500
    assert begin.positions[1] == 0


def test_in_half_of_the_calls_not_all_logits_are_wanted(schedule: Schedule) -> None:
    several = [call for call in schedule if call.ids.shape[1] > 1]
    some = [call for call in several if call.wanted.shape[1] < call.ids.shape[1]]
    assert 0.3 < len(some) / len(several) < 0.7
    assert {call.last_only for call in some} == {True, False}
    for call in some:
        assert 0 <= call.wanted.min() <= call.wanted.max() < call.ids.shape[1]
        if call.last_only:
            assert (call.wanted[:, 0] == np.maximum(call.lengths - 1, 0)).all()


def test_weights_of_zero_stand_alone_and_fill_whole_calls(schedule: Schedule) -> None:
    shares = set()
    for call in schedule:
        real = np.arange(call.ids.shape[1]) < call.lengths[:, None]
        weights = call.weights[real]
        assert set(weights.tolist()) <= {0, 0.5, 1}
        if len(weights) > 10:
            shares.add("none" if not weights.any() else "all" if weights.all() else "some")
    assert {"all", "some"} <= shares
    silent = [c for seed in range(3) for c in Schedule(TEXT, 2000, 64, seed) if not c.weights.any()]
    assert silent


def test_one_row_is_reset_once_in_mid_stream(schedule: Schedule) -> None:
    resets = [call for call in schedule if call.reset]
    assert len(resets) == 1
    assert resets[0].reset == (2,)
    assert 1000 < resets[0].positions[0] < 1500
    assert resets[0].positions[2] > 0


def test_states_are_compared_after_ragged_calls_at_rising_points(schedule: Schedule) -> None:
    calls = list(schedule)
    compared = [call for call in calls if call.compare_state]
    points = [call.tokens_read for call in compared]
    assert points == sorted(set(points))
    assert len(points) >= 8
    assert points[0] < 100
    assert points[-1] == 2000
    assert compared[-1] is calls[-1]
    several = [call for call in compared if call.ids.shape[1] > 2]
    assert sum(len(set(call.lengths.tolist())) > 1 for call in several) >= len(several) - 1


@pytest.mark.parametrize(("tokens", "max_tokens"), [(1, 1), (1, 256), (2, 16), (30, 256), (99, 1)])
def test_short_texts_and_small_calls(tokens: int, max_tokens: int) -> None:
    calls = list(Schedule(TEXT[: tokens + 1], tokens, max_tokens))
    assert calls[-1].tokens_read == tokens
    assert calls[-1].compare_state
    assert max(call.ids.shape[1] for call in calls) <= max_tokens


def test_a_text_that_is_too_short_is_refused() -> None:
    with pytest.raises(TokenError, match=r"the text has 10 tokens; reading 10 .* takes 11. Give a"):
        Schedule(TEXT[:10], 10, MAX_TOKENS)
    with pytest.raises(TokenError, match="tokens is 0; expected 1 or more"):
        Schedule(TEXT, 0, MAX_TOKENS)
