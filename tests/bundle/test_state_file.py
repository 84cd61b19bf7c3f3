"""State files: complete or refused, the same for every runtime, and as small as they report."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fwl_export import open_session
from fwl_export.bundle.state import State, TensorSpec
from fwl_export.bundle.state_file import COMPRESSIONS, load_state, save_state
from fwl_export.errors import ConfigError, ShapeError, StateError
from tests.bundles import MAX_TOKENS, VOCABULARY
from tests.tolerances import assert_close

SPECS = [
    TensorSpec("position", (), "int64"),
    TensorSpec("cache.0.key", (2, 50, 4), "float32"),
    TensorSpec("fast.up.kernel", (40, 60), "float32"),
    TensorSpec("fast.norm.scale", (3,), "float32"),
]


def ids(size: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCABULARY, size)


def read(tokens: list[int], scale: float = 1.0) -> State:
    """Return a state as it may be after reading.

    Args:
      tokens: Number of tokens that each row has read.
      scale: Size of the writes into the fast weights.
    """
    rng = np.random.default_rng(1)
    rows = len(tokens)
    state = {s.name: np.zeros((rows, *s.shape), s.dtype) for s in SPECS}
    state["position"][:] = tokens
    state["fast.norm.scale"][:] = rng.standard_normal((rows, 3))
    for row, count in enumerate(tokens):
        state["cache.0.key"][row, :, : min(count, 50)] = rng.standard_normal((2, min(count, 50), 4))
        for _ in range(count):
            write = np.outer(rng.standard_normal(40), rng.standard_normal(60))
            state["fast.up.kernel"][row] += np.float32(scale) * write.astype(np.float32)
    return state


@pytest.mark.parametrize("compress", COMPRESSIONS)
@pytest.mark.parametrize("tokens", [[7], [3, 0, 9], [200], [0]])
@pytest.mark.parametrize("scale", [1.0, 1e-12, 1e8])
def test_a_state_comes_back(tmp_path: Path, compress: str, tokens: list[int], scale: float) -> None:
    path = tmp_path / "a.state"
    state = read(tokens, scale)
    saved = save_state(path, SPECS, state, "abc", compress)
    found = load_state(path, SPECS, "abc")
    assert list(found) == list(state)
    assert saved.file_bytes == path.stat().st_size
    assert saved.tokens == tokens
    assert saved.state_bytes == sum(a.nbytes for a in state.values())
    for name, array in state.items():
        assert found[name].dtype == array.dtype
        # float16 rounds by 2^-11. The factors may lose 2^-20 of the Frobenius norm, an error of at
        # most sqrt(40) times as much relative to the largest value here.
        allowed = {"none": 0, "fp16": 2**-11, "lowrank": 40**0.5 * 2**-20}[compress]
        difference = float(np.abs(found[name].astype(float) - array).max())
        largest = float(np.abs(array).max())
        assert difference <= allowed * largest, name
        assert difference <= saved.error * largest * (1 + 1e-12), name


def test_short_reads_are_small(tmp_path: Path) -> None:
    plain = save_state(tmp_path / "a", SPECS, read([5]), "abc").file_bytes
    factors = save_state(tmp_path / "b", SPECS, read([5]), "abc", "lowrank")
    assert factors.file_bytes < plain / 3
    assert load_file(tmp_path / "b")["fast.up.kernel.left"].shape == (1, 40, 5)
    assert save_state(tmp_path / "c", SPECS, read([90]), "abc", "lowrank").error == 0, "no factors"


def test_a_file_cut_at_any_byte_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.state"
    small = [TensorSpec("position", (), "int64"), TensorSpec("fast.x", (3,), "float32")]
    state = {"position": np.array([4]), "fast.x": np.ones((1, 3), np.float32)}
    save_state(path, small, state, "abc")
    content = path.read_bytes()
    for size in range(len(content)):
        path.write_bytes(content[:size])
        with pytest.raises(StateError, match="was truncated or changed"):
            load_state(path, small, "abc")
    path.write_bytes(content + b"x")
    with pytest.raises(StateError, match="was truncated or changed"):
        load_state(path, small, "abc")


def test_a_file_changed_at_any_byte_is_refused_or_still_a_state(tmp_path: Path) -> None:
    path = tmp_path / "a.state"
    small = [TensorSpec("position", (), "int64"), TensorSpec("fast.x", (3,), "float32")]
    state = {"position": np.array([4]), "fast.x": np.ones((1, 3), np.float32)}
    save_state(path, small, state, "abc")
    content = path.read_bytes()
    refused = 0
    for place, bit in itertools.product(range(len(content)), (0x01, 0x20, 0x80)):
        changed = bytearray(content)
        changed[place] ^= bit
        path.write_bytes(changed)
        try:
            found = load_state(path, small, "abc")
        except StateError:
            refused += 1
        else:
            assert found["position"].shape == (1,)
            assert found["fast.x"].shape == (1, 3)
    assert refused > len(content)


def test_a_file_without_a_state_of_this_model_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.state"
    save_state(path, SPECS, read([3]), "abc")
    with pytest.raises(StateError, match="was saved from another model"):
        load_state(path, SPECS, "abd")
    with pytest.raises(StateError, match="lacks a tensor or an entry of its metadata, or has a"):
        load_state(path, [*SPECS, TensorSpec("fast.more", (2,), "float32")], "abc")
    save_file({"x": np.ones(3, np.float32)}, path)
    with pytest.raises(
        StateError, match="is a safetensors file, but not a state file; expected a file"
    ):
        load_state(path, SPECS, "abc")
    path.write_text("{}")
    with pytest.raises(StateError, match="is not a state file"):
        load_state(path, SPECS, "abc")
    with pytest.raises(FileNotFoundError):
        load_state(tmp_path / "b", SPECS, "abc")
    poisoned = read([3])
    poisoned["fast.up.kernel"][0, 0, 0] = np.nan
    with pytest.raises(StateError, match="holds NaN"):
        save_state(path, SPECS, poisoned, "abc")
    with pytest.raises(ConfigError, match="compress is 'zip'; expected none, fp16, lowrank"):
        save_state(path, SPECS, read([3]), "abc", "zip")
    with pytest.raises(OSError, match="File exists"):
        save_state(path / "b", SPECS, read([3]), "abc")


@pytest.mark.parametrize("compress", COMPRESSIONS)
@pytest.mark.parametrize(("first", "second"), [("torch", "onnxruntime"), ("onnxruntime", "torch")])
def test_runtimes_continue_from_each_other(
    anchored_bundle: Path, tmp_path: Path, first: str, second: str, compress: str
) -> None:
    reader = open_session(anchored_bundle, first, batch=2)
    reader.feed(np.stack([ids(21), ids(21, seed=1)]), lengths=[21, 9])
    reader.save_state(tmp_path / "a.state", rows=[1], compress=compress)
    other = open_session(anchored_bundle, second, batch=3)
    other.feed(np.tile(ids(5), (3, 1)))
    before = other.state
    other.load_state(tmp_path / "a.state", rows=[2])
    assert other.positions == [5, 5, 9]
    assert all(np.array_equal(before[n][:2], array[:2]) for n, array in other.state.items())
    text = ids(2 * MAX_TOKENS, seed=2)
    expected = reader.feed(np.stack([text, text]))[1]
    found = other.feed(np.stack([text] * 3))[2]
    # float16 keeps 11 bits of the fast weights.
    assert_close("runtime.float16" if compress == "fp16" else "runtime.float32", found, expected)
    with pytest.raises(
        ShapeError, match="holds 1 rows, but they would be loaded into 3; name 1 rows"
    ):
        other.load_state(tmp_path / "a.state")


def test_a_process_killed_while_saving_leaves_the_old_file_or_the_new_one(tmp_path: Path) -> None:
    path = tmp_path / "a.state"
    code = """
        import sys
        from tests.bundle.test_state_file import SPECS, read
        from fwl_export.bundle.state_file import save_state
        from pathlib import Path
        states = [read([n]) for n in range(1, 4)]
        print("ready", flush=True)
        while True:
            for state in states:
                save_state(Path(sys.argv[1]), SPECS, state, "abc")
    """
    expected = {n: read([n]) for n in range(1, 4)}
    rng = np.random.default_rng(0)
    for _ in range(5):
        process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(code), path],
            stdout=subprocess.PIPE,
            cwd=Path(__file__).parents[2],
        )
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(0.02 + 0.05 * rng.random())
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
        found = load_state(path, SPECS, "abc")
        state = expected[int(found["position"][0])]
        assert all(np.array_equal(found[name], array) for name, array in state.items())
    save_state(path, SPECS, read([1]), "abc")  # removes the files of killed processes
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.state"]
