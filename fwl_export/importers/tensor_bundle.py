"""Read TensorFlow 2 checkpoints ("tensor bundles") without TensorFlow.

NAME.index is a sorted table in LevelDB's format. It maps the name of each tensor to the place of
its bytes in NAME.data-00000-of-0000N. Sources: LevelDB's doc/table_format.md; TensorFlow's
tensor_bundle.h, tensor_bundle.proto and types.proto. No maintained package reads these files: the
only one, tensorflow-checkpoint-reader 0.2.2, is unfinished and pins protobuf 3.18.
"""

from __future__ import annotations

import functools
import math
import re
import struct
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fwl_export.errors import CheckpointError, MissingDependencyError
from fwl_export.json_files import shown

_MAGIC = 0xDB4775248B80FB57
_FOOTER = 48
_BLOCK_TRAILER = 5  # one byte for the compression, four for the crc32c
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # wire types of protobuf

# From types.proto. Tensors of other types, such as strings, are never parameters.
_TYPES = {1: "float32", 2: "float64", 3: "int32", 9: "int64", 14: "bfloat16", 19: "float16"}


def find_index(source: Path) -> Path:
    """Return the .index file of a checkpoint.

    Args:
      source: Folder of the checkpoint, whose file `checkpoint` names the latest one; or the path of
        the checkpoint's files, with or without ".index".

    Raises:
      CheckpointError: There is no .index file, or there are several and none is named.
    """
    if source.is_dir():
        named = source / "checkpoint"
        text = named.read_text(encoding="utf-8", errors="replace") if named.is_file() else ""
        if match := re.search(r'^model_checkpoint_path: "([^"]+)"', text, re.MULTILINE):
            return find_index(source / Path(match[1]).name)
        found = sorted(source.glob("*.index"))
        if len(found) == 1:
            return found[0]
        raise CheckpointError(
            f"folder '{source}' has {len(found)} .index files and no file 'checkpoint' that names "
            "one of them; give the path of a checkpoint up to '.index'"
        )
    path = source if source.suffix == ".index" else source.with_name(source.name + ".index")
    if not path.is_file():
        raise CheckpointError(
            f"'{path}' does not exist; expected a TensorFlow 2 checkpoint (its folder, or its path "
            "up to '.index') or an .npz file"
        )
    return path


def read_bundle(index: Path) -> dict[str, Callable[[], npt.NDArray[Any]]]:
    """Return functions that read the tensors of a checkpoint, by the tensors' names.

    Args:
      index: Path of the .index file.

    Raises:
      CheckpointError: The index is truncated or changed, or its format is not supported.
      MissingDependencyError: google-crc32c is not installed.
    """
    try:
        entries = dict(_table(index.read_bytes()))
        if b"" not in entries:
            raise ValueError("the header is missing")
        header = _message(entries.pop(b""))
        shards = _integer(header, 1)
        tensors = {name.decode(): _message(value) for name, value in entries.items()}
    except (ValueError, IndexError, struct.error) as error:
        raise CheckpointError(
            f"{index} cannot be read as the index of a TensorFlow checkpoint "
            f"({error}); if it is truncated, copy it again"
        ) from None
    if _integer(header, 2):
        raise CheckpointError(
            f"{index} was written on a big-endian machine; expected little-endian numbers: save "
            "the checkpoint again on a little-endian machine"
        )
    prefix = index.with_suffix("")
    return {
        name: functools.partial(_read, prefix, shards, name, entry)
        for name, entry in tensors.items()
        if _integer(entry, 1) in _TYPES
    }


def array_from_bytes(raw: bytes, kind: str, shape: Sequence[int]) -> npt.NDArray[Any]:
    """Return an array from its little-endian bytes.

    Args:
      raw: The bytes of the array, in C order.
      kind: numpy's name of the type, or "bfloat16", which numpy lacks; that becomes float32.
      shape: The sizes of the array's axes.

    Raises:
      ValueError, TypeError: The type is unknown, or the bytes do not fill the shape.
    """
    if kind == "bfloat16":
        wide = np.frombuffer(raw, "<u2").astype("<u4") << 16
        return wide.view("<f4").reshape(shape)
    dtype = np.dtype(kind).newbyteorder("<")
    if dtype.hasobject:
        raise ValueError(f"type '{kind}' is not a number")
    return np.frombuffer(raw, dtype).reshape(shape)


def _read(prefix: Path, shards: int, name: str, entry: dict[int, list[Any]]) -> npt.NDArray[Any]:
    shard, offset, size = (_integer(entry, field) for field in (3, 4, 5))
    path = prefix.with_name(f"{prefix.name}.data-{shard:05d}-of-{shards:05d}")
    if 7 in entry:
        raise CheckpointError(
            f"{path}: tensor {shown(name)} is stored in slices, which are not supported; save the "
            "checkpoint again without partitioned variables"
        )
    try:
        with path.open("rb") as stream:
            stream.seek(offset)
            raw = stream.read(size)
        dims = entry.get(2, [b""])[-1]  # of a field that is there twice, protobuf takes the last
        shape = [_integer(_message(size), 1) for size in _message(dims).get(2, [])]
        kind = _TYPES[_integer(entry, 1)]
        if len(raw) != size or math.prod(shape) * _item_size(kind) != size:
            raise ValueError(f"{len(raw)} bytes for shape {shape}")
        _check_crc(raw, entry[6][0])
        return array_from_bytes(raw, kind, shape)
    except (ValueError, TypeError, IndexError, KeyError, OSError) as error:
        raise CheckpointError(
            f"{path}: tensor {shown(name)} cannot be read ({error}); if the file is truncated, "
            "copy it again"
        ) from None


def _item_size(kind: str) -> int:
    return 2 if kind == "bfloat16" else np.dtype(kind).itemsize


def _table(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield the keys and values of a table: its footer leads to its index, that to its blocks."""
    if len(data) < _FOOTER or struct.unpack("<Q", data[-8:])[0] != _MAGIC:
        raise ValueError("the magic number at the end is missing")
    footer = data[-_FOOTER:]
    at = 0
    for _ in range(2):  # skip the handle of the meta-index
        _, at = _varint(footer, at)
    for _, handle in _block(data, footer[at:]):
        yield from _block(data, handle)


def _block(data: bytes, handle: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield the keys and values of a block.

    Args:
      data: The whole table.
      handle: Offset and size of the block in the table, as varints.
    """
    offset, at = _varint(handle, 0)
    size, _ = _varint(handle, at)
    block = data[offset : offset + size + _BLOCK_TRAILER]
    if len(block) != size + _BLOCK_TRAILER:
        raise ValueError("a block lies beyond the end of the file")
    _check_crc(block[: size + 1], struct.unpack("<I", block[size + 1 :])[0])
    if block[size]:
        raise ValueError("a block is compressed, but TensorFlow writes none")
    restarts = struct.unpack("<I", block[size - 4 : size])[0]
    end, at, key = size - 4 * (restarts + 1), 0, b""
    while at < end:
        shared, at = _varint(block, at)
        unshared, at = _varint(block, at)
        length, at = _varint(block, at)
        key = key[:shared] + block[at : at + unshared]
        at += unshared + length
        yield key, block[at - length : at]


def _check_crc(data: bytes, masked: int) -> None:
    """Check data against its crc32c, which LevelDB stores rotated and plus a constant."""
    try:
        import google_crc32c
    except ImportError:
        raise MissingDependencyError(
            "TensorFlow checkpoints need the package google-crc32c, which is not installed; "
            "pip install 'fwl-export[import]'"
        ) from None
    crc = google_crc32c.value(data)
    if (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF != masked:
        raise ValueError("the checksum is wrong")


def _message(data: bytes) -> dict[int, list[Any]]:
    """Return the values of each field of a protobuf message, integers or bytes, by its number."""
    fields: dict[int, list[Any]] = {}
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        value: int | bytes
        if tag & 7 == _VARINT:
            value, at = _varint(data, at)
        elif tag & 7 == _BYTES:
            length, at = _varint(data, at)
            value, at = data[at : at + length], at + length
        elif tag & 7 in (_FIXED32, _FIXED64):
            length = 4 if tag & 7 == _FIXED32 else 8
            value, at = int.from_bytes(data[at : at + length], "little"), at + length
        else:
            raise ValueError(f"a field has wire type {tag & 7}")
        fields.setdefault(tag >> 3, []).append(value)
    if at != len(data):
        raise ValueError("a field ends beyond its message")
    return fields


def _integer(message: dict[int, list[Any]], field: int) -> int:
    """Return an integer field of a message; protobuf omits fields that are 0."""
    return int(message.get(field, [0])[-1])


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """Return the varint at a place, and the place after it.

    A varint holds an integer in groups of seven bits, the lowest first.
    """
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
