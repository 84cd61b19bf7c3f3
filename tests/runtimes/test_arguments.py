"""Absurd arguments get one clear sentence, and change nothing."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fwl_export import Session, Slots, open_session
from fwl_export.errors import BundleError, ConfigError, FwlError, ShapeError, StateError, TokenError
from fwl_export.runtimes.onnxruntime import open_file
from tests.bundles import VOCABULARY

WRONG_TO_OPEN: list[tuple[str, Any, type[FwlError], str]] = [
    ("threads", "2", ConfigError, "threads is '2'; expected a whole number up to 1024, or None"),
    ("threads", True, ConfigError, "threads is True; expected a whole number"),
    ("threads", 2.0, ConfigError, "threads is 2.0; expected a whole number"),
    ("threads", -1, ConfigError, "threads is -1; expected a whole number up to 1024"),
    ("threads", 10**9, ConfigError, "threads is 1000000000; expected a whole number up to 1024"),
    ("threads", 2**70, ConfigError, "expected a whole number up to 1024"),
    ("batch", "2", ShapeError, "batch is '2'; expected 1 to 1048576 rows"),
    ("batch", True, ShapeError, "batch is True; expected 1 to 1048576 rows"),
    ("batch", None, ShapeError, "batch is None; expected 1 to 1048576 rows"),
    ("batch", 1.5, ShapeError, "batch is 1.5; expected 1 to 1048576 rows"),
    ("batch", np.float64(2), ShapeError, "expected 1 to 1048576 rows"),
    ("batch", -3, ShapeError, "batch is -3; expected 1 to 1048576 rows"),
    ("batch", 2**64, ShapeError, "expected 1 to 1048576 rows"),
    ("device", 0, ConfigError, "device is 0; expected a name in quotes, or None"),
    ("device", ["cpu"], ConfigError, "device is ['cpu']; expected a name in quotes, or None"),
    ("device", "gpu", ConfigError, "device is 'gpu'; expected cpu, cuda, or a numbered GPU"),
    ("plugin", True, ConfigError, "plugin is True; expected auto, none, required, or the path"),
    ("plugin", None, ConfigError, "plugin is None; expected auto, none, required, or the path"),
    ("precision", 16, ConfigError, "precision is 16; expected a name in quotes, or None"),
    ("precision", ["fp64"], ConfigError, "precision is ['fp64']; expected a name in quotes"),
    ("runtime", None, ConfigError, "runtime is None; expected a name in quotes"),
    ("runtime", ["torch"], ConfigError, "runtime is ['torch']; expected a name in quotes"),
    ("variant", 10, ConfigError, "variant is 10; expected a name in quotes, or None"),
    ("cuda_graph", "no", ConfigError, "cuda_graph is 'no'; expected True or False"),
    ("bundle", None, ConfigError, "bundle is None; expected the path of a folder"),
    ("bundle", b"bundle", ConfigError, "bundle is b'bundle'; expected the path of a folder"),
]


@pytest.mark.parametrize(("name", "value", "kind", "message"), WRONG_TO_OPEN)
def test_open_session_refuses(
    tiny_bundle: Path, name: str, value: Any, kind: type[FwlError], message: str
) -> None:
    with pytest.raises(kind, match=re.escape(message)):
        open_session(**{"bundle": tiny_bundle, name: value})


def test_numbers_of_other_types_are_taken(tiny_bundle: Path) -> None:
    session = open_session(str(tiny_bundle), batch=np.int64(2), threads=np.int32(1))  # type: ignore[arg-type]
    session.feed(np.zeros((2, 3), np.uint8), np.ones((2, 3), bool), np.array([3, 1], np.uint64))
    assert session.positions == [3, 1]
    assert session.another().batch == 1


def test_more_rows_than_fit_into_memory(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = open_session(tiny_bundle)

    def full(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(type(session._runner), "new_buffers", full)
    with pytest.raises(ShapeError, match=r"batch is 1000000, for which the state takes \d+\.\d GB"):
        session.another(1_000_000)


WRONG_CALLS: list[tuple[Callable[[Session], Any], type[FwlError], str]] = [
    (lambda s: s.feed("ab"), ShapeError, "tokens have shape []"),
    (lambda s: s.feed(None), ShapeError, "tokens have shape []"),
    (lambda s: s.feed([["a"], ["b"]]), TokenError, "tokens are <U1; expected whole numbers"),
    (lambda s: s.feed([[True], [False]]), TokenError, "tokens are bool; expected whole numbers"),
    (lambda s: s.feed([[2**80], [1]]), TokenError, "tokens are object; expected whole numbers"),
    (lambda s: s.feed(np.uint64([[2**64 - 1], [1]])), TokenError, "is out of range; expected 0 to"),
    (lambda s: s.feed([[1], [2]], "one"), ShapeError, "label_weights is <U3; expected real"),
    (lambda s: s.feed([[1], [2]], [[1j], [1]]), ShapeError, "label_weights is complex128"),
    (lambda s: s.feed([[1], [2]], [[None], [1]]), ShapeError, "label_weights is object"),
    (
        lambda s: s.feed([[1], [2]], [[1], [1, 2]]),
        ShapeError,
        "label_weights are rows of different lengths",
    ),
    (lambda s: s.feed([[1], [2]], 1.0), ShapeError, "label_weights have shape []"),
    (lambda s: s.feed([[1], [2]], [[1e300], [1]]), TokenError, "label_weights contains inf"),
    (lambda s: s.feed([[1], [2]], [[np.inf], [1]]), TokenError, "label_weights contains inf"),
    (lambda s: s.feed([[1], [2]], [[-1e-9], [1]]), TokenError, "label_weights contains -1e-09"),
    (lambda s: s.feed([[1], [2]], None, [True, True]), ShapeError, "lengths are bool [2]"),
    (
        lambda s: s.feed([[1], [2]], None, [[1], [1, 2]]),
        ShapeError,
        "lengths are rows of different",
    ),
    (lambda s: s.feed([[1], [2]], None, "12"), ShapeError, "expected 2 whole numbers"),
    (lambda s: s.feed([[1], [2]], None, [-1, 1]), TokenError, "lengths are [-1, 1]"),
    (lambda s: s.feed([[1], [2]], None, [2**62, 1]), TokenError, "expected 0 to 1"),
    (lambda s: s.feed([[1], [2]], last_only="no"), ShapeError, "last_only is 'no'; expected True"),
    (lambda s: s.feed([[1], [2]], last_only=[1]), ShapeError, "last_only is [1]; expected True"),
    (lambda s: s.feed([[1], [2]], logit_positions="0"), TokenError, "logit_positions are <U1"),
    (
        lambda s: s.feed([[1], [2]], logit_positions=[True]),
        TokenError,
        "logit_positions are bool; expected whole numbers",
    ),
    (
        lambda s: s.feed([[1], [2]], logit_positions=[0.0]),
        TokenError,
        "logit_positions are float64",
    ),
    (
        lambda s: s.feed([[1], [2]], logit_positions=[[0], [0, 0]]),
        ShapeError,
        "logit_positions are rows of",
    ),
    (lambda s: s.feed([[1], [2]], logit_positions=[[[0]]]), ShapeError, "logit_positions"),
    (
        lambda s: s.feed([[1], [2]], logit_positions=np.zeros((2, 0), int)),
        ShapeError,
        "logit_positions have shape [2, 0]",
    ),
    (lambda s: s.feed([[1], [2]], logit_positions=0), ShapeError, "logit_positions"),
    (lambda s: s.feed([[1], [2]], logit_positions=[[-1], [0]]), TokenError, "expected 0 to 0"),
    (lambda s: s.feed([[1], [2]], logit_positions=[[1], [0]]), TokenError, "expected 0 to 0"),
    (
        lambda s: s.feed([[1], [2]], logit_positions=[[2**63 - 1], [0]]),
        TokenError,
        "expected 0 to 0",
    ),
    (
        lambda s: s.feed([[1], [2]], logit_positions=[[2**70], [0]]),
        TokenError,
        "logit_positions are object",
    ),
    (
        lambda s: s.feed([[1], [2]], last_only=True, logit_positions=[0]),
        ConfigError,
        "give only one",
    ),
    (lambda s: s.reset(True), ShapeError, "rows is True; expected a list of whole numbers"),
    (lambda s: s.reset(0), ShapeError, "rows is 0; expected a list of whole numbers"),
    (lambda s: s.reset([True]), ShapeError, "rows are [True]; expected whole numbers"),
    (lambda s: s.reset([0.0]), ShapeError, "rows are [0.0]; expected whole numbers"),
    (lambda s: s.reset("01"), ShapeError, "rows are ['0', '1']; expected whole numbers"),
    (lambda s: s.reset([-1]), ShapeError, "row -1 does not exist; expected 0 to 1"),
    (lambda s: s.reset([0, 0]), ShapeError, "rows are [0, 0]; expected one or more rows, each"),
    (lambda s: s.reset([2**70]), ShapeError, "does not exist; expected 0 to 1"),
    (lambda s: s.read_rows([]), ShapeError, "expected one or more rows, each once"),
    (lambda s: s.fork(True, [1]), ShapeError, "rows are [True]; expected whole numbers"),
    (lambda s: s.fork(0, [1, 1]), ShapeError, "expected one or more rows, each once"),
    (lambda s: s.another(0), ShapeError, "batch is 0; expected 1 to 1048576 rows"),
    (lambda s: s.another("2"), ShapeError, "batch is '2'; expected 1 to 1048576 rows"),
    (lambda s: s.another().generate([1], -1), ConfigError, "count is -1; expected a whole number"),
    (lambda s: s.another().generate([1], "5"), ConfigError, "count is '5'; expected a whole numb"),
    (lambda s: s.another().generate([1], 1, 0.8), ConfigError, "sampler is 0.8; expected a Samp"),
    (lambda s: s.another().generate([1], 1, stop_tokens=0), ShapeError, "stop_tokens is 0; expec"),
    (lambda s: s.another().generate([1], 1, stop_tokens="0"), ShapeError, "stop_tokens are '0'"),
    (lambda s: s.another().generate([1], 1, learn="no"), ConfigError, "learn is 'no'; expected Tr"),
    (lambda s: s.another().generate([[1], [1, 2]], 1), ShapeError, "prompt are rows of different"),
    (lambda s: s.save_state(3), ConfigError, "path is 3; expected the path of a file"),
    (lambda s: s.save_state("x", compress=[]), ConfigError, "compress is []; expected a name in"),
    (lambda s: s.load_state(None), ConfigError, "path is None; expected the path of a file"),
    (lambda s: s.write_rows([0], [1]), StateError, "the state is a list; expected arrays by name"),
    (lambda s: setattr(s, "state", None), StateError, "the state is a NoneType; expected arrays"),
    (lambda s: setattr(s, "learning_rate_scale", "1"), ShapeError, "learning_rate_scale is <U1"),
    (lambda s: setattr(s, "learning_rate_scale", None), ShapeError, "learning_rate_scale is obj"),
    (lambda s: setattr(s, "learning_rate_scale", [[1, 1]]), ShapeError, "has shape [1, 2]"),
    (lambda s: setattr(s, "learning_rate_scale", 1e300), ConfigError, "expected finite numbers"),
]


@pytest.mark.parametrize(("call", "kind", "message"), WRONG_CALLS)
def test_a_session_refuses(
    tiny_bundle: Path, call: Callable[[Session], Any], kind: type[FwlError], message: str
) -> None:
    session = open_session(tiny_bundle, batch=2)
    session.feed([[1, 2, 3], [4, 5, 6]])
    before, scale = session.state, session.learning_rate_scale
    with pytest.raises(kind, match=re.escape(message)):
        call(session)
    for name, array in session.state.items():
        np.testing.assert_array_equal(array, before[name], name)
    assert session.positions == [3, 3]
    assert session.learning_rate_scale.tolist() == scale.tolist()


@pytest.mark.parametrize("name", ["position", "fast.up.kernel", "cache.0.key", "pending.valid"])
@pytest.mark.parametrize(
    "spoil",
    [
        lambda a: a.astype(np.float16 if a.dtype.kind == "f" else np.int32),
        lambda a: a.astype(object),
        lambda a: a.tolist(),
        lambda a: None,
        lambda a: a[..., None],
        lambda a: a[:0],
        lambda a: np.full_like(a, np.nan) if a.dtype.kind == "f" else np.full_like(a, -1),
        lambda a: np.full_like(a, -np.inf) if a.dtype.kind == "f" else np.full_like(a, 2**63 - 1),
        lambda a: a * np.nan if a.dtype.kind == "f" else np.full_like(a, 2**53 + 1),
    ],
)
def test_a_spoiled_state_is_refused(
    tiny_bundle: Path, name: str, spoil: Callable[[np.ndarray], Any]
) -> None:
    session = open_session(tiny_bundle, batch=2)
    session.feed([[1, 2, 3], [4, 5, 6]])
    before = session.state
    with pytest.raises(StateError):
        session.write_rows([0, 1], {**before, name: spoil(before[name])})
    with pytest.raises(StateError):
        session.state = {**before, name: spoil(before[name])}
    for key, array in session.state.items():
        np.testing.assert_array_equal(array, before[key], key)


def test_the_farthest_position(tiny_bundle: Path) -> None:
    session = open_session(tiny_bundle)
    session.state = {**session.state, "position": np.array([2**53])}
    session.feed([1, 2, 3])
    assert session.positions == [2**53 + 3]
    state = session.state
    with pytest.raises(StateError, match=r"is at position 9007199254740995; expected 0 to 900719"):
        session.state = state


WRONG_FOR_SLOTS: list[tuple[Callable[[Slots], Any], str]] = [
    (lambda s: s.feed([1, 2]), "tokens is [1, 2]; expected a mapping by slot"),
    (lambda s: s.feed({0: [1]}, [1.0]), "label_weights is [1.0]; expected a mapping by slot"),
    (lambda s: s.feed({0: [1]}, {1: 0.0}), "label_weights names {1}, but tokens does not"),
    (lambda s: s.feed({0: [1]}, np.ones((1, 1))), "label_weights is array([[1.]]); expected a map"),
    (lambda s: s.feed({0.5: [1]}), "slot 0.5 is not in use"),
    (lambda s: s.feed({True: [1]}), "slot True is not in use"),
    (lambda s: s.feed({"0": [1]}), "slot '0' is not in use"),
    (lambda s: s.feed({0: [[1], [2, 3]]}), "tokens of slot 0 are rows of different"),
    (lambda s: s.feed({0: [1]}, {0: "a"}), "label_weights is <U1; expected real numbers"),
    (lambda s: s.remove(-1), "slot -1 is not in use"),
    (lambda s: s.remove(2), "slot 2 is not in use"),
]


@pytest.mark.parametrize(("call", "message"), WRONG_FOR_SLOTS)
def test_slots_refuse(tiny_bundle: Path, call: Callable[[Slots], Any], message: str) -> None:
    slots = Slots(open_session(tiny_bundle, batch=3))
    slots.add()
    slots.add()
    with pytest.raises(ShapeError, match=re.escape(message)):
        call(slots)
    assert slots.used == [0, 1]
    assert slots.session.positions == [0, 0, 0]


def test_nothing_is_printed_about_a_fallback(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model.onnx").write_bytes(b"\x08\x0a not a model")
    with pytest.raises(BundleError, match="ONNX Runtime cannot load"):
        open_file(tmp_path / "model.onnx")
    assert capfd.readouterr().out == ""


def test_vocabulary_of_the_tests() -> None:
    assert VOCABULARY == 64, "messages above name it"
