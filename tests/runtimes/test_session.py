"""Sessions: the same in ONNX Runtime and PyTorch, atomic, and strict about their arguments."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fwl_export import open_session
from fwl_export.errors import BundleError, ConfigError, ShapeError, StateError, TokenError
from fwl_export.runtimes import Session
from tests.bundles import MAX_TOKENS, VOCABULARY
from tests.tolerances import assert_close

RUNTIMES = ("onnxruntime", "torch")


@pytest.fixture(params=RUNTIMES)
def runtime(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def ids(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCABULARY, shape)


def same_state(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return all(np.array_equal(a[name], b[name]) for name in a)


def test_runtimes_agree_over_uneven_calls(tiny_bundle: Path) -> None:
    sessions = [open_session(tiny_bundle, name, batch=3) for name in RUNTIMES]
    for call, lengths in enumerate(([5, 5, 5], [1, 0, 1], [16, 3, 0], [40, 40, 1], [1, 1, 1])):
        tokens = ids(3, max(lengths), seed=call)
        a, b = (session.feed(tokens, lengths=lengths) for session in sessions)
        assert a.shape == b.shape == (3, max(lengths), VOCABULARY)
        assert a.dtype == b.dtype == np.float32
        assert_close("runtime.float32", a, b)
    for name, array in sessions[0].state.items():
        assert_close("runtime.float32", array, sessions[1].state[name], name)
    assert sessions[0].state["position"].tolist() == [63, 49, 8]


def test_half_precision_agrees_with_float32(tiny_bundle: Path, tiny_bundle_fp16: Path) -> None:
    tokens = ids(2, 48)
    exact = open_session(tiny_bundle, batch=2).feed(tokens)
    half = open_session(tiny_bundle_fp16, batch=2).feed(tokens)
    assert half.dtype == np.float32
    assert not np.array_equal(half, exact)
    assert_close("runtime.float16", half, exact)


def test_a_session_learns(tiny_bundle: Path, runtime: str) -> None:
    tokens = np.tile(ids(12), 4)
    learning = open_session(tiny_bundle, runtime).feed(tokens)
    not_learning = open_session(tiny_bundle, runtime).feed(tokens, np.zeros(len(tokens)))
    np.testing.assert_array_equal(learning[:, 0], not_learning[:, 0])
    assert np.abs(learning - not_learning).max() > 0.05


def test_the_learning_rate_scale_belongs_to_rows(tiny_bundle: Path, runtime: str) -> None:
    tokens = ids(3, 40)
    session = open_session(tiny_bundle, runtime, batch=3)
    plain = session.feed(tokens)
    session.reset()
    session.learning_rate_scale = [1, 0, 3]
    scaled = session.feed(tokens)
    assert_close("runtime.float32", scaled[0], plain[0])
    for row in (1, 2):
        assert np.abs(scaled[row] - plain[row]).max() > 0.05
    off = open_session(tiny_bundle, runtime).feed(tokens[1], np.zeros(40))
    assert_close("runtime.float32", scaled[1], off[0])
    assert session.learning_rate_scale.tolist() == [1, 0, 3], "a reset does not change it"
    session.learning_rate_scale = 0.5
    assert session.learning_rate_scale.tolist() == [0.5] * 3
    with pytest.raises(
        ShapeError, match=re.escape("shape [2]; expected one number, or one for each of the 3")
    ):
        session.learning_rate_scale = [1, 2]
    for wrong in (-1, np.nan, np.inf):
        with pytest.raises(ConfigError, match="expected finite numbers of 0 or more"):
            session.learning_rate_scale = wrong


def test_reads_longer_than_a_call_are_split(tiny_bundle: Path, runtime: str) -> None:
    tokens = ids(2, 5 * MAX_TOKENS + 3)
    whole, parts = (open_session(tiny_bundle, runtime, batch=2) for _ in range(2))
    logits = whole.feed(tokens)
    pieces = [parts.feed(tokens[:, i : i + MAX_TOKENS]) for i in range(0, 83, MAX_TOKENS)]
    np.testing.assert_array_equal(logits, np.concatenate(pieces, 1))
    assert same_state(whole.state, parts.state)


def test_reused_inputs_of_a_call_do_not_leak_into_another(tiny_bundle: Path) -> None:
    # A session reuses the inputs of plain calls, except for the ids; mix them with other calls of
    # the same shape.
    plain = open_session(tiny_bundle, batch=2)
    explicit = open_session(tiny_bundle, batch=2)
    random = np.random.default_rng(2)
    for step in range(60):
        tokens = ids(2, int(random.integers(1, 3)), seed=step)
        size = tokens.shape[1]
        weights = random.random(tokens.shape) if random.random() < 0.3 else None
        lengths = random.integers(0, size + 1, 2) if random.random() < 0.3 else None
        if random.random() < 0.2:
            plain.learning_rate_scale = explicit.learning_rate_scale = random.random(2)
        last_only = bool(random.random() < 0.5)
        found = plain.feed(tokens, weights, lengths, last_only)
        expected = explicit.feed(
            tokens,
            np.ones(tokens.shape) if weights is None else weights,
            np.full(2, size) if lengths is None else lengths,
            last_only,
        )
        assert np.array_equal(found, expected), step
    assert same_state(plain.state, explicit.state)


def test_columns_that_are_padding_in_all_rows_are_not_read(tiny_bundle: Path) -> None:
    tokens = ids(2, MAX_TOKENS + 5)
    session, expected = (open_session(tiny_bundle, batch=2) for _ in range(2))
    logits = session.feed(tokens, lengths=[3, 1])
    assert np.array_equal(logits[:, :3], expected.feed(tokens[:, :3], lengths=[3, 1]))
    assert not logits[:, 3:].any()
    assert same_state(session.state, expected.state)


def test_rows_meet_their_anchors_at_different_times(anchored_bundle: Path) -> None:
    sessions = [open_session(anchored_bundle, name, batch=3) for name in RUNTIMES]
    interval = sessions[0].anchor_interval
    assert 0 < interval < MAX_TOKENS
    assert sessions[0].max_tokens == interval, "no call is longer than that"
    text = ids(3, 50)
    read = [[] for _ in range(3)]
    done = [0, 0, 0]
    for lengths in ([5, 12, 1], [0, 30, 40], [40, 1, 0], [1, 7, 9], [4, 0, 0]):
        tokens = np.full((3, max(lengths)), -1)
        for row, length in enumerate(lengths):
            tokens[row, :length] = text[row, done[row] : done[row] + length]
        a, b = (session.feed(tokens, lengths=lengths) for session in sessions)
        assert_close("runtime.float32", a, b)
        for row, length in enumerate(lengths):
            read[row].append(a[row, :length])
            assert not a[row, length:].any()
            done[row] += length
    assert done == [50, 50, 50]
    together = open_session(anchored_bundle, batch=3).feed(text)
    assert_close("runtime.float32", together, np.stack([np.concatenate(r) for r in read]))
    one_by_one = open_session(anchored_bundle, batch=3)
    single = np.concatenate([one_by_one.feed(text[:, i : i + 1]) for i in range(50)], 1)
    assert_close("runtime.float32", together, single)


def test_a_state_and_a_reset_set_the_position_too(anchored_bundle: Path) -> None:
    a, b = (open_session(anchored_bundle, batch=2) for _ in range(2))
    a.feed(ids(2, 7))
    b.feed(ids(2, 3))
    b.state = a.state
    a.reset([1])
    b.reset([1])
    text = ids(2, 20, seed=1)
    np.testing.assert_array_equal(a.feed(text), b.feed(text))
    fresh = open_session(anchored_bundle, batch=2).feed(text)
    assert_close("runtime.float32", a.feed(text[:, :1])[1], b.feed(text[:, :1])[1])
    assert not np.allclose(fresh[0], b.feed(text)[0])


def test_padding_is_zero_and_its_content_does_not_matter(tiny_bundle: Path, runtime: str) -> None:
    tokens = ids(2, 6)
    garbage = tokens.copy()
    garbage[1, 2:] = -7
    a, b = (open_session(tiny_bundle, runtime, batch=2) for _ in range(2))
    logits = a.feed(tokens, lengths=[6, 2])
    np.testing.assert_array_equal(logits, b.feed(garbage, lengths=[6, 2]))
    assert not logits[1, 2:].any()
    assert same_state(a.state, b.state)


def test_reset_makes_a_row_fresh(tiny_bundle: Path, runtime: str) -> None:
    session = open_session(tiny_bundle, runtime, batch=2)
    first = session.feed(ids(2, 7))
    session.reset([0])
    again = session.feed(ids(2, 7))
    np.testing.assert_array_equal(again[0], first[0])
    assert not np.array_equal(again[1], first[1])
    session.reset()
    np.testing.assert_array_equal(session.feed(ids(2, 7)), first)
    with pytest.raises(ShapeError, match=r"rows are \[0.5\]; expected whole numbers"):
        session.reset([0.5])  # type: ignore[list-item]


def test_state_moves_between_runtimes(tiny_bundle: Path) -> None:
    a, b = (open_session(tiny_bundle, name) for name in RUNTIMES)
    a.feed(ids(30))
    b.state = a.state
    assert_close("runtime.float32", a.feed(ids(9, seed=1)), b.feed(ids(9, seed=1)))


def test_last_only_gives_the_last_of_all_logits(anchored_bundle: Path, runtime: str) -> None:
    every, last = (open_session(anchored_bundle, runtime, batch=3) for _ in range(2))
    for call, lengths in enumerate(([5, 1, 40], [7, 0, 3], [1, 1, 1], [30, 2, 0])):
        tokens = ids(3, max(lengths), seed=call)
        logits = every.feed(tokens, lengths=lengths)
        found = last.feed(tokens, lengths=lengths, last_only=True)
        assert found.shape == (3, VOCABULARY)
        for row, length in enumerate(lengths):
            expected = logits[row, length - 1] if length else np.zeros(VOCABULARY)
            assert_close("runtime.float32", found[row], expected)
    assert same_state(every.state, last.state)


def test_a_fork_continues_like_its_source(anchored_bundle: Path, runtime: str) -> None:
    session = open_session(anchored_bundle, runtime, batch=3)
    session.feed(ids(3, 13))
    before = session.state
    session.fork(1, [0, 2])
    assert session.positions == [13, 13, 13]
    text = np.tile(ids(20, seed=4), (3, 1))
    logits = session.feed(text)
    np.testing.assert_array_equal(logits[0], logits[2])
    np.testing.assert_array_equal(logits[0], logits[1])
    session.state = before
    np.testing.assert_array_equal(session.feed(text)[1], logits[1])
    for rows in ([0, 0], [], [3], [-1]):
        with pytest.raises(ShapeError):
            session.fork(1, rows)


def test_rows_are_written_all_or_none(tiny_bundle: Path) -> None:
    session = open_session(tiny_bundle, batch=2)
    session.feed(ids(2, 5))
    before, runner = session.state, session._runner
    other = {name: np.flip(array, 0).copy() for name, array in before.items()}
    write, calls = runner.write, []

    def failing(buffers: Any, state: Any, rows: Any) -> None:
        calls.append(rows)
        if len(calls) == 1:
            half = {**before, **dict(list(other.items())[:3])}
            write(buffers, half, rows)
            raise KeyboardInterrupt
        write(buffers, state, rows)

    runner.write = failing  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        session.state = other
    assert same_state(session.state, before)
    assert session.positions == before["position"].tolist()


def test_sessions_of_one_model_are_independent(tiny_bundle: Path, runtime: str) -> None:
    first = open_session(tiny_bundle, runtime)
    logits = first.feed(ids(9))
    second = first.another(batch=2)
    np.testing.assert_array_equal(second.feed(np.tile(ids(9), (2, 1)))[0], logits[0])
    assert first.positions == [9]
    first.reset()
    assert second.positions == [9, 9]


def test_threads_share_a_model_and_a_session(tiny_bundle: Path) -> None:
    first = open_session(tiny_bundle, threads=1)
    texts = [ids(60, seed=seed) for seed in range(6)]
    alone = [first.another().feed(text) for text in texts]
    with ThreadPoolExecutor(6) as pool:

        def read(text: np.ndarray) -> np.ndarray:
            session = first.another()
            return np.concatenate([session.feed(part) for part in np.split(text, 12)], 1)

        for expected, found in zip(alone, pool.map(read, texts), strict=True):
            assert_close("runtime.float32", found, expected)

        # In a shared session each call is atomic, and no token is lost.
        shared = first.another(batch=2)
        for _ in pool.map(lambda text: [shared.feed(np.stack([text, text]))], texts):
            pass
        assert shared.positions == [360, 360]
        state = shared.state
        assert all(np.array_equal(array[0], array[1]) for array in state.values())


def test_generate_stops_and_learns(tiny_bundle: Path, runtime: str) -> None:
    sessions = [open_session(tiny_bundle, runtime) for _ in range(3)]
    shown: list[int] = []
    written = list(sessions[0].generate(ids(5), 12, on_token=shown.append))
    assert len(written) == 12
    assert shown == written
    assert sessions[0].positions == [5 + 11]
    tokens = ids(5)
    for token in written:  # each is the most likely token
        assert token == sessions[1].feed(tokens)[0, -1].argmax()
        tokens = np.array([token])
    stop = written[4]
    assert (
        list(sessions[2].generate(ids(5), 12, stop_tokens=[stop]))
        == written[: written.index(stop) + 1]
    )
    silent = open_session(tiny_bundle, runtime)
    list(silent.generate(ids(5), 12, learn=False))
    assert not silent.state["fast.up.kernel"].any()
    with pytest.raises(ShapeError, match="a session of one row; this one has 2"):
        sessions[0].another(2).generate(ids(5), 1)


def test_memory_does_not_grow(tiny_bundle: Path) -> None:
    session = open_session(tiny_bundle)
    for size in (1, 3 * MAX_TOKENS, 1, 2 * MAX_TOKENS, 1, 1):
        session.feed(ids(size))
        assert len(session._spare) == 1
        assert len(session._runner._bound) <= 2  # type: ignore[attr-defined]


WRONG_INPUT: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"tokens": [[1, 2], [1]]}, ShapeError, "tokens are rows of different lengths; pad them, and"),
    ({"tokens": ids(2, 0)}, ShapeError, "tokens have shape [2, 0]; expected [2, T] with T of 1"),
    ({"tokens": ids(3, 4)}, ShapeError, "tokens have shape [3, 4]; expected [2, T]"),
    ({"tokens": ids(4)}, ShapeError, "tokens have shape [4]; expected [2, T]"),
    ({"tokens": np.zeros((2, 4))}, TokenError, "tokens are float64; expected whole numbers"),
    (
        {"tokens": [[1, 2], [3, VOCABULARY]]},
        TokenError,
        "token id 64 (row 1, position 1) is out of range; expected 0 to 63",
    ),
    ({"tokens": [[1, 2], [-1, 3]]}, TokenError, "token id -1 (row 1, position 0)"),
    (
        {"tokens": ids(2, 3), "label_weights": np.ones((2, 2))},
        ShapeError,
        "label_weights have shape [2, 2]; expected [2, 3]",
    ),
    (
        {"tokens": ids(2, 2), "label_weights": [[1, np.nan], [1, 1]]},
        TokenError,
        "label_weights contains nan; expected finite numbers of 0 or more",
    ),
    (
        {"tokens": ids(2, 2), "label_weights": [[1, -1], [1, 1]]},
        TokenError,
        "label_weights contains -1; expected finite numbers of 0 or more",
    ),
    ({"tokens": ids(2, 3), "lengths": [1, 4]}, TokenError, "lengths are [1, 4]; expected 0 to 3"),
    ({"tokens": ids(2, 3), "lengths": [1]}, ShapeError, "expected 2 whole numbers"),
    ({"tokens": ids(2, 3), "lengths": [1.0, 2.0]}, ShapeError, "expected 2 whole numbers"),
]


@pytest.mark.parametrize(("arguments", "kind", "message"), WRONG_INPUT)
def test_wrong_input_moves_no_row(
    tiny_bundle: Path, arguments: dict[str, Any], kind: type[Exception], message: str
) -> None:
    session = open_session(tiny_bundle, batch=2)
    session.feed(ids(2, 5))
    before = session.state
    with pytest.raises(kind, match=re.escape(message)):
        session.feed(**arguments)
    assert same_state(before, session.state)


class Failing:
    """A runner that fails at a given call, after it has overwritten the present buffers.

    Args:
      session: Session whose runner this one wraps and replaces.
      fail_at: Number of the call that fails, counted from 1.
      error: What to raise; None returns NaN instead.
    """

    def __init__(self, session: Session, fail_at: int, error: BaseException | None) -> None:
        self._runner, self._left, self._error = session._runner, fail_at, error
        session._runner = self

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)

    def run(self, *arguments: Any) -> np.ndarray:
        logits = self._runner.run(*arguments)
        self._left -= 1
        if self._left == 0:
            if self._error is not None:
                raise self._error
            logits = np.full_like(logits, np.nan)
        return logits


@pytest.mark.parametrize("fail_at", [1, 2, 3])
@pytest.mark.parametrize("error", [MemoryError(), KeyboardInterrupt(), None])
def test_a_call_that_fails_half_way_moves_no_row(
    tiny_bundle: Path, runtime: str, fail_at: int, error: BaseException | None
) -> None:
    session, undisturbed = (open_session(tiny_bundle, runtime, batch=2) for _ in range(2))
    for each in (session, undisturbed):
        each.feed(ids(2, 5))
    before = session.state
    Failing(session, fail_at, error)
    kind = TokenError if error is None else type(error)
    with pytest.raises(kind, match="not finite" if error is None else None):
        session.feed(ids(2, 3 * MAX_TOKENS))
    assert same_state(before, session.state)
    for seed in (1, 2):  # long enough to use all buffers again
        tokens = ids(2, 3 * MAX_TOKENS, seed=seed)
        np.testing.assert_array_equal(session.feed(tokens), undisturbed.feed(tokens))


def test_a_foreign_state_is_refused(tiny_bundle: Path, runtime: str) -> None:
    session = open_session(tiny_bundle, runtime)
    state = session.state
    with pytest.raises(StateError, match="lacks the tensor 'position'"):
        session.state = {k: v for k, v in state.items() if k != "position"}
    with pytest.raises(StateError, match="was it saved from another model"):
        session.state = {**state, "fast.up.kernel": np.zeros((1, 16, 31), np.float32)}
    poisoned = {**state, "fast.up.kernel": np.full((1, 16, 32), np.nan, np.float32)}
    with pytest.raises(StateError, match="holds NaN or infinite values"):
        session.state = poisoned
    assert same_state(state, session.state)


def test_arguments_of_open_session(tiny_bundle: Path, own_bundle: Path) -> None:
    with pytest.raises(ConfigError, match="runtime 'jax' is unknown; expected onnxruntime, ten"):
        open_session(tiny_bundle, "jax")
    with pytest.raises(ConfigError, match="runtime 'torch' only"):
        open_session(tiny_bundle, precision="fp64")
    with pytest.raises(ConfigError, match="runtime 'onnxruntime' only"):
        open_session(tiny_bundle, "torch", threads=1)
    with pytest.raises(ShapeError, match="batch is 0"):
        open_session(tiny_bundle, batch=0)
    session = open_session(tiny_bundle, batch=2)
    with pytest.raises(ShapeError, match="row 2 does not exist; expected 0 to 1"):
        session.reset([2])


def test_a_session_shows_where_it_stands(tiny_bundle: Path, runtime: str) -> None:
    session = open_session(tiny_bundle, runtime, batch=2)
    session.feed(ids(2, 5), lengths=[5, 3])
    name = {"onnxruntime": "OnnxRuntime", "torch": "Torch"}[runtime]
    assert repr(session) == (
        f"<Session in {name}: batch=2, positions=[5, 3], vocab_size=64, max_tokens=16>"
    )
    assert "positions=[0, 0, 0, 0, 0, 0, 0, 0, ...]" in repr(session.another(9))


def test_float64_is_the_reference(tiny_bundle: Path) -> None:
    session = open_session(tiny_bundle, "torch", precision="fp64")
    assert session.feed(ids(4)).dtype == np.float64
    assert session.state["fast.up.kernel"].dtype == np.float64


def test_a_bundle_without_checkpoint_says_so(own_bundle: Path) -> None:
    import json

    path = own_bundle / "manifest.json"
    data = json.loads(path.read_text())
    data["files"] = {k: v for k, v in data["files"].items() if not k.startswith("checkpoint/")}
    path.write_text(json.dumps(data))
    with pytest.raises(BundleError, match="was exported without its checkpoint"):
        open_session(own_bundle, "torch")
    open_session(own_bundle).feed(ids(3))
