"""What a check has tried, counted in calls."""

from __future__ import annotations

import numpy as np

from fwl_export.parity.cases import ModelLimits
from fwl_export.parity.coverage import Coverage, coverage_table
from fwl_export.parity.schedule import ScheduledCall

LIMITS = ModelLimits(8, 0, 10, 4, 6)


def call(
    lengths: tuple[int, ...] = (2, 0),
    ids: tuple[tuple[int, ...], ...] = ((1, 2, 0), (0, 0, 0)),
    weight: float = 1.0,
    scale: float = 1.0,
    wanted: np.ndarray | None = None,
) -> ScheduledCall:
    tokens = np.array(ids)
    real = np.arange(tokens.shape[1]) < np.array(lengths)[:, None]
    return ScheduledCall(
        step=0,
        ids=tokens,
        weights=np.where(real, np.float32(weight), np.float32(0)),
        lengths=np.array(lengths),
        scale=np.full(len(lengths), scale, np.float32),
        labels=tokens,
        positions=np.zeros(len(lengths), np.int64),
        reset=(1,),
        tokens_read=2,
        compare_state=True,
        logit_positions=wanted,
    )


def counted(*calls: ScheduledCall, before: tuple[int, ...] = (0, 0)) -> dict[str, object]:
    coverage = Coverage(LIMITS)
    for each in calls:
        coverage.add(each, before)
    return coverage.to_dict()


def test_padding_counts_for_nothing() -> None:
    found = counted(call(weight=2, scale=0.5))
    assert (found["rows"], found["sizes"], found["weights"]) == ([2], [2], [2.0])
    assert found["scales"] == [0.5]
    assert found["largest_weight_times_scale"] == 1
    assert (found["empty_rows"], found["ragged_calls"], found["resets"]) == (1, 1, 1)
    assert found["token_ids_read"] == 2


def test_an_id_is_learned_from_where_something_predicted_it_with_a_weight() -> None:
    assert counted(call())["token_ids_learned"] == 1  # the first token of a row was not predicted
    assert counted(call(), before=(5, 5))["token_ids_learned"] == 2
    assert counted(call(weight=0), before=(5, 5))["token_ids_learned"] == 0
    assert counted(call(scale=0), before=(5, 5))["token_ids_learned"] == 0


def test_an_anchor_is_crossed_by_the_token_at_its_position() -> None:
    one = call((1, 1), ((1,), (1,)))
    found = {
        before: counted(one, before=(before, before))["anchors_one_token"] for before in range(9)
    }
    assert found == {0: 0, 1: 0, 2: 0, 3: 0, 4: 2, 5: 0, 6: 0, 7: 0, 8: 2}
    assert counted(call((3, 0)), before=(3, 4))["anchors"] == 1
    assert counted(call((3, 0)), before=(3, 4))["wraps"] == 0
    assert counted(call((3, 0)), before=(4, 4))["wraps"] == 1


def test_sizes_are_those_after_a_session_has_split_a_call_at_an_anchor() -> None:
    six = call((6, 0), ((1, 2, 3, 4, 5, 6), (0,) * 6))
    assert counted(six)["sizes"] == [2, 4]
    assert counted(six, before=(3, 0))["sizes"] == [1, 4]
    assert counted(call((2, 0)))["sizes"] == [2], "sessions cut padding off"


def test_fewer_and_more_logits_than_tokens_are_told_apart() -> None:
    few, more = (np.zeros((2, count), np.int64) for count in (1, 5))
    found = counted(call(), call(wanted=few), call(wanted=more))
    assert (found["logits_all"], found["logits_some"]) == (1, 2)
    assert (found["logits_fewer_than_tokens"], found["logits_more_than_tokens"]) == (1, 1)
    assert found["calls_of_several_tokens"] == 3


def test_the_table_says_what_was_left_out() -> None:
    coverage = Coverage(LIMITS, left_out=["the plugin"])
    coverage.add(call(), [0, 0])
    table = dict(coverage_table(coverage.to_dict()))
    assert table["token ids"] == "2 of 10 read, 1 learned from"
    assert table["left out"] == "the plugin"
    assert "not repeated" in table["runs"]
    assert coverage_table(Coverage(LIMITS).to_dict()), "nothing was tried"
