"""State files that somebody changed: libfwl refuses what safetensors and Python's reader refuse."""

from __future__ import annotations

import hashlib
import json
import os
import resource
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import SafetensorError
from safetensors.numpy import load

from attacks.common import read_safetensors, write_safetensors
from fwl_export import open_session
from fwl_export.bundle.state_file import COMPRESSIONS, load_state
from fwl_export.errors import FwlError as PythonError
from tests.libfwl.library import FwlError, Model, Session
from tests.libfwl.test_session import ids, refused
from tests.tolerances import assert_close

# FWL_FUZZ_STATES=1000000 searches for longer.
FILES = int(os.environ.get("FWL_FUZZ_STATES", "4000"))
ROWS = 2

Header = dict[str, Any]
File = tuple[Header, bytes]
Rng = np.random.Generator


def signed(header: Header, data: bytes) -> Header:
    """Return the header with the sha256 that fits it, as state_file.py describes it."""
    digest = hashlib.sha256()
    entries = {k: v for k, v in header.items() if k != "__metadata__"}
    for name in sorted(entries, key=str.encode):
        entry = entries[name]
        first, last = entry["data_offsets"]
        shape = ",".join(map(str, entry["shape"]))
        digest.update(f"{name}\n{entry['dtype']}\n{shape}\n".encode() + data[first:last])
    metadata = {k: v for k, v in header["__metadata__"].items() if k != "sha256"}
    for key in sorted(metadata, key=str.encode):
        digest.update(f"{key}\n{metadata[key]}\n".encode())
    return {**header, "__metadata__": {**metadata, "sha256": digest.hexdigest()}}


# What is put in the place of some value of a header.
VALUES = (
    None, True, False, 0, -1, 1, 2, 3, 8, 1.0, 2.5, 1e300, 2**31, 2**53, 2**62, 2**63, 2**64,
    "", "0", "1", "2", "F32", "F16", "I64", "F64", "BF16", "U8", "I32", "X9", "\ud800", "a\0b",
    "none", "fp16", "lowrank", [], {}, [0], [0, 0], [2], [[2]], [2, 2**62, 4], [-1, 2], [2.0, 3],
)  # fmt: skip


def paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the way to every value inside a value."""
    items: Any = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    for key, inner in items:
        yield (*path, key)
        yield from paths(inner, (*path, key))


def parent_of(header: Header, rng: Rng) -> tuple[Any, Any]:
    """Return a random object or list inside a header, and a key of it."""
    every = list(paths(header))
    *way, key = every[rng.integers(len(every))]
    inner: Any = header
    for step in way:
        inner = inner[step]
    return inner, key


def set_value(header: Header, rng: Rng) -> None:
    inner, key = parent_of(header, rng)
    inner[key] = VALUES[rng.integers(len(VALUES))]


def shift_number(header: Header, rng: Rng) -> None:
    inner, key = parent_of(header, rng)
    if type(inner[key]) is int:
        inner[key] += int(rng.choice([-8, -4, -1, 1, 4, 8, 2**20, 2**32, 2**61]))


def remove_value(header: Header, rng: Rng) -> None:
    inner, key = parent_of(header, rng)
    del inner[key]


def rename_key(header: Header, rng: Rng) -> None:
    inner, key = parent_of(header, rng)
    if isinstance(inner, dict):
        endings = (".half", ".scale", ".left", ".right", ".used", "x", "\n", "\0", " ")
        inner[f"{key}{endings[rng.integers(len(endings))]}"] = inner.pop(key)


def exchange_values(header: Header, rng: Rng) -> None:
    first, key = parent_of(header, rng)
    second, other = parent_of(header, rng)
    first[key], second[other] = second[other], first[key]


def copy_value(header: Header, rng: Rng) -> None:
    inner, key = parent_of(header, rng)
    other, place = parent_of(header, rng)
    value = json.loads(json.dumps(inner[key]))
    if isinstance(other, dict):
        other[f"{place}{rng.integers(3) or ''}"] = value
    else:
        other.append(value)


STRUCTURAL = (set_value, shift_number, remove_value, rename_key, exchange_values, copy_value)


def double_a_key(text: str, rng: Rng) -> str:
    keys = [i for i, c in enumerate(text) if c in "{,"]
    place = keys[rng.integers(len(keys))] + 1
    names = ("__metadata__", "position", "dtype", "shape", "data_offsets", "format", "rows", "new")
    name = names[rng.integers(len(names))]
    values = ('"F32"', "[2]", "[0,16]", '"fwl-state"', '"2"', "{}", "null")
    return f'{text[:place]}"{name}":{values[rng.integers(len(values))]},{text[place:]}'


def insert_text(text: str, rng: Rng) -> str:
    pieces = (" ", "\n", "\t", "\0", "\ufeff", ",", "{", "}", "[", "]", "//x\n", "/**/", "NaN", "-",
              "Infinity", "1e999", "-0", "01", "+1", "0x1", "\\u0000", "\\ud800", "'", '"', "\x01",
              "\x7f", "[" * 200, "{" * 200)  # fmt: skip
    place = int(rng.choice([0, 1, len(text) // 2, len(text), rng.integers(len(text) + 1)]))
    return text[:place] + pieces[rng.integers(len(pieces))] + text[place:]


def change_bytes(content: bytes, rng: Rng) -> bytes:
    changed = bytearray(content)
    end = len(changed) if rng.random() < 0.3 else 8 + int.from_bytes(content[:8], "little")
    for place in rng.integers(0, max(end, 1), rng.integers(1, 4)):
        changed[place] = rng.integers(256)
    return bytes(changed)


def cut(content: bytes, rng: Rng) -> bytes:
    first, last = sorted(rng.integers(0, len(content) + 1, 2))
    return content[:first] + content[last:] if rng.random() < 0.5 else content[:last]


def append(content: bytes, rng: Rng) -> bytes:
    return content + rng.bytes(rng.integers(1, 9))


def claim_length(content: bytes, rng: Rng) -> bytes:
    size = int.from_bytes(content[:8], "little")
    lengths = (0, 1, size - 1, size + 1, len(content) - 8, len(content), 2**27, 2**40, 2**64 - 1)
    return int(rng.choice(np.array(lengths, np.uint64))).to_bytes(8, "little") + content[8:]


BINARY = (change_bytes, cut, append, claim_length)


def mutated(header: Header, data: bytes, path: Path, rng: Rng) -> None:
    """Write a changed state file: in structure, as text, or as bytes."""
    header = json.loads(json.dumps(header))
    kind = rng.random()
    for _ in range(rng.integers(1, 4) if kind < 0.6 else 0):
        STRUCTURAL[rng.integers(len(STRUCTURAL))](header, rng)
        if not header:
            break
    if rng.random() < 0.7:
        # So that other checks than that of the sha256 have something to do.
        with suppress(KeyError, TypeError, ValueError, AttributeError):
            header = signed(header, data)
    text = json.dumps(header)
    if 0.6 <= kind < 0.8:
        text = (double_a_key if rng.random() < 0.5 else insert_text)(text, rng)
    write_safetensors(path, text, data)
    if kind >= 0.8:
        path.write_bytes(BINARY[rng.integers(len(BINARY))](path.read_bytes(), rng))


@pytest.fixture
def good_files(anchored: Model, anchored_bundle: Path, tmp_path: Path) -> list[File]:
    """State files of all kinds, of both versions, written by Python and by libfwl."""
    python = open_session(anchored_bundle, batch=ROWS, plugin="none", threads=1)
    python.feed(ids(ROWS, 9), lengths=[9, 5])
    for compress in COMPRESSIONS:
        python.save_state(tmp_path / compress, compress=compress)
    session = anchored.session(ROWS)
    session.load_state(tmp_path / "none")
    session.save_state(tmp_path / "libfwl")
    files = [read_safetensors(tmp_path / name) for name in (*COMPRESSIONS, "libfwl")]
    header = json.loads(json.dumps(files[0][0]))
    header["__metadata__"]["version"] = "1"
    del header["__metadata__"]["sha256"]
    return [*files, (header, files[0][1])]


def test_good_files_are_accepted(good_files: list[File], anchored: Model, tmp_path: Path) -> None:
    session = anchored.session(ROWS)
    for header, data in good_files:
        session.load_state(write_safetensors(tmp_path / "good", header, data))
        assert session.positions == [9, 5]


def accepted_by_safetensors(content: bytes) -> bool:
    try:
        load(content)
    except (SafetensorError, KeyError, ValueError, OverflowError, TypeError):
        return False
    return True


def outcome(call: Callable[[], object], errors: type[Exception]) -> str:
    try:
        call()
    except errors:
        return "refused"
    return "accepted"


def test_libfwl_refuses_what_the_others_refuse(
    good_files: list[File], anchored: Model, anchored_bundle: Path, tmp_path: Path
) -> None:
    python = open_session(anchored_bundle, batch=ROWS, plugin="none", threads=1)
    session, path, rng = anchored.session(ROWS), tmp_path / "changed", np.random.default_rng(16)
    session.load_state(write_safetensors(path, *good_files[0]))
    counts: Counter[tuple[bool, str, str]] = Counter()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(FILES):
        mutated(*good_files[number % len(good_files)], path, rng)
        before = session.read_row(0)
        ours = outcome(lambda: session.load_state(path), FwlError)
        theirs = outcome(
            lambda: load_state(path, python.specs, python.model_id, ROWS), (PythonError, OSError)
        )
        raw = accepted_by_safetensors(path.read_bytes())
        counts[raw, theirs, ours] += 1
        assert ours == theirs, path.read_bytes()[:3000]
        if ours == "accepted":
            assert raw, path.read_bytes()[:3000]
            compare(session, load_state(path, python.specs, python.model_id, ROWS))
        else:
            np.testing.assert_array_equal(session.read_row(0), before)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak
    print(f"safetensors accepts, Python, libfwl: {dict(counts)}; {grown / 1024:.0f} MiB grown")
    assert grown < 200 * 1024
    assert sum(n for (_, _, ours), n in counts.items() if ours == "accepted") > FILES / 100
    assert sum(n for (raw, _, ours), n in counts.items() if raw and ours == "refused") > FILES / 20


def compare(session: Session, state: dict[str, np.ndarray]) -> None:
    """Compare libfwl's rows with Python's arrays."""
    for row in range(ROWS):
        whole = b"".join(array[row].tobytes() for array in state.values())
        found = session.read_row(row)
        assert found[:8].tobytes() == whole[:8]
        expected = np.frombuffer(whole[8:], np.float32)
        assert_close("runtime.float32", found[8:].view(np.float32), expected)


@pytest.mark.parametrize("position", [-1, 2**53 + 1, 2**62, 2**63 - 1])
def test_positions_out_of_range(
    good_files: list[File], anchored: Model, tmp_path: Path, position: int
) -> None:
    header, data = good_files[0]
    first, _ = header["position"]["data_offsets"]
    data = data[:first] + np.array([position, 5]).tobytes() + data[first + 16 :]
    header["__metadata__"]["tokens"] = f"{position},5"
    path = write_safetensors(tmp_path / "far", signed(header, data), data)
    session = anchored.session(ROWS)
    refused("state", f"the position is {position}; expected 0", lambda: session.load_state(path))
    row = session.read_row(0)
    row[:8] = np.array([position]).view(np.uint8)
    refused("state", f"the position is {position}; expected 0", lambda: session.write_row(0, row))


def test_two_tensors_that_changed_places(
    good_files: list[File], anchored: Model, tmp_path: Path
) -> None:
    header, data = good_files[0]
    names = [name for name in header if name.startswith("cache.0.")]
    first, second = (header[name]["data_offsets"] for name in names)
    header[names[0]]["data_offsets"], header[names[1]]["data_offsets"] = second, first
    path = write_safetensors(tmp_path / "exchanged", header, data)
    refused("state", "its sha256 is not", lambda: anchored.session(ROWS).load_state(path))


def test_every_flipped_bit_of_the_tensors_is_found(
    good_files: list[File], anchored: Model, tmp_path: Path
) -> None:
    (header, data), session = good_files[0], anchored.session(ROWS)
    path = tmp_path / "flipped"
    for place in np.random.default_rng(0).integers(0, len(data), 300):
        changed = bytearray(data)
        changed[place] ^= 1 << int(place % 8)
        write_safetensors(path, header, bytes(changed))
        refused("state", "its sha256 is not", lambda: session.load_state(path))


@pytest.mark.parametrize("rows", [10**8, 2**20, 1000])
def test_files_that_claim_many_rows_take_no_memory(
    good_files: list[File], anchored: Model, tmp_path: Path, rows: int
) -> None:
    """Tensors without slots in use have no bytes, so that rows cost the attacker little."""
    session, (header, _) = anchored.session(ROWS), good_files[2]
    header["__metadata__"].update(rows=str(rows), tokens=",".join(["0"] * min(rows, 2**20)))
    end = 0
    for name, entry in header.items():
        if name != "__metadata__":
            shape = [rows, *entry["shape"][1:]]
            if name.endswith(".used"):
                shape[2] = 0
            size = {"I64": 8, "F32": 4}[entry["dtype"]] * int(np.prod(shape, dtype=object))
            entry.update(shape=shape, data_offsets=[end, end := end + size])
    path = write_safetensors(tmp_path / "many", header, b"")
    os.truncate(path, path.stat().st_size + end if end < 2**40 else path.stat().st_size)  # a hole
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(FwlError):
        session.load_state(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 100 * 1024
