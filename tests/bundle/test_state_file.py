"""State files: complete or refused, the same for every runtime, and as small as they report."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fwl_export import open_session
from fwl_export.bundle import state_file
from fwl_export.bundle.state import State, TensorSpec
from fwl_export.bundle.state_file import COMPRESSIONS, checksum, load_state, save_state
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


def test_a_file_changed_at_any_byte_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.state"
    small = [TensorSpec("position", (), "int64"), TensorSpec("fast.x", (3,), "float32")]
    state = {"position": np.array([4]), "fast.x": np.ones((1, 3), np.float32)}
    save_state(path, small, state, "abc")
    content = path.read_bytes()
    for place, bit in itertools.product(range(len(content)), (0x01, 0x10, 0x20, 0x80)):
        changed = bytearray(content)
        changed[place] ^= bit
        path.write_bytes(changed)
        with pytest.raises(StateError):
            load_state(path, small, "abc")


def parsed(path: Path) -> tuple[dict[str, Any], bytes]:
    """Return header and data of a safetensors file."""
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def write(path: Path, header: dict[str, Any] | str, data: bytes) -> None:
    """Write a safetensors file byte by byte, whether it makes sense or not."""
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def signed(header: dict[str, Any], data: bytes) -> dict[str, Any]:
    """Return the header with the checksum that its content now has, as a forger would."""
    metadata = {k: v for k, v in header["__metadata__"].items() if k != "sha256"}
    numpy_types = {"F32": "<f4", "F16": "<f2", "I64": "<i8"}
    tensors = {
        name: np.frombuffer(data[slice(*e["data_offsets"])], numpy_types[e["dtype"]]).reshape(
            e["shape"]
        )
        for name, e in header.items()
        if name != "__metadata__"
    }
    metadata["sha256"] = checksum(tensors, metadata)
    return {**header, "__metadata__": metadata}


def test_the_checksum_is_the_documented_one(tmp_path: Path) -> None:
    save_state(tmp_path / "a", SPECS, read([7]), "abc", "lowrank")
    header, data = parsed(tmp_path / "a")
    metadata = header.pop("__metadata__")
    assert metadata["version"] == "2"
    digest = hashlib.sha256()
    for name in sorted(header, key=str.encode):
        entry = header[name]
        digest.update(name.encode() + b"\n" + entry["dtype"].encode() + b"\n")
        digest.update(",".join(map(str, entry["shape"])).encode() + b"\n")
        digest.update(data[slice(*entry["data_offsets"])])
    expected = metadata.pop("sha256")
    for key in sorted(metadata, key=str.encode):
        digest.update(f"{key}\n{metadata[key]}\n".encode())
    assert digest.hexdigest() == expected


def test_content_that_was_changed_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.state"
    specs = [*SPECS, TensorSpec("fast.other", (3,), "float32")]
    state = read([7, 5]) | {"fast.other": np.ones((2, 3), np.float32)}
    save_state(path, specs, state, "abc")
    header, data = parsed(path)

    def refused(header: dict[str, Any], data: bytes = data) -> None:
        write(path, header, data)
        with pytest.raises(StateError, match="was changed or damaged after it was saved"):
            load_state(path, specs, "abc")

    flipped = bytearray(data)
    flipped[header["fast.up.kernel"]["data_offsets"][0] + 1] ^= 1
    refused(header, bytes(flipped))
    one, other = header["fast.norm.scale"], header["fast.other"]
    refused(header | {"fast.norm.scale": other, "fast.other": one})
    refused(header | {"__metadata__": header["__metadata__"] | {"tokens": "5,7"}})
    refused(header | {"__metadata__": header["__metadata__"] | {"compress": "fp16"}})
    refused(header | {"__metadata__": header["__metadata__"] | {"more": "x"}})
    no_sum = header | {"__metadata__": _without(header["__metadata__"], "sha256")}
    for incomplete in (no_sum, _said(header, version="1")):
        write(path, incomplete, data)
        with pytest.raises(StateError, match="version 2 has a sha256, and one of version 1 has no"):
            load_state(path, specs, "abc")


def test_a_file_of_version_1_is_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "a.state"
    state = read([7, 5])
    save_state(path, SPECS, state, "abc", "lowrank")
    header, data = parsed(path)
    del header["__metadata__"]["sha256"]
    header["__metadata__"]["version"] = "1"
    write(path, header, data)
    with caplog.at_level("INFO"):
        found = load_state(path, SPECS, "abc")
    assert "is a state file of version 1, which has no checksum" in caplog.text
    assert found["position"].tolist() == [7, 5]
    header["__metadata__"]["version"] = "3"
    write(path, header, data)
    with pytest.raises(StateError, match="version 3, but this fwl-export reads versions 1 to 2"):
        load_state(path, SPECS, "abc")


# Each changes header and data of a good file of 2 rows that was written with "lowrank". A forger
# can write the right checksum, so that the refusal must not rest on it.
Header = dict[str, Any]
MALFORMED: dict[str, tuple[Callable[[Header, bytes], tuple[Header | str, bytes]], str]] = {
    "a gap": (lambda h, d: (_moved(h, "fast.norm.scale", 4), d + bytes(4)), "right after those"),
    "bytes that belong to no tensor": (lambda h, d: (h, d + bytes(8)), "behind its header"),
    "two tensors on the same bytes": (
        lambda h, d: (h | {"position": h["position"] | {"data_offsets": [8, 24]}}, d),
        "right after those",
    ),
    "a key twice": (
        lambda h, d: (json.dumps(h)[:-1] + ', "position": ' + json.dumps(h["position"]) + "}", d),
        "key 'position' occurs more than once",
    ),
    "a metadata key twice": (
        lambda h, d: (json.dumps(h).replace('"rows": "2"', '"rows": "1", "rows": "2"'), d),
        "key 'rows' occurs more than once",
    ),
    "metadata null": (lambda h, d: (h | {"__metadata__": None}, d), "metadata are not text"),
    "a number in the metadata": (lambda h, d: (_said(h, rows=2), d), "metadata are not text"),
    "rows of text": (lambda h, d: (_said(h, rows="two"), d), "say 'two' rows"),
    "no rows": (lambda h, d: (_said(h, rows="0"), d), "say '0' rows"),
    "endless rows": (lambda h, d: (_said(h, rows="9" * 5000), d), "rows; expected 1 or more"),
    "no tokens": (
        lambda h, d: (h | {"__metadata__": _without(h["__metadata__"], "tokens")}, d),
        "lack 'tokens'",
    ),
    "other tokens": (lambda h, d: (_said(h, tokens="7,6"), d), "say tokens 7,6"),
    "an unknown compression": (lambda h, d: (_said(h, compress="zip"), d), "kind of 'compress'"),
    "factors in a plain file": (lambda h, d: (_said(h, compress="none"), d), "it lacks the tensor"),
    "a tensor missing": (lambda h, d: (_without(h, "fast.norm.scale"), d), "it lacks the tensor"),
    "a tensor too many": (
        lambda h, d: (h | {"x": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}, d),
        "a tensor 'x' that this model does not know",
    ),
    "a used part of another rank": (
        lambda h, d: (_shaped(h, "cache.0.key.used", [2, 2 * 7 * 4]), d),
        "expected F32",
    ),
    "a used part longer than the cache": (
        lambda h, d: (_shaped(h, "cache.0.key.used", [2, 1, 56, 1]), d),
        "expected F32",
    ),
    "factors whose ranks differ": (
        lambda h, d: (_shaped(h, "fast.up.kernel.right", [2, 6, 70]), d),
        "expected F32",
    ),
    "a negative size": (lambda h, d: (_shaped(h, "position", [-2]), d), "is malformed"),
    "a size that is a float": (lambda h, d: (_shaped(h, "position", [2.0]), d), "is malformed"),
    "a size that is true": (lambda h, d: (_shaped(h, "position", [True, 2]), d), "is malformed"),
    "a size of 2^64": (lambda h, d: (_shaped(h, "position", [2**64]), d), "is malformed"),
    "a number that is not one": (
        lambda h, d: (json.dumps(h).replace("[2]", "[NaN]", 1), d),
        "NaN is not a finite number",
    ),
    "another type": (
        lambda h, d: (h | {"position": h["position"] | {"dtype": "F64"}}, d),
        "expected I64",
    ),
    "half of a character": (lambda h, d: (_said(h, more="\ud800"), d), "surrogates not allowed"),
    "an entry too many": (
        lambda h, d: (h | {"position": h["position"] | {"more": 1}}, d),
        "is malformed",
    ),
    "a tensor that is text": (lambda h, d: (h | {"position": "7"}, d), "is malformed"),
    "a list": (lambda h, d: ("[]", d), "not a JSON object"),
    "deep nesting": (lambda h, d: ('{"a":' + "[" * 20_000, d), "truncated or changed"),
    "a header of megabytes": (lambda h, d: (json.dumps(h) + " " * (2 << 20), d), "of a state file"),
}


def _moved(header: Header, name: str, by: int) -> Header:
    """Return the header with a tensor, and all behind it, moved by some bytes."""
    first = header[name]["data_offsets"][0]
    return {
        key: entry
        if key == "__metadata__" or entry["data_offsets"][0] < first
        else entry | {"data_offsets": [place + by for place in entry["data_offsets"]]}
        for key, entry in header.items()
    }


def _said(header: Header, **metadata: Any) -> Header:
    return header | {"__metadata__": header["__metadata__"] | metadata}


def _without(data: Header, name: str) -> Header:
    return {key: value for key, value in data.items() if key != name}


def _shaped(header: Header, name: str, shape: list[Any]) -> Header:
    return header | {name: header[name] | {"shape": shape}}


@pytest.mark.parametrize("kind", MALFORMED)
def test_a_malformed_file_is_refused(tmp_path: Path, kind: str) -> None:
    change, words = MALFORMED[kind]
    path = tmp_path / "a.state"
    save_state(path, SPECS, read([7, 5]), "abc", "lowrank")
    header, data = change(*parsed(path))
    if isinstance(header, dict):
        with contextlib.suppress(KeyError, TypeError, ValueError, AttributeError):
            header = signed(header, data)
    write(path, header, data)
    with pytest.raises(StateError) as found:
        load_state(path, SPECS, "abc", rows=2)
    assert words in str(found.value)
    assert "Save" in str(found.value).title()


@pytest.mark.parametrize("compress", COMPRESSIONS)
def test_more_rows_than_expected_are_refused_before_anything_is_allocated(
    tmp_path: Path, compress: str
) -> None:
    path = tmp_path / "a.state"
    save_state(path, SPECS, read([5]), "abc", compress)
    header, data = parsed(path)
    header["__metadata__"]["rows"] = "100000000"
    write(path, signed(header, data), data)
    with pytest.raises(ShapeError, match="holds 100000000 rows, but they would be loaded into 1;"):
        load_state(path, SPECS, "abc", rows=1)
    with pytest.raises(StateError, match=r"need 1122\.\d GB of memory; say how many rows"):
        load_state(path, SPECS, "abc")


# A file of megabytes in which each row takes a few bytes, and which stands for gigabytes.
def test_a_small_file_cannot_ask_for_much_memory(tmp_path: Path) -> None:
    path = tmp_path / "a.state"
    specs = [
        TensorSpec("position", (), "int64"),
        TensorSpec("cache.0.key", (4, 9999, 64), "float32"),
    ]
    rows = 10_000
    shapes = {"position": ("I64", [rows]), "cache.0.key.used": ("F32", [rows, 4, 0, 64])}
    header: Header = {
        name: {"dtype": kind, "shape": shape, "data_offsets": [end - 8 * rows * (end > 0), end]}
        for (name, (kind, shape)), end in zip(shapes.items(), (8 * rows, 8 * rows), strict=True)
    }
    header["cache.0.key.used"]["data_offsets"] = [8 * rows, 8 * rows]
    header["__metadata__"] = {"format": "fwl-state", "version": "2", "model_id": "abc"}
    header["__metadata__"] |= {"rows": str(rows), "tokens": "0,", "compress": "lowrank"}
    write(path, signed(header, bytes(8 * rows)), bytes(8 * rows))
    with pytest.raises(StateError, match=r"need 102\.\d GB of memory"):
        load_state(path, specs, "abc")


@pytest.mark.parametrize("position", [-1, 2**53 + 1, 2**63 - 1])
def test_a_position_out_of_range_is_refused(tmp_path: Path, position: int) -> None:
    path = tmp_path / "a.state"
    state = read([7])
    save_state(path, SPECS, state, "abc")
    with pytest.raises(StateError, match="row 0 at position 7; expected 0 to 6, the largest"):
        load_state(path, SPECS, "abc", max_positions=6)
    header, data = parsed(path)
    begin, end = header["position"]["data_offsets"]
    data = data[:begin] + position.to_bytes(8, "little", signed=True) + data[end:]
    write(path, signed(_said(header, tokens=str(position)), data), data)
    with pytest.raises(StateError, match=f"row 0 at position {position}; expected 0 to 9007199"):
        load_state(path, SPECS, "abc")
    state["position"][:] = position
    with pytest.raises(StateError, match=f"row 0 at position {position}; expected 0 to 9007199"):
        save_state(tmp_path / "b.state", SPECS, state, "abc")


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    places = {
        tmp_path: "a folder",
        tmp_path / "pipe": "a named pipe",
        tmp_path / "link": "a named pipe",
        tmp_path / "socket": "a socket",
        Path("/dev/zero"): "a device",
        Path("/dev/stdin"): "",
    }
    for path, kind in places.items():
        with pytest.raises(StateError, match=f"is {kind}.*; expected a regular file|truncated"):
            load_state(path, SPECS, "abc")
    with pytest.raises(StateError, match="holds a NUL character"):
        load_state(tmp_path / "a\0b", SPECS, "abc")


def test_a_file_that_changes_while_it_is_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.state"
    save_state(path, SPECS, read([7]), "abc")
    content, original = path.read_bytes(), state_file._check_origin
    for other in (content[:-1], content + b"x"):
        path.write_bytes(content)

        def change(*arguments: Any, other: bytes = other) -> None:
            original(*arguments)
            path.write_bytes(other)

        monkeypatch.setattr(state_file, "_check_origin", change)
        with pytest.raises(StateError, match=r"ends too early|grew while it was read"):
            load_state(path, SPECS, "abc")


def test_a_file_without_a_state_of_this_model_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.state"
    save_state(path, SPECS, read([3]), "abc")
    with pytest.raises(StateError, match="was saved from another model"):
        load_state(path, SPECS, "abd")
    with pytest.raises(StateError, match=r"it lacks the tensor 'fast\.more'"):
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
    with pytest.raises(OSError, match="Not a directory"):
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
