"""The covering design: every pair of settings that is possible meets in some call."""

from __future__ import annotations

import pytest

from fwl_export.parity import design
from fwl_export.parity.design import Setting, covering_design, pairs, possible_pairs, sizes


@pytest.mark.parametrize("max_tokens", [1, 2, 5, 16, 256, 1024])
@pytest.mark.parametrize("seed", [0, 1])
def test_every_possible_pair_of_settings_meets(max_tokens: int, seed: int) -> None:
    rows = covering_design(max_tokens, seed)
    assert len(pairs([setting for setting, _ in rows])) == possible_pairs(max_tokens)
    assert len(rows) < 100
    assert covering_design.__wrapped__(max_tokens, seed) == rows, "it depends on the seed alone"


def test_sizes_are_powers_of_two_and_their_neighbours() -> None:
    found = [size for near in sizes(256).values() for size in near]
    assert found == [
        *(1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33),
        *(63, 64, 65, 127, 128, 129, 255, 256),
    ]
    assert {100, 99} <= {size for near in sizes(100).values() for size in near}
    tried = [size for _, size in covering_design(256, 0)]
    assert set(tried) == set(found), "every size is tried"


def test_calls_are_what_a_row_says() -> None:
    for setting, size in covering_design(256, 3):
        assert setting.rows in design.ROWS
        assert size in sizes(256)[setting.power]
        if setting.rows == 1:
            assert setting.lengths in ("equal", "padded")
        if size == 1:
            assert setting.logits in ("all", "last")
        assert setting.rows * size <= 1.1 * 512


def test_pairs_are_unordered_settings_of_two_factors() -> None:
    setting = Setting(2, 4, "equal", "one", "one", "all", "nothing", "text")
    assert len(pairs([setting, setting])) == 8 * 7 / 2
    assert (("rows", 2), ("power", 4)) in pairs([setting])
