"""Seeded changes of files, from a flipped bit to a JSON value of another type.

Every mutator takes the content of a good file and a random generator, and returns a bad one, or one
that is good by chance. Those that know a format change it where a reader looks: a JSON value, an
entry of a safetensors header, a number in a protobuf message.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from random import Random
from typing import Any

Mutator = Callable[[bytes, Random], bytes]

# What a JSON value is replaced with: raw text, so that it may be what `json` never writes.
_JSON_VALUES = (
    *("null", "true", "false", "-1", "0", "1", "2", "0.5", "-0.0", "1e-320", "1e308", "1e999"),
    *("NaN", "Infinity", "-Infinity", "9223372036854775807", "9223372036854775808", "1" + "0" * 30),
    *("4294967296", "1099511627776", "16777216", "1" + "0" * 5000, "[]", "{}", "[[]]", "[null]"),
    *('""', '"a"', '"a\\u0000b"', '"\\u001b[31m"', '"\\n"', '"../x"', '"/etc/passwd"', '"\\ud800"'),
    *('"' + "x" * 70000 + '"', '"float32"', '"object"', '"int64"', '"é"', '"NaN"', '"1"'),
    *("[" * 50 + "]" * 50, "[" * 3000 + "]" * 3000, "[" * 200000, '{"a":' * 70 + "1" + "}" * 70),
    *("[" + "0," * 20000 + "0]", "[1, 2, 3]", '["a", "a"]', '{"a": 1, "a": 2}', '{"": 0}'),
    *('{"schema_version": 1}', "[-1]", "[0]", "[4611686018427387904, 4611686018427387904]"),
)


def flip_bits(data: bytes, rng: Random) -> bytes:
    """Flip one to eight bits."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 8)):
        if changed:
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def truncate(data: bytes, rng: Random) -> bytes:
    """Cut off the end."""
    return data[: rng.randrange(len(data) + 1)]


def insert(data: bytes, rng: Random) -> bytes:
    """Insert random bytes, zeros, or bytes 0xFF."""
    at, size = rng.randrange(len(data) + 1), rng.choice((1, 2, 4, 8, 100, 5000))
    new = rng.choice((rng.randbytes(size), b"\x00" * size, b"\xff" * size))
    return data[:at] + new + data[at:]


def overwrite(data: bytes, rng: Random) -> bytes:
    """Overwrite a slice with random bytes, zeros, or bytes 0xFF."""
    at, size = rng.randrange(len(data) + 1), rng.choice((1, 2, 4, 8, 64))
    new = rng.choice((rng.randbytes(size), b"\x00" * size, b"\xff" * size))
    return data[:at] + new + data[at + size :]


def duplicate(data: bytes, rng: Random) -> bytes:
    """Repeat a slice."""
    a, b = sorted((rng.randrange(len(data) + 1), rng.randrange(len(data) + 1)))
    return data[:b] + data[a:b] * rng.choice((1, 1, 2, 10)) + data[b:]


def remove(data: bytes, rng: Random) -> bytes:
    """Remove a slice."""
    at = rng.randrange(len(data) + 1)
    return data[:at] + data[at + rng.choice((1, 2, 4, 8, 64, 1000)) :]


def exchange(data: bytes, rng: Random) -> bytes:
    """Let two slices of the same size change places."""
    size = rng.choice((1, 4, 8, 32))
    if len(data) < 2 * size:
        return data
    a, b = sorted(rng.sample(range(len(data) - size + 1), 2))
    if b - a < size:
        return data
    return (
        data[:a] + data[b : b + size] + data[a + size : b] + data[a : a + size] + data[b + size :]
    )


def whole(data: bytes, rng: Random) -> bytes:
    """Replace the file by something else entirely."""
    long = (b"\xff" * 4_000_000, b"\x00" * 100_000, rng.randbytes(5000), b"[" * 100_000)
    short = (b"", b"{}", b"[]", b"null", b"3", b'"x"', b"\xef\xbb\xbf{}", b"\xff\xfe{\x00}\x00")
    return rng.choice(long + short)


BYTES: tuple[Mutator, ...] = (
    flip_bits,
    truncate,
    insert,
    overwrite,
    duplicate,
    remove,
    exchange,
    whole,
)


def change_json(data: bytes, rng: Random) -> bytes:
    """Change one to three values of a JSON file."""
    value = json.loads(data)
    marks: dict[str, str] = {}
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        value = _changed(value, rng, marks)
    text = json.dumps(value)
    for mark, raw in marks.items():
        text = text.replace(f'"{mark}"', raw)
    return text.encode("utf-8", "surrogatepass")


def _changed(value: Any, rng: Random, marks: dict[str, str]) -> Any:
    """Return a JSON value with one place in it changed; `marks` stand for raw text."""
    places: list[tuple[Any, Any]] = []
    level = [value]
    while level:  # the deeper a place, the more there are of it: choose the level first
        places.append(rng.choice([(p, k) for p in level for k in _keys(p)] or [(None, None)]))
        level = [p[k] for p in level for k in _keys(p) if isinstance(p[k], dict | list)]
    parent, key = rng.choice(places)
    if parent is None:
        return value
    mark = f"mark-{len(marks)}-{rng.randrange(1 << 30)}"
    kind = rng.randrange(10)
    if kind == 0:
        del parent[key]
    elif kind == 1 and isinstance(parent, dict):
        parent[mark] = parent[key]
        marks[mark] = json.dumps(rng.choice(("", "a\0b", "../x", "x" * 5000, str(key), "é", "\n")))
    elif kind == 1:
        parent.insert(rng.randrange(len(parent) + 1), parent[key])
    elif kind == 2 and isinstance(parent[key], int | float):
        parent[key] = parent[key] * rng.choice((-1, 2, 0.5, 1 << 20)) + rng.choice((-1, 0, 1))
    elif kind == 3 and len(parent) > 1:
        other = rng.choice(_keys(parent))
        parent[key], parent[other] = parent[other], parent[key]
    else:
        parent[key] = mark
        marks[mark] = rng.choice(_JSON_VALUES)
    return value


def _keys(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value)
    return list(range(len(value))) if isinstance(value, list) else []


def change_safetensors(data: bytes, rng: Random) -> bytes:
    """Change the header of a safetensors file as JSON; its size is right, or rarely a lie."""
    size = int.from_bytes(data[:8], "little")
    header, tensors = data[8 : 8 + size], data[8 + size :]
    header = change_json(header, rng)
    length = len(header)
    if rng.randrange(10) == 0:
        length = rng.choice((0, 1, length - 1, length + 1, 1 << 20, 1 << 40, (1 << 64) - 1))
    if rng.randrange(5) == 0:
        tensors = rng.choice(BYTES[:-1])(tensors, rng)
    return struct.pack("<Q", length) + header + tensors


def change_floats(data: bytes, rng: Random) -> bytes:
    """Overwrite a few aligned numbers with NaN, infinities and extreme values."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        if len(changed) >= 8:
            at = len(changed) - 4 * rng.randint(1, len(changed) // 4 - 1)
            value = rng.choice((float("nan"), float("inf"), -float("inf"), 3e38, 1e-45, -1e30))
            changed[at : at + 4] = struct.pack("<f", value)
    return bytes(changed)


def change_varint(data: bytes, rng: Random) -> bytes:
    """Replace a byte that may be a number of a protobuf message by another, or an endless one."""
    if not data:
        return data
    at = rng.randrange(min(len(data), rng.choice((64, 1024, len(data)))))
    new = rng.choice(
        (0, 1, 0x7F, 1 << 14, 1 << 31, 1 << 32, (1 << 32) + data[at], 1 << 63, 1 << 70)
    )
    return (
        data[:at] + rng.choice((varint(new), b"\xff" * 30, b"\x80" * 9 + b"\x01")) + data[at + 1 :]
    )


def nest(data: bytes, rng: Random) -> bytes:
    """Put a protobuf message into a field of itself, many times over."""
    part = data[: rng.choice((0, 10, 100))]
    numbers = rng.choice(((7, 1, 5, 6), (1, 5, 6), (5, 11, 1), (25, 7, 5)))
    for depth in range(rng.choice((3, 30, 300))):
        number = numbers[-1 - depth % len(numbers)]
        part = varint(number << 3 | 2) + varint(len(part)) + part
    return data + part


def varint(value: int) -> bytes:
    """Return a number as protobuf writes it."""
    found = bytearray()
    while value > 0x7F:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes(found) + bytes([value])


def change_toml(data: bytes, rng: Random) -> bytes:
    """Change a value or a line of a TOML file."""
    lines = data.decode().splitlines()
    at = rng.randrange(len(lines))
    key, equals, _ = lines[at].partition("=")
    new = rng.choice(
        (*_JSON_VALUES, "nan", "inf", "-inf", "1979-05-27", "0x" + "f" * 40, "'''x", "+1")
    )
    changed = f"{key}= {new}" if equals else f"[{new[:200]}]"
    lines[at] = rng.choice(
        (changed, changed, changed, lines[at] + "\n" + lines[at], "a." * 9000 + "b=1")
    )
    return "\n".join(lines).encode("utf-8", "surrogatepass")


JSON = (*BYTES, *[change_json] * 24)
SAFETENSORS = (*BYTES, *[change_safetensors] * 12, *[change_floats] * 4)
PROTOBUF = (*BYTES, *[change_varint] * 8, nest, nest)
TOML = (*BYTES, *[change_toml] * 16)
