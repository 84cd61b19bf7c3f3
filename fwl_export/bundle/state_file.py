"""State files: the state of R rows in one safetensors file, which every runtime reads and writes.

Tensors have the names and shapes of the model's state, [R, ...]. The metadata, all text, are
`format` ("fwl-state"), `version`, `model_id` (the model's identity from the bundle), `rows`,
`tokens` (positions of the rows, separated by commas), `compress` and `sha256`. In a compressed
file, other tensors stand for some of the state's:

- "fp16": `<name>.half` [R, ...] float16 times `<name>.scale` [R] float32, for float32 tensors with
  `COMPRESS_FROM` or more elements per row.
- "lowrank": `<name>.left` [R, Dk, r] times `<name>.right` [R, r, Dv], a matrix product, for the
  fast weights' matrices, whose rank is at most the number of tokens read; and `<name>.used`
  [R, H, n, Dh], the first n slots of an attention cache of which no row has filled the others.

`sha256` covers names, types, shapes and bytes of all tensors, and the rest of the metadata; see
`checksum`. Files of version 1, which lack it, are still read.

A file may come from anybody, so that nothing is allocated before its header was compared with the
model and the number of rows that the caller has room for.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fwl_export.bundle import state as states
from fwl_export.bundle.state import Array, State, TensorSpec
from fwl_export.errors import ConfigError, ShapeError, StateError
from fwl_export.files import open_regular, replaced_file
from fwl_export.json_files import brief, parse_json

_log = logging.getLogger(__name__)

FORMAT = "fwl-state"
VERSION = 2
COMPRESSIONS = ("none", "fp16", "lowrank")
COMPRESS_FROM = 1024

# The largest position of a row: up to here, also readers that count in float64 count exactly.
MAX_POSITION = 2**53

# Largest error of the factors relative to the matrix (Frobenius norm): like that of float32 sums.
_LOWRANK_TOLERANCE = 2.0**-20

# The types that a state may have, as safetensors calls them.
_STORED_TYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "int64": "I64",
    "int32": "I32",
    "uint8": "U8",
    "bool": "BOOL",
}
_NUMPY_TYPES = {stored: np.dtype(name) for name, stored in _STORED_TYPES.items()}

# What a state may need in memory if the caller does not say how many rows it has room for.
_MOST_BYTES = 1 << 30
# Room in a header for the metadata, for the entries of one tensor, and for the position of a row.
_METADATA_BYTES, _ENTRY_BYTES, _POSITION_BYTES = 1 << 16, 1 << 10, 1 << 5
_MOST_HEADER_BYTES = 1 << 24


class _Entry(NamedTuple):
    """A tensor of a file: safetensors' type, shape, and its bytes' place behind the header."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class SavedState:
    """What `save_state` reports about the file that it wrote.

    Attributes:
      file_bytes: Size of the file.
      state_bytes: Size of the saved rows in memory.
      tokens: Position of each row: how many tokens it has read.
      error: Largest error of the compression: the difference between a tensor and what is read
        back, relative to the tensor's largest absolute value; 0 without compression.
    """

    file_bytes: int
    state_bytes: int
    tokens: Sequence[int]
    error: float


def save_state(
    path: Path, specs: Sequence[TensorSpec], state: State, model_id: str, compress: str = "none"
) -> SavedState:
    """Write the state of some rows to a file. On an error, what was at the path is as before.

    Args:
      path: File to write; replaced if it exists.
      specs: Specs of the model's state.
      state: Arrays [R, ...] by name.
      model_id: Identity of the model, from the bundle's manifest.
      compress: Kind of compression: "none", "fp16" or "lowrank".

    Raises:
      StateError: The state does not fit the model, or has NaN or infinite values.
      ConfigError: There is no such compression.
      OSError: The file cannot be written.
    """
    from safetensors.numpy import save

    if compress not in COMPRESSIONS:
        raise ConfigError(f"compress is '{compress}'; expected {', '.join(COMPRESSIONS)}")
    tokens = [int(position) for position in state["position"]]
    states.check(specs, state, len(tokens))
    states.check_finite(state)
    _check_positions("the state", tokens, MAX_POSITION)
    tensors: dict[str, Array] = {}
    for spec in specs:
        tensors |= _compressed(spec, state[spec.name], tokens, compress)
    tensors = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    metadata = {
        "format": FORMAT,
        "version": str(VERSION),
        "model_id": model_id,
        "rows": str(len(tokens)),
        "tokens": ",".join(map(str, tokens)),
        "compress": compress,
    }
    metadata["sha256"] = checksum(tensors, metadata)
    content = save(tensors, metadata)
    with replaced_file(path) as beside:
        beside.write_bytes(content)
    error = 0.0
    if compress != "none":
        back = {spec.name: _restored(spec, tensors, len(tokens)) for spec in specs}
        error = max(_error(back[name], array) for name, array in state.items())
    return SavedState(
        file_bytes=len(content),
        state_bytes=sum(array.nbytes for array in state.values()),
        tokens=tokens,
        error=error,
    )


def load_state(
    path: Path,
    specs: Sequence[TensorSpec],
    model_id: str,
    rows: int | None = None,
    max_positions: int = 0,
) -> State:
    """Read what `save_state` wrote.

    Args:
      path: File to read.
      specs: Specs of the model's state.
      model_id: Identity of the model, which must be that of the file.
      rows: Number of rows that the file must have; None allows any whose state takes up to 1 GiB.
      max_positions: Number of tokens that the model can read in all; 0 means no limit.

    Returns:
      Arrays [R, ...] by name.

    Raises:
      StateError: The file is not a state file, is damaged or was changed, comes from another model,
        or has NaN or infinite values.
      ShapeError: The file has another number of rows than `rows`.
      OSError: The file cannot be read.
    """
    path = Path(path)
    with open_regular(path, StateError) as stream:
        size = os.fstat(stream.fileno()).st_size
        try:
            header_bytes, header = _header(stream, size, _header_limit(specs, rows, size))
            metadata, entries = _entries(header)
        except (ValueError, RecursionError) as error:
            raise _damaged(path, error) from None
        _check_origin(path, metadata, model_id)
        count = _checked_rows(path, metadata, specs, rows)
        try:
            _check_entries(entries, specs, count, metadata)
            content = _data(stream, size - 8 - header_bytes, entries)
        except ValueError as error:
            raise _damaged(path, error) from None
    tensors = {name: _array(content, entry) for name, entry in entries.items()}
    _check_sum(path, tensors, metadata)
    with np.errstate(over="ignore", invalid="ignore"):  # `check_finite` names the tensor
        state = {spec.name: _restored(spec, tensors, count) for spec in specs}
    states.check(specs, state, count)
    states.check_finite(state)
    tokens = [int(position) for position in state["position"]]
    _check_positions(f"'{path}'", tokens, max_positions or MAX_POSITION)
    if metadata["tokens"] != ",".join(map(str, tokens)):
        raise _damaged(path, f"its metadata say tokens {metadata['tokens'][:80]}")
    return state


def checksum(tensors: Mapping[str, Array], metadata: Mapping[str, str]) -> str:
    """Return the SHA-256 of a state file's content, which its metadata hold as "sha256".

    It is taken over, for each tensor in the order of its name's UTF-8 bytes: name, newline,
    safetensors' type, newline, the numbers of its shape separated by commas, newline, and its
    bytes as in the file; then, for each metadata entry but "sha256" in the order of its key: key,
    newline, value, newline.

    Args:
      tensors: C-contiguous arrays by their names in the file.
      metadata: The file's metadata; an entry "sha256" is left out.

    Returns:
      64 hexadecimal digits in lower case.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors, key=str.encode):
        array = tensors[name]
        shape = ",".join(map(str, array.shape))
        digest.update(f"{name}\n{_STORED_TYPES[array.dtype.name]}\n{shape}\n".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    for key in sorted(metadata.keys() - {"sha256"}, key=str.encode):
        digest.update(f"{key}\n{metadata[key]}\n".encode())
    return digest.hexdigest()


def _damaged(path: Path, problem: object) -> StateError:
    return StateError(
        f"'{path}' is not a state file, or was truncated or changed ({brief(problem)}); save it "
        "again"
    )


def _header_limit(specs: Sequence[TensorSpec], rows: int | None, size: int) -> int:
    """Return the most bytes that the header of a state file of this model may have."""
    names = sum(len(spec.name.encode()) for spec in specs)
    most_rows = size // 8 if rows is None else rows  # a position alone takes 8 bytes of the file
    limit = _METADATA_BYTES + 2 * (names + len(specs) * _ENTRY_BYTES) + most_rows * _POSITION_BYTES
    return min(limit, _MOST_HEADER_BYTES)


def _header(stream: Any, size: int, limit: int) -> tuple[int, Any]:
    """Read the header of a safetensors file.

    Args:
      stream: The file, open for reading at its start, without a buffer.
      size: Size of the file, in bytes.
      limit: Largest size of the header, in bytes.

    Returns:
      The header's size in bytes, and its data.

    Raises:
      ValueError, RecursionError: It is not the header of a safetensors file, or is too long.
    """
    length = int.from_bytes(_exactly(stream, 8), "little")
    if length > size - 8:
        raise ValueError(f"its header claims {length} bytes, but the file has {size}")
    if length > limit:
        raise ValueError(f"its header has {length} bytes; that of a state file has up to {limit}")
    text = bytes(_exactly(stream, length)).decode()
    if not text.startswith("{"):
        raise ValueError("its header is not a JSON object")
    return length, parse_json(text)


def _exactly(stream: Any, size: int) -> bytearray:
    """Read a number of bytes; a file that became shorter meanwhile is an error."""
    content = bytearray(size)
    done = 0
    with memoryview(content) as view:
        while done < size:
            count = stream.readinto(view[done:])
            if not count:
                raise ValueError("it ends too early")
            done += count
    return content


def _entries(header: Mapping[str, Any]) -> tuple[dict[str, str], dict[str, _Entry]]:
    """Return metadata and tensors of a header, after checking the form of each entry.

    Raises:
      ValueError: An entry is malformed.
    """
    metadata = header.get("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError("its metadata are not text")
    entries: dict[str, _Entry] = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
            raise ValueError(f"the entry of tensor '{name}' is malformed")
        shape, offsets = entry["shape"], entry["data_offsets"]
        well_formed = isinstance(entry["dtype"], str) and _sizes(shape) and _sizes(offsets)
        if not well_formed or len(offsets) != 2:
            raise ValueError(f"the entry of tensor '{name}' is malformed")
        entries[name] = _Entry(entry["dtype"], tuple(shape), *offsets)
    return metadata, entries


def _sizes(values: Any) -> bool:
    """Return whether these are whole numbers from 0, as a list that is no longer than any shape."""
    return (
        isinstance(values, list)
        and len(values) <= 16
        and all(type(value) is int and 0 <= value < 2**63 for value in values)
    )


def _check_origin(path: Path, metadata: Mapping[str, str], model_id: str) -> None:
    """Check that a file is a state file of a known version, and of this model."""
    if metadata.get("format") != FORMAT:
        raise StateError(
            f"'{path}' is a safetensors file, but not a state file; expected a file that "
            "`fwl-export read` or a session's save_state wrote"
        )
    version = metadata.get("version")
    if version not in ("1", str(VERSION)):
        raise StateError(
            f"'{path}' is a state file of version {brief(version)}, but this fwl-export reads "
            f"versions 1 to {VERSION}; update fwl-export, or save the state again"
        )
    if metadata.get("model_id") != model_id:
        raise StateError(
            f"'{path}' was saved from another model (its model_id is "
            f"{brief(metadata.get('model_id'))[:12]}…, this bundle's is {model_id[:12]}…); only "
            "the model that wrote a state can load it, at the same precision"
        )
    compress = metadata.get("compress")
    if compress not in COMPRESSIONS or "tokens" not in metadata:
        raise _damaged(path, "its metadata lack 'tokens', or a known kind of 'compress'")


def _checked_rows(
    path: Path, metadata: Mapping[str, str], specs: Sequence[TensorSpec], expected: int | None
) -> int:
    """Return the number of rows, after checking that the caller has room for them."""
    text = metadata.get("rows", "")
    if not re.fullmatch("[1-9][0-9]{0,17}", text):
        raise _damaged(path, f"its metadata say '{text[:20]}' rows; expected 1 or more")
    rows = int(text)
    if expected is not None and rows != expected:
        raise ShapeError(
            f"'{path}' holds {rows} rows, but they would be loaded into {expected}; name {rows} "
            "rows of the session with rows="
        )
    need = rows * sum(spec.bytes_per_row for spec in specs)
    if expected is None and need > _MOST_BYTES:
        raise StateError(
            f"'{path}' says that it holds {rows} rows, which need {need / 1e9:.1f} GB of memory; "
            "say how many rows you expect with rows="
        )
    return rows


def _check_entries(
    entries: Mapping[str, _Entry],
    specs: Sequence[TensorSpec],
    rows: int,
    metadata: Mapping[str, str],
) -> None:
    """Check names, types, shapes and places of all tensors of a file.

    Args:
      entries: The file's tensors.
      specs: Specs of the model's state.
      rows: Number of rows in the file.
      metadata: The file's metadata.

    Raises:
      ValueError: A tensor is missing or unknown, or is not as the model's state says.
    """
    left = dict(entries)
    for spec in specs:
        parts = _parts(spec, rows, metadata["compress"], entries)
        for name, (dtype, shape) in parts.items():
            found = left.pop(name, None)
            if found is None:
                raise ValueError(f"it lacks the tensor '{name}'")
            if (found.dtype, found.shape) != (dtype, shape):
                raise ValueError(
                    f"tensor '{name}' is {found.dtype[:8]} {list(found.shape)}; expected {dtype} "
                    f"{list(shape)}"
                )
    if left:
        raise ValueError(f"it has a tensor '{next(iter(left))}' that this model does not know")
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        size = math.prod(entry.shape) * _NUMPY_TYPES[entry.dtype].itemsize
        if entry.begin != end or entry.end != end + size:
            raise ValueError(
                f"the bytes of tensor '{name}' are {entry.begin} to {entry.end}; expected {end} to "
                f"{end + size}, right after those before"
            )
        end = entry.end


def _parts(
    spec: TensorSpec, rows: int, compress: str, entries: Mapping[str, _Entry]
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return type and shape of the tensors that must stand for one tensor of the state in a file.

    Args:
      spec: Spec of the tensor.
      rows: Number of rows in the file.
      compress: Kind of compression of the file.
      entries: The file's tensors. They choose between the whole tensor and the compressed form,
        and the latter's rank or number of slots within what the tensor's shape allows.
    """
    name, shape, dtype = spec.name, spec.shape, _STORED_TYPES[spec.dtype]
    if compress == "fp16" and spec.dtype == "float32" and f"{name}.half" in entries:
        return {f"{name}.half": ("F16", (rows, *shape)), f"{name}.scale": ("F32", (rows,))}
    if compress == "lowrank" and _is_matrix(spec) and f"{name}.left" in entries:
        rank = min(_size_at(entries[f"{name}.left"], 2), *shape)
        return {
            f"{name}.left": (dtype, (rows, shape[0], rank)),
            f"{name}.right": (dtype, (rows, rank, shape[1])),
        }
    if compress == "lowrank" and _is_cache(spec) and f"{name}.used" in entries:
        slots = min(_size_at(entries[f"{name}.used"], 2), shape[1])
        return {f"{name}.used": (dtype, (rows, shape[0], slots, *shape[2:]))}
    return {name: (dtype, (rows, *shape))}


def _size_at(entry: _Entry, axis: int) -> int:
    return entry.shape[axis] if axis < len(entry.shape) else 0


def _data(stream: Any, size: int, entries: Mapping[str, _Entry]) -> bytearray:
    """Read what follows the header, of which the tensors must take all bytes.

    Args:
      stream: The file, open for reading behind its header, without a buffer.
      size: Number of bytes behind the header.
      entries: The file's tensors.

    Raises:
      ValueError: The file has another size than its header says, or changes while it is read.
    """
    expected = max((entry.end for entry in entries.values()), default=0)
    if size != expected:
        raise ValueError(f"it has {size} bytes behind its header, which says {expected}")
    content = _exactly(stream, size)
    if stream.read(1):
        raise ValueError("it grew while it was read")
    return content


def _array(content: bytearray, entry: _Entry) -> Array:
    """Return a tensor of a file; it shares the memory of the file's content."""
    dtype = _NUMPY_TYPES[entry.dtype]
    return np.frombuffer(content, dtype, math.prod(entry.shape), entry.begin).reshape(entry.shape)


def _check_sum(path: Path, tensors: Mapping[str, Array], metadata: Mapping[str, str]) -> None:
    if (metadata["version"] == "1") == ("sha256" in metadata):
        raise _damaged(path, "a file of version 2 has a sha256, and one of version 1 has none")
    if metadata["version"] == "1":
        _log.info("'%s' is a state file of version 1, which has no checksum", path)
    elif metadata.get("sha256") != checksum(tensors, metadata):
        raise StateError(
            f"'{path}' was changed or damaged after it was saved: its sha256 is not the one that "
            "it states; save it again, or take another copy"
        )


def _check_positions(source: str, tokens: Sequence[int], most: int) -> None:
    """Check that the positions of all rows can be continued from.

    Args:
      source: Where the positions come from; begins the error message.
      tokens: Position of each row.
      most: Largest position that is allowed.

    Raises:
      StateError: A position is negative or too large.
    """
    for row, position in enumerate(tokens):
        if not 0 <= position <= most:
            raise StateError(
                f"{source} has row {row} at position {position}; expected 0 to {most}, the largest "
                "number of tokens that this model can have read"
            )


def _compressed(
    spec: TensorSpec, array: Array, tokens: Sequence[int], compress: str
) -> dict[str, Array]:
    """Return the tensors that stand for one tensor of the state in a file.

    Args:
      spec: Spec of the tensor.
      array: The tensor, [R, ...].
      tokens: Positions of the R rows.
      compress: Kind of compression.
    """
    whole = {spec.name: array}
    small = array[0].size < COMPRESS_FROM
    if compress == "fp16" and array.dtype == np.float32 and not small:
        # A power of two brings the largest value near the top of float16's range.
        largest = np.abs(array).reshape(len(array), -1).max(1)
        scale = np.exp2(np.ceil(np.log2(np.maximum(largest, 2.0**-100))) - 15).astype(np.float32)
        half = (array / _column(scale, array)).astype(np.float16)
        return {f"{spec.name}.half": half, f"{spec.name}.scale": scale}
    if compress == "lowrank" and _is_matrix(spec):
        return _factors(spec.name, array, max(tokens)) or whole
    if compress == "lowrank" and _is_cache(spec) and max(tokens) < spec.shape[1]:
        return {f"{spec.name}.used": array[:, :, : max(tokens)]}
    return whole


def _is_cache(spec: TensorSpec) -> bool:
    return spec.name.startswith("cache.") and len(spec.shape) >= 2


def _is_matrix(spec: TensorSpec) -> bool:
    return (
        spec.name.startswith(("fast.", "anchor."))
        and len(spec.shape) == 2
        and spec.dtype == "float32"
    )


def _factors(name: str, array: Array, tokens: int) -> dict[str, Array] | None:
    """Return factors of the matrices [R, Dk, Dv], or None if they would not be smaller."""
    _, size_k, size_v = array.shape
    most = (size_k * size_v - 1) // (size_k + size_v)
    if tokens > 4 * most:  # only decay could have kept the rank low enough: skip the SVD
        return None
    left, values, right = np.linalg.svd(array.astype(np.float64), full_matrices=False)
    left_out = np.sqrt(np.cumsum((values**2)[:, ::-1], 1)[:, ::-1])  # error of keeping the first r
    allowed = _LOWRANK_TOLERANCE * left_out[:, :1]
    rank = max(int((left_out > allowed).sum(1).max()), 1)
    if rank > most:
        return None
    root = np.sqrt(values[:, None, :rank])
    return {
        f"{name}.left": (left[:, :, :rank] * root).astype(np.float32),
        f"{name}.right": (right[:, :rank] * root.transpose(0, 2, 1)).astype(np.float32),
    }


def _restored(spec: TensorSpec, tensors: Mapping[str, Array], rows: int) -> Array:
    """Return a tensor of the state [R, ...] from the tensors that stand for it in a file."""
    if spec.name in tensors:
        return tensors[spec.name]
    if (half := tensors.get(f"{spec.name}.half")) is not None:
        wide: Array = half.astype(np.float32)
        wide *= _column(tensors[f"{spec.name}.scale"], wide)
        return wide
    if (left := tensors.get(f"{spec.name}.left")) is not None:
        return left @ tensors[f"{spec.name}.right"]
    used = tensors[f"{spec.name}.used"]
    whole = np.zeros((rows, *spec.shape), used.dtype)
    whole[:, :, : used.shape[2]] = used
    return whole


def _column(values: Array, like: Array) -> Array:
    return values.reshape(-1, *[1] * (like.ndim - 1))


def _error(found: Array, expected: Array) -> float:
    largest = float(np.abs(expected).max(initial=0))
    difference = float(np.abs(found.astype(np.float64) - expected).max(initial=0))
    return difference / largest if largest else difference
