"""Slots: texts that come and go in the rows of one batch, as if each had its own session."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from fwl_export import open_session
from fwl_export.errors import ShapeError, StateError, TokenError
from fwl_export.runtimes import Session, Slots
from tests.bundles import MAX_TOKENS, VOCABULARY
from tests.tolerances import assert_close


def test_many_sessions_in_few_slots(anchored_bundle: Path) -> None:
    rng = np.random.default_rng(0)
    texts = [rng.integers(0, VOCABULARY, rng.integers(1, 60)) for _ in range(20)]
    session = open_session(anchored_bundle, batch=3)
    slots = Slots(session)
    waiting, running, found = list(range(20)), {}, {}
    done = [0] * 20
    while waiting or running:
        while waiting and len(running) < 3:
            running[slots.add()] = waiting.pop(0)
        assert slots.used == sorted(running)
        chosen = [slot for slot in running if rng.random() < 0.7] or list(running)
        parts = {}
        for slot in chosen:
            text = running[slot]
            size = int(rng.integers(1, MAX_TOKENS * 2))
            parts[slot] = texts[text][done[text] : done[text] + size]
            done[text] += len(parts[slot])
        logits = slots.feed(parts)
        assert sorted(logits) == sorted(parts)
        for slot in chosen:
            text = running[slot]
            if done[text] == len(texts[text]):
                found[text] = logits[slot]
                slots.remove(slot)
                del running[slot]
    for text, ids in enumerate(texts):
        expected = open_session(anchored_bundle).feed(ids)[0, -1] if text < 4 else None
        if expected is not None:
            assert_close("runtime.float32", found[text], expected)
    assert len(found) == 20


def test_a_slot_continues_from_a_state(tiny_bundle: Path) -> None:
    slots = Slots(open_session(tiny_bundle, batch=2))
    first = slots.add()
    slots.feed({first: np.arange(9)})
    state = slots.remove(first)
    other = slots.add()
    slots.feed({other: [1, 2, 3]})
    again = slots.add(state)
    expected = open_session(tiny_bundle).feed([*range(9), 5])[0, -1]
    assert_close("runtime.float32", slots.feed({again: [5]})[again], expected)


def test_weights_are_by_slot(tiny_bundle: Path) -> None:
    session = open_session(tiny_bundle, batch=2)
    slots = Slots(session)
    a, b = slots.add(), slots.add()
    slots.feed({a: [1, 2, 3], b: [1, 2, 3]}, {a: np.zeros(3)})
    learned = np.abs(session.state["fast.up.kernel"]).max((1, 2))
    assert learned[a] == 0 < learned[b]


def test_types_of_ids_may_differ_between_slots(tiny_bundle: Path) -> None:
    slots = Slots(open_session(tiny_bundle, batch=2))
    a, b = slots.add(), slots.add()
    found = slots.feed({a: np.array([5, 6], np.uint64), b: np.array([5, 6], np.int8)})
    assert np.array_equal(found[a], found[b])


def test_only_one_of_two_threads_frees_a_slot(tiny_bundle: Path) -> None:
    slots = Slots(open_session(tiny_bundle, batch=2))

    def remove(slot: int) -> bool:
        try:
            slots.remove(slot)
        except ShapeError:
            return False
        return True

    with ThreadPoolExecutor(2) as pool:
        for _ in range(100):
            assert sorted(pool.map(remove, [slots.add()] * 2)) == [False, True]
    assert {slots.add(), slots.add()} == {0, 1}


def test_a_fork_continues_where_its_slot_stands(tiny_bundle: Path) -> None:
    slots = Slots(open_session(tiny_bundle, batch=5))
    document, other = slots.add(), slots.add()
    slots.feed({document: np.arange(9), other: [3]})
    copies = slots.fork(document, 2)
    assert slots.session.positions == [9, 1, 9, 9, 0]
    assert slots.used == sorted([document, other, *copies])
    found = slots.feed({copies[0]: [5], copies[1]: [6, 7], document: [8]})
    for slot, ids in ((copies[0], [5]), (copies[1], [6, 7]), (document, [8])):
        expected = open_session(tiny_bundle).feed([*range(9), *ids])[0, -1]
        assert_close("runtime.float32", found[slot], expected)
    fresh = slots.add()
    assert fresh not in copies, "a fork is not handed out again"
    assert slots.session.positions[fresh] == 0
    slots.remove(copies[0])
    assert slots.fork(fresh) == [copies[0]], "None takes all that are free"


def test_forks_that_do_not_fit(tiny_bundle: Path) -> None:
    slots = Slots(open_session(tiny_bundle, batch=3))
    slot = slots.add()
    slots.feed({slot: [1, 2]})
    with pytest.raises(ShapeError, match="there are 2 free slots for 3 copies of slot 0; remove"):
        slots.fork(slot, 3)
    for count in (0, -1, 1.5, True, "2"):
        with pytest.raises(ShapeError, match=r"count is .*; expected 1 or more copies, or None"):
            slots.fork(slot, count)  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match="slot 1 is not in use"):
        slots.fork(1)
    assert slots.used == [slot]
    slots.fork(slot)
    with pytest.raises(ShapeError, match="there are 0 free slots for 1 copies"):
        slots.fork(slot)


WRITES: dict[str, Callable[[Session, Path], object]] = {
    "fork": lambda session, path: session.fork(0, [1, 2]),
    "write_rows": lambda session, path: session.write_rows([1], session.read_rows([0])),
    "state": lambda session, path: setattr(session, "state", session.state),
    "load_state": lambda session, path: session.load_state(path),
    "feed": lambda session, path: session.feed([[1], [2], [3]], last_only=True),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_rows_that_are_free_get_no_text_behind_the_slots_back(
    tiny_bundle: Path, tmp_path: Path, write: Callable[[Session, Path], object]
) -> None:
    session = open_session(tiny_bundle, batch=3)
    session.save_state(tmp_path / "three.state")
    slots = Slots(session)
    first = slots.add()
    slots.feed({first: [1, 2]})
    before = session.state
    with pytest.raises(ShapeError, match="would give a text to row 1, which is free in the Slots"):
        write(session, tmp_path / "three.state")
    assert session.positions == [2, 0, 0]
    assert all(np.array_equal(session.state[name], before[name]) for name in before)
    session.feed([[5], [0], [0]], lengths=[1, 0, 0])  # rows in use may be fed directly
    slots.add(), slots.add()
    write(session, tmp_path / "three.state")  # as may all, once none is free


def test_two_slots_do_not_hand_out_the_same_rows(tiny_bundle: Path) -> None:
    session = open_session(tiny_bundle, batch=2)
    slots = Slots(session)
    with pytest.raises(ShapeError, match="handed out by other Slots; use those, or open another"):
        Slots(session)
    slot = slots.add()
    del slots
    again = Slots(session)  # nobody holds the first any more
    assert again.used == []
    assert again.add() == slot


def test_slots_show_which_are_in_use(tiny_bundle: Path) -> None:
    slots = Slots(open_session(tiny_bundle, batch=12))
    assert repr(slots) == "<Slots: 0 of 12 in use: []>"
    for _ in range(10):
        slots.add()
    slots.remove(1)
    assert repr(slots) == "<Slots: 9 of 12 in use: [0, 2, 3, 4, 5, 6, 7, 8, ...]>"


def test_wrong_use_is_named(tiny_bundle: Path) -> None:
    slots = Slots(open_session(tiny_bundle, batch=2))
    slot = slots.add()
    with pytest.raises(ShapeError, match=r"slot 1 is not in use; those in use are \[0\]"):
        slots.feed({1: [1]})
    with pytest.raises(ShapeError, match="slot 7 is not in use"):
        slots.remove(7)
    with pytest.raises(ShapeError, match=r"tokens of slot 0 have shape \[0\]"):
        slots.feed({slot: []})
    with pytest.raises(ShapeError, match="tokens is empty; expected token ids"):
        slots.feed({})
    with pytest.raises(ShapeError, match=r"label_weights of slot 0 have shape \[2\]"):
        slots.feed({slot: [1]}, {slot: [1, 1]})
    with pytest.raises(TokenError, match="tokens of slot 0 are bool; expected whole numbers"):
        slots.feed({slot: np.array([True])})
    with pytest.raises(TokenError, match=f"token id {2**63} of slot 0 is out of range"):
        slots.feed({slot: [2**63]})
    with pytest.raises(StateError, match="lacks the tensor"):
        slots.add({})
    assert slots.used == [0], "the slot stays free if its state is refused"
    slots.add()
    with pytest.raises(ShapeError, match="all 2 slots are in use; remove one"):
        slots.add()
