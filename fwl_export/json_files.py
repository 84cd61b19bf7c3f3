"""JSON files with a schema version: strict and bounded reading, and no NaN when writing.

What is read may come from anybody. `read_json` refuses what Python's reader would let through:
endless files, deep nesting, duplicate keys, numbers that are not finite, text that is not Unicode.
`typed` then checks the data against a type, with msgspec; its errors name the place in the file.
"""

from __future__ import annotations

import json
import math
import os
import re
import reprlib
import types
import typing
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import msgspec

from fwl_export.errors import FwlError
from fwl_export.filesystem import open_regular
from fwl_export.printable import one_line

# Python's objects take up to 20 times as much memory as the JSON text that describes them.
LARGEST_FILE = 32 << 20  # in bytes
DEEPEST = 64  # levels of nesting

_LONGEST_INTEGER = 20  # digits and sign of a 64-bit integer

# Text that names or identifies something: no control characters, which end a path or steer a
# terminal, and not endless.
Name = Annotated[str, msgspec.Meta(max_length=1024, pattern=r"\A[^\x00-\x1f\x7f-\x9f]*\Z")]
# Text for people to read, in any form.
Text = Annotated[str, msgspec.Meta(max_length=1 << 20)]
# A number of things of which there may be none, or must be one, and never more than memory holds.
Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 62)]
Size = Annotated[int, msgspec.Meta(ge=1, le=1 << 31)]
# A finite number. No quantity in our files comes near the bound, whose square float64 can hold.
Finite = Annotated[float, msgspec.Meta(ge=-1e150, le=1e150)]

_T = TypeVar("_T")

# Messages of msgspec, in words of ours.
_WORDS = {
    "Number out of range": "a number that float64 can hold",
    "array": "a list",
    "object": "an object",
}

_LONGEST_QUOTE = 300
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80


def read_json(
    path: Path,
    error: type[FwlError],
    hint: str = "was it truncated?",
    content: bytes | None = None,
    long_integers: bool = False,
) -> Any:
    """Return the data of a JSON file.

    Args:
      path: File to read, in UTF-8.
      error: Class of the exception to raise.
      hint: What may be wrong or what to do; ends the error message.
      content: Content of the file, if it was read already.
      long_integers: Whether integers of more than 64 bits are read as floating-point numbers, as
        files of transformers have some, instead of being refused.

    Raises:
      FwlError: The file is not JSON, is larger than `LARGEST_FILE` or nested more deeply than
        `DEEPEST`, names a key of an object twice, or has a number that is not finite or not of 64
        bits; raised as `error`.
      OSError: The file cannot be read.
    """
    if content is None:
        content = read_bounded(path, error)
    try:
        return parse_json(content.decode(), long_integers)
    except RecursionError:
        raise error(f"{path} is not JSON (it is nested too deeply); {hint}") from None
    except ValueError as problem:
        raise error(f"{path} is not JSON ({problem}); {hint}") from None


def read_bounded(path: Path, error: type[FwlError], limit: int = LARGEST_FILE) -> bytes:
    """Return the content of a file, unless it has no end or is larger than such files ever are.

    Args:
      path: File to read.
      error: Class of the exception to raise.
      limit: Largest size in bytes.

    Raises:
      FwlError: The file is larger, or is a pipe or a device; raised as `error`.
      OSError: The file cannot be read.
    """
    with open_regular(Path(path), error) as stream:
        size = os.fstat(stream.fileno()).st_size
        if size > limit:
            raise error(
                f"'{path}' has {size} bytes; expected at most {limit}. Is it the right file?"
            )
        return stream.readall()


def check_schema(
    data: Any, expected: int, source: str, error: type[FwlError], remedy: str
) -> dict[str, Any]:
    """Return the data if it is a JSON object with the schema version that fwl-export reads.

    Args:
      data: Parsed JSON.
      expected: The `schema_version` that this version of fwl-export reads.
      source: Name of the data's origin in the error message, e.g. the file's path.
      error: Class of the exception to raise.
      remedy: What to do about an older or unknown version; ends the error message.

    Raises:
      FwlError: The version is missing, older or newer; raised as `error`.
    """
    version = data.get("schema_version") if isinstance(data, dict) else None
    if type(version) is not int or version != expected:
        newer = type(version) is int and version > expected
        raise error(
            f"{source}: schema_version is {shown(version)}, but this fwl-export reads "
            f"{expected}; {'update fwl-export' if newer else remedy}"
        )
    result: dict[str, Any] = data
    return result


def typed(
    data: Any,
    kind: type[_T],
    where: str,
    error: type[FwlError],
    remedy: str = "",
    prefix: str = "",
) -> _T:
    """Return parsed JSON or TOML as a type, after checking everything that the type says.

    Args:
      data: Parsed JSON or TOML.
      kind: Dataclass, TypedDict or other type that msgspec knows. The bounds are its annotations.
        Keys that it does not name are ignored.
      where: Name of the data's origin; begins the error message.
      error: Class of the exception to raise.
      remedy: What to do; ends the error message.
      prefix: Prefix of the keys in error messages, if the data are a part of a file.

    Raises:
      FwlError: A key is missing, or a value has the wrong type or is out of range; raised as
        `error`.
    """
    try:
        return msgspec.convert(data, kind)
    except msgspec.ValidationError as problem:
        end = f"; {remedy}" if remedy else ""
        raise error(f"{where}: {_explained(str(problem), data, kind, prefix)}{end}") from None


def without_non_finite(data: Any, digits: int | None = None) -> Any:
    """Return a copy of the data with None for NaN and infinite numbers, which JSON cannot express.

    Args:
      data: Numbers, strings, mappings and sequences, nested in any way.
      digits: Significant digits to round floating-point numbers to; None keeps all.
    """
    if isinstance(data, Mapping):
        return {key: without_non_finite(value, digits) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [without_non_finite(value, digits) for value in data]
    if not isinstance(data, float):
        return data
    if not math.isfinite(data):
        return None
    return data if digits is None else float(f"{data:.{digits}g}")


def shown(value: Any) -> str:
    """Return a value as it appears in an error message: shortened, and without control characters.

    Args:
      value: Any value that was read from a file.
    """
    return _SHORT.repr(value)


def brief(problem: object) -> str:
    """Return the message of another library's exception, which may quote a whole file, in short.

    Args:
      problem: The exception.
    """
    text = one_line(str(problem))
    return text if len(text) <= _LONGEST_QUOTE else f"{text[:_LONGEST_QUOTE]}…"


def parse_json(text: str, long_integers: bool = False) -> Any:
    """Return the data of a JSON text.

    Args:
      text: The text.
      long_integers: Whether long integers are read, see `read_json`.

    Raises:
      ValueError, RecursionError: The text is not JSON, or breaks a rule of `read_json`.
    """
    data = json.loads(
        text,
        object_pairs_hook=_without_duplicates,
        parse_float=_finite,
        parse_int=_number if long_integers else _integer,
        parse_constant=_finite,
    )
    _check_depth(data)
    if "\\u" in text:  # an escape may stand for half of a character, which cannot be written again
        json.dumps(data, ensure_ascii=False).encode()
    return data


def _check_depth(data: Any) -> None:
    level: list[Any] = [[data]]
    for _ in range(DEEPEST + 1):
        parts = (part.values() if isinstance(part, dict) else part for part in level)
        level = [child for part in parts for child in part if isinstance(child, dict | list)]
        if not level:
            return
    raise ValueError(f"it is nested more than {DEEPEST} levels deep")


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"key {shown(twice)} occurs more than once in one object")
    return found


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:40]} is not a finite number")
    return number


def _integer(text: str) -> int:
    if len(text) > _LONGEST_INTEGER:
        raise ValueError(f"{text[:40]}… has more than 64 bits")
    return int(text)


def _number(text: str) -> int | float:
    return int(text) if len(text) <= _LONGEST_INTEGER else _finite(text)


def _explained(problem: str, data: Any, kind: Any, prefix: str) -> str:
    """Return a message of msgspec in our words: which place, what was received, what was expected.

    Args:
      problem: The message, e.g. "Expected `int` >= 1, got `str` - at `$.state[3].shape`".
      data: The data that was checked.
      kind: The type that it should have.
      prefix: Prefix of the keys.
    """
    what, _, at = problem.partition(" - at ")
    place, value, kind = _found(at, data, kind)
    if missing := re.fullmatch(r"Object missing required field `(\w+)`", what):
        return f"key '{prefix}{f'{place}.{missing[1]}'.lstrip('.')}' is missing"
    what = re.sub(r", got `.*`$", "", what).replace("`", "").removeprefix("Expected ")
    for word, plain in _WORDS.items():
        what = what.replace(word, plain)
    what = re.sub("str matching regex.*", "text without control characters", what)
    if typing.get_origin(kind) is Literal:
        what = " or ".join(repr(choice) for choice in typing.get_args(kind))
    named = (prefix + place.lstrip(".")).rstrip(".")
    named = f"'{named}'" if named else "it"
    return f"{named} is {shown(value)}; expected {what}"


def _found(at: str, data: Any, kind: Any) -> tuple[str, Any, Any]:
    """Return the place that a message of msgspec names, what is there, and its type.

    Args:
      at: The place, e.g. "`$.state[3].shape`" or, in one of a mapping's values, "`$.files[...]`".
      data: The data that was checked.
      kind: The type that it should have.
    """
    place = ""
    for name, index in re.findall(r"\.(\w+)|\[(\d+|\.\.\.)\]", at):
        kind = _without_extras(kind)
        if kind is Any:  # one of several types, and msgspec does not say which
            return f"{place}.{name}" if name else place, data, kind
        if name:
            data, kind = data[name], typing.get_type_hints(kind, include_extras=True)[name]
            place += f".{name}"
            continue
        *_, kind = (each for each in typing.get_args(kind) if each is not Ellipsis)
        if index == "...":  # msgspec does not say which
            key = next(key for key, value in data.items() if not _fits(value, kind))
            data, place = data[key], f"{place}[{shown(key)[1:-1]}]"
        else:
            data, place = data[int(index)], f"{place}[{index}]"
    kind = _without_extras(kind)
    if at.startswith("`key`"):
        kind = typing.get_args(kind)[0]
        data, place = next(key for key in data if not _fits(key, kind)), f"{place}[key]"
    return place, data, kind


def _without_extras(kind: Any) -> Any:
    """Return a type without its bounds and without None as an alternative; Any for several."""
    if typing.get_origin(kind) is Annotated:
        kind = typing.get_args(kind)[0]
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        kinds = [each for each in typing.get_args(kind) if each is not type(None)]
        kind = kinds[0] if len(kinds) == 1 else Any
        return _without_extras(kind)
    return kind


def _fits(value: Any, kind: Any) -> bool:
    try:
        msgspec.convert(value, kind)
    except msgspec.ValidationError:
        return False
    return True
