"""What a session says about an output that is not finite, and that it goes on afterwards."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fwl_export import NotFiniteError, Slots, open_session
from fwl_export.bundle.manifest import Bundle
from fwl_export.runtimes import Session
from tests.bundles import MAX_TOKENS, VOCABULARY
from tests.parity import faults
from tests.parity.faults import broken_bundle

REPEATED = 5


@pytest.fixture(scope="module")
def broken(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle that reads texts, but not the same token over and over."""
    fault = faults.update_through_half(1, 64)
    return broken_bundle(tiny_bundle, tmp_path_factory.mktemp("broken") / "b", fault)


def opened(bundle: Bundle, batch: int = 3) -> Session:
    return open_session(bundle, batch=batch, threads=1, plugin="none")


def last_good(bundle: Bundle) -> int:
    """Return how often the token can be read."""
    session = opened(bundle, 1)
    for count in range(400):
        try:
            session.feed([REPEATED])
        except NotFiniteError:
            return count
    raise AssertionError("it never fails")


@pytest.mark.parametrize("wanted", ["all", "last", "some"])
def test_the_error_names_row_token_cause_and_the_way_out(broken: Bundle, wanted: str) -> None:
    count = last_good(broken)
    session = opened(broken)
    text = np.random.default_rng(0).integers(0, VOCABULARY, (3, count + 40))
    session.feed(text[:, :3])
    session.reset([1])
    text[1] = REPEATED
    options = {
        "all": {},
        "last": {"last_only": True},
        "some": {"logit_positions": np.full((3, 1), count + 5)},
    }[wanted]
    before = session.state
    with pytest.raises(NotFiniteError) as error:
        session.feed(text, **options)
    found = error.value
    assert (found.row, found.token, found.position, found.tensor) == (1, count, count, "logits")
    message = str(found)
    assert f"row 1, position {count} of this call (token id {REPEATED}, position {count} of" in (
        message
    )
    assert "the state is finite, but the logits are not; what the row has learned by then" in (
        message
    )
    assert "No row has moved: reset the row, or feed it with smaller label_weights" in message
    assert all(np.array_equal(before[name], array) for name, array in session.state.items())


def test_a_session_goes_on_in_all_rows(broken: Bundle) -> None:
    count = last_good(broken)
    session, undisturbed = opened(broken), opened(broken)
    text = np.random.default_rng(0).integers(0, VOCABULARY, (3, count + 40))
    for each in (session, undisturbed):
        each.feed(text[:, :7])
    bad = text.copy()
    bad[2] = REPEATED
    for _ in range(2):
        with pytest.raises(NotFiniteError):
            session.feed(bad)
    np.testing.assert_array_equal(session.feed(text[:, 7:30]), undisturbed.feed(text[:, 7:30]))


def test_the_position_counts_what_the_row_had_read_before(broken: Bundle) -> None:
    count = last_good(broken)
    session = opened(broken, 1)
    session.feed(np.full(count - 2, REPEATED))
    with pytest.raises(NotFiniteError) as error:
        session.feed(np.full(3 * MAX_TOKENS, REPEATED), last_only=True)
    assert (error.value.token, error.value.position) == (2, count)


def test_a_slot_is_named(broken: Bundle) -> None:
    slots = Slots(opened(broken))
    first, second = slots.add(), slots.add()
    text = {first: np.arange(9), second: np.full(last_good(broken) + 1, REPEATED)}
    with pytest.raises(NotFiniteError, match=f"^slot {second}: "):
        slots.feed(text)
    assert slots.session.positions == [0, 0, 0]
    slots.feed({first: [1], second: [2]})


def test_half_precision_is_named(broken: Bundle) -> None:
    made = opened(broken)
    assert made.spec.precision == "fp32"
    session = Session(made._runner, replace(made.spec, precision="fp16"))
    with pytest.raises(NotFiniteError) as error:
        session.feed(np.full(last_good(broken) + 1, REPEATED))
    message = str(error.value)
    assert "The bundle computes in fp16, in which no float16 number is larger than 65504" in message
    assert "read on without this text" in message


def test_a_state_that_was_wrong_before_is_named(tiny_bundle: Path, tmp_path: Path) -> None:
    fault = faults.not_a_number("fast.down.bias", 20)
    session = open_session(broken_bundle(tiny_bundle, tmp_path / "b", fault), plugin="none")
    session.feed(np.arange(21), logit_positions=[0])  # it is not seen until it is read
    with pytest.raises(NotFiniteError, match=r"state 'fast.down.bias' of the row was not"):
        session.feed([1])
    session.reset([0])
    assert np.isfinite(session.feed([1])).all()
