"""How much a session may learn: bounds of weights and norms, and what happens at them."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fwl_export import Slots, open_session
from fwl_export.bundle.defaults import DEFAULT_MAX_LEARNING_WEIGHT
from fwl_export.errors import (
    ConfigError,
    NotFiniteError,
    StateError,
    TokenError,
    UpdateNormError,
)
from fwl_export.runtimes import Session
from tests.bundles import MAX_TOKENS, VOCABULARY
from tests.cli.run import run

RUNTIMES = ("onnxruntime", "torch", "onnx-reference")


@pytest.fixture(params=RUNTIMES)
def runtime(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def ids(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCABULARY, shape)


def same_state(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return all(np.array_equal(a[name], b[name]) for name in a)


def expected_norms(session: Session) -> dict[str, np.ndarray]:
    """The Frobenius norms of the fast weights, in float64 and by another way."""
    return {
        name: np.linalg.norm(array.astype(np.float64).reshape(session.batch, -1), axis=1)
        for name, array in session.state.items()
        if name.startswith("fast.")
    }


def refuses(session: Session, kind: type[Exception], message: str, *arguments: Any) -> None:
    before, positions = session.state, session.positions
    with pytest.raises(kind, match=re.escape(message)):
        session.feed(*arguments)
    assert same_state(before, session.state)
    assert session.positions == positions


def test_a_weight_above_the_limit_is_refused(anchored_bundle: Path, runtime: str) -> None:
    session = open_session(anchored_bundle, runtime, batch=2)
    session.feed(ids(2, 5))
    weights = np.ones((2, 20))
    weights[1, 17] = 1e4
    token = ids(2, 20)[1, 17]
    message = (
        f"the label weight 10000 of token id {token} (row 1, position 17) times the row's "
        "learning_rate_scale 1 is 10000, but max_learning_weight is 10; use smaller weights, or "
        "open the session with a larger max_learning_weight"
    )
    refuses(session, TokenError, message, ids(2, 20), weights)
    weights[1, 17] = 10
    session.feed(ids(2, 20), weights)  # the limit itself is allowed
    assert session.limits.max_learning_weight == DEFAULT_MAX_LEARNING_WEIGHT == 10


def test_the_limit_is_that_of_the_product(tiny_bundle: Path) -> None:
    session = open_session(tiny_bundle, batch=2, max_learning_weight=6)
    session.learning_rate_scale = [0.1, 3]
    session.feed(ids(2, 2), [[60, 0.5], [2, 2]])
    refuses(session, TokenError, "is 6.01, but", ids(2, 2), [[60.1, 0.5], [1, 1]])
    refuses(session, TokenError, "learning_rate_scale 3 is 6.3", ids(2, 2), [[1, 1], [1, 2.1]])
    exact = open_session(tiny_bundle, max_learning_weight=1.1)
    exact.feed([1], [1.1])  # the limit is rounded to float32 as the weights are
    open_session(tiny_bundle, max_learning_weight=1e300).feed([1], [1e9])
    # The product is rounded as the model rounds it: one tenth of 60 is 6 in float32.
    session.feed(ids(2, 1), np.float32([[60], [2]]))


def test_weights_at_padding_do_not_count(tiny_bundle: Path) -> None:
    session = open_session(tiny_bundle, batch=2)
    session.feed(ids(2, 3), [[1, 1, 1e9], [np.nan, np.nan, np.nan]], lengths=[2, 0])
    assert session.positions == [2, 0]


def test_a_scale_above_the_limit_is_refused_at_once(tiny_bundle: Path) -> None:
    session = open_session(tiny_bundle, batch=2)
    message = (
        "the learning_rate_scale of row 1 is 10.5, but max_learning_weight is 10; use a smaller "
        "scale, or open the session with a larger max_learning_weight"
    )
    with pytest.raises(ConfigError, match=re.escape(message)):
        session.learning_rate_scale = [1, 10.5]
    assert session.learning_rate_scale.tolist() == [1, 1]
    session.learning_rate_scale = 10
    # A limit below 1 would refuse texts without weights, so it is refused itself.
    with pytest.raises(ConfigError, match="learning_rate_scale of row 0 is 1, but max_learning_we"):
        open_session(tiny_bundle, max_learning_weight=0.5)


def test_a_limit_may_be_lifted_and_is_inherited(tiny_bundle: Path) -> None:
    free = open_session(tiny_bundle, max_learning_weight=math.inf, max_update_norm=1e30)
    for session in (free, free.another(batch=1)):
        session.learning_rate_scale = 500
        session.feed([1, 2, 3], [1, 2, 3])
        assert session.limits == free.limits
    strict = open_session(tiny_bundle, max_learning_weight=2).another(batch=3)
    slots = Slots(strict)
    a, b = slots.add(), slots.add()
    before = strict.state
    with pytest.raises(TokenError, match=r"row 1, position 1\).* is 3, but max_learning_weight i"):
        slots.feed({a: [1], b: [2, 3]}, {b: [1, 3]})
    assert same_state(before, strict.state)


@pytest.mark.parametrize("wrong", [0, -1, math.nan, "10", None, True, [10.0], 10j])
@pytest.mark.parametrize("name", ["max_learning_weight", "max_update_norm"])
def test_a_limit_is_a_positive_number(tiny_bundle: Path, name: str, wrong: Any) -> None:
    with pytest.raises(ConfigError, match=f"{name} is .*; expected a number above 0, or math.inf"):
        open_session(tiny_bundle, **{name: wrong})


@pytest.mark.parametrize("bundle", ["tiny_bundle", "tiny_bundle_fp16", "anchored_bundle"])
def test_learned_tells_the_norms_of_every_row(
    request: pytest.FixtureRequest, bundle: str, runtime: str
) -> None:
    session = open_session(request.getfixturevalue(bundle), runtime, batch=3)
    assert session.learned().norms == [0, 0, 0]
    session.feed(ids(3, 20), lengths=[20, 0, 7])
    found = session.learned()
    expected = expected_norms(session)
    assert list(found.tensors) == list(expected)
    for name, values in expected.items():
        np.testing.assert_allclose(found.tensors[name], values, rtol=1e-5, err_msg=name)
    total = np.sqrt(sum(values**2 for values in expected.values()))
    # Both add squares of float32 numbers, in another order.
    np.testing.assert_allclose(found.norms, total, rtol=1e-5)
    assert found.norms[0] > 0 == found.norms[1]
    assert json.loads(json.dumps(dataclasses.asdict(found))) == dataclasses.asdict(found)
    session.reset([0])
    assert session.learned().norms == [0, 0, found.norms[2]]
    session.feed(ids(3, 5), np.zeros((3, 5)))
    assert session.learned().norms[2] == found.norms[2], "weights of 0 change nothing"


def test_norms_whose_squares_overflow_are_told(tiny_bundle: Path) -> None:
    session = open_session(tiny_bundle)
    state = session.state
    state["fast.up.kernel"][:] = 1e30
    session.state = state
    size = state["fast.up.kernel"].size
    assert session.learned().norms[0] == pytest.approx(1e30 * math.sqrt(size), rel=1e-6)


@pytest.mark.parametrize("bundle", ["tiny_bundle", "tiny_bundle_fp16", "anchored_bundle"])
def test_a_row_that_learns_too_much_is_refused(
    request: pytest.FixtureRequest, bundle: str, runtime: str
) -> None:
    folder = request.getfixturevalue(bundle)
    free = open_session(folder, runtime, batch=2, max_learning_weight=math.inf)
    text = ids(2, 3 * MAX_TOKENS)  # several calls of the model
    free.feed(text)
    limit = 1.5 * max(free.learned().norms)
    session = open_session(
        folder, runtime, batch=2, max_learning_weight=math.inf, max_update_norm=limit
    )
    session.feed(text)
    weights = np.ones(text.shape)
    weights[1, -3] = 60  # in the last of these calls; with 300, float16 overflows
    message = "what row 1 would have learned has the norm "
    refuses(session, UpdateNormError, message, text, weights)
    refuses(session, UpdateNormError, message, text[:, -5:], weights[:, -5:])
    # The session goes on as if nothing had happened.
    np.testing.assert_array_equal(session.feed(text), free.feed(text))
    assert same_state(session.state, free.state)


def test_a_state_that_has_learned_too_much_is_refused(tiny_bundle: Path, tmp_path: Path) -> None:
    poisoned = open_session(tiny_bundle, max_learning_weight=math.inf)
    poisoned.feed(ids(4), [1, 1e4, 1, 1])
    poisoned.save_state(tmp_path / "poisoned.state")
    session = open_session(tiny_bundle, batch=2, max_update_norm=1e3)
    session.feed(ids(2, 3))
    before = session.state
    message = r"what row 0 of this state has learned has the norm .*, but max_update_norm is 1000"
    with pytest.raises(StateError, match=message):
        session.load_state(tmp_path / "poisoned.state", rows=[1])
    with pytest.raises(StateError, match=message):
        session.write_rows([0], poisoned.state)
    assert same_state(before, session.state)
    Slots(session).add(session.read_rows([1]))  # what it learned itself fits


def test_sums_that_overflow_move_no_row(anchored_bundle: Path, runtime: str) -> None:
    random = np.random.default_rng(0)
    session = open_session(anchored_bundle, runtime, batch=2, max_learning_weight=math.inf)
    session.feed(ids(2, 9))
    refused = 0
    for seed in range(12):
        before, positions = session.state, session.positions
        weights = 10.0 ** random.uniform(30, 38, (2, 30)) * (random.random((2, 30)) < 0.3)
        try:
            session.feed(ids(2, 30, seed=seed), weights, last_only=bool(seed % 2))
        except NotFiniteError:
            refused += 1
            assert same_state(before, session.state)
            assert session.positions == positions
        assert all(np.isfinite(array).all() for array in session.state.values())
    assert refused > 6


def test_clipping_keeps_the_norm_and_spares_other_rows(anchored_bundle: Path, runtime: str) -> None:
    usual = open_session(anchored_bundle, runtime, batch=2)
    session = open_session(anchored_bundle, runtime, batch=2, clip_update_norm=30.0)
    text, weights = ids(2, 32), np.ones((2, 32))
    weights[0] = 9.0
    for each in (usual, session):
        each.feed(text, weights)
    assert usual.learned().norms[0] > 60
    assert usual.learned().norms[1] < 30
    assert session.learned().norms[0] == pytest.approx(30, rel=1e-5)
    for name, array in session.state.items():
        right = usual.state[name][1]
        # Calls end at other tokens while clipping, so float32 sums have another order.
        np.testing.assert_allclose(array[1], right, rtol=1e-5, atol=1e-5, err_msg=name)
    # All that was learned becomes smaller by the same factor, which is itself rounded to float32.
    (factor,) = np.array([30.0]) / usual.learned().norms[0]
    np.testing.assert_allclose(
        session.state["fast.down.kernel"][0],
        usual.state["fast.down.kernel"][0] * factor,
        rtol=1e-4,
        atol=1e-4,
    )


def test_clipping_does_not_depend_on_how_a_text_is_split(
    anchored_bundle: Path, runtime: str
) -> None:
    whole, parts = (
        open_session(anchored_bundle, runtime, batch=2, clip_update_norm=5.0) for _ in range(2)
    )
    text, start = ids(2, 75), 0
    for each in (whole, parts):
        each.feed(text[:, :9], lengths=[9, 4])
    logits = whole.feed(text)
    found = []
    for size in (1, 31, 2, 30, 11):
        found.append(parts.feed(text[:, start : start + size]))
        start += size
    np.testing.assert_allclose(np.concatenate(found, 1), logits, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(parts.learned().norms, whole.learned().norms, rtol=1e-4)


def test_sums_are_clipped_before_they_are_refused(anchored_bundle: Path) -> None:
    limits = {"clip_update_norm": 5.0, "max_update_norm": 40.0}
    session = open_session(anchored_bundle, **limits)
    for seed in range(6):
        session.feed(ids(1, 40, seed=seed))
    with pytest.raises(UpdateNormError):
        session.feed(ids(1, 20), np.full((1, 20), 9.0))
    again = session.another(2)
    assert again.limits.clip_update_norm == 5.0
    again.feed(ids(2, 64))
    assert max(again.learned().norms) <= 5.0001


@pytest.mark.parametrize("wrong", [0, -1.0, math.nan, True, "5"])
def test_a_wrong_norm_to_clip_to_is_refused(anchored_bundle: Path, wrong: Any) -> None:
    with pytest.raises(ConfigError, match=r"clip_update_norm is .*; expected a number above 0"):
        open_session(anchored_bundle, clip_update_norm=wrong)


def test_a_poisoned_row_is_rolled_back(anchored_bundle: Path) -> None:
    session, undisturbed = (open_session(anchored_bundle, batch=2) for _ in range(2))
    for each in (session, undisturbed):
        each.feed(ids(2, 20))
    checkpoint, usual = session.read_rows([1]), session.learned().norms[1]
    session.feed(ids(2, 40, seed=1), np.full((2, 40), 10.0), lengths=[0, 40])
    assert session.learned().norms[1] > 2 * usual
    session.write_rows([1], checkpoint)
    assert session.learned().norms[1] == usual
    text = ids(2, 20, seed=2)
    np.testing.assert_array_equal(session.feed(text), undisturbed.feed(text))


def test_the_command_line_has_the_same_limit(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text("ABAB")
    scale = ("--learning-rate-scale", "10.5")
    verbs: list[list[Any]] = [
        ["score"],
        ["read", "-o", tmp_path / "x.state"],
        ["generate", "--prompt", "A"],
    ]
    for verb in verbs:
        files = [] if verb[0] == "generate" else [tmp_path / "text.txt"]
        done = run(capsys, verb[0], tiny_bundle, *files, *verb[1:], *scale)
        assert done.code != 0, verb
        assert "--learning-rate-scale" in done.err + done.out
    assert not (tmp_path / "x.state").exists()
