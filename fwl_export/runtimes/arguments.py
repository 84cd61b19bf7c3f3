"""Checks of arguments: a wrong type is refused with one sentence, before anything runs."""

from __future__ import annotations

import operator
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fwl_export.bundle.manifest import Bundle
from fwl_export.bundle.state import Array
from fwl_export.errors import ConfigError, ShapeError

MAX_ROWS = 1 << 20
"""Largest number of rows of a session, as in libfwl."""

MAX_THREADS = 1024
"""Largest number of threads inside one operator."""


class _Kind(NamedTuple):
    """What an argument may be.

    Attributes:
      types: Classes of which it is an instance.
      expected: What to write instead, for the message.
    """

    types: tuple[type, ...]
    expected: str


_YES_OR_NO = _Kind((bool, np.bool_), "True or False")
_NAME = _Kind((str,), "a name in quotes")
_NAME_OR_NONE = _Kind((str, type(None)), "a name in quotes, or None")

# Arguments of `open_session`, and of a session's methods, that are neither numbers nor arrays.
_KINDS = {
    "bundle": _Kind((str, Path, Bundle), "the path of a folder, or what read_bundle returns"),
    "runtime": _NAME,
    "precision": _NAME_OR_NONE,
    "plugin": _Kind((str, Path), "auto, none, required, or the path of a library"),
    "device": _NAME_OR_NONE,
    "variant": _NAME_OR_NONE,
    "cuda_graph": _YES_OR_NO,
    "learn": _YES_OR_NO,
    "sampler": _Kind((Callable, type(None)), "a Sampler, or None"),  # type: ignore[arg-type]
    "path": _Kind((str, os.PathLike), "the path of a file"),
    "compress": _NAME,
}


def check_types(**arguments: object) -> None:
    """Check the types of some arguments, each a key of the table above.

    Raises:
      ConfigError: An argument has the wrong type.
    """
    for name, value in arguments.items():
        kind = _KINDS[name]
        if not isinstance(value, kind.types):
            raise ConfigError(f"{name} is {shown(value)}; expected {kind.expected}")


def check_threads(threads: object) -> None:
    """Check a number of threads inside one operator, or None.

    Raises:
      ConfigError: It is not a whole number, or out of range.
    """
    if threads is None:
        return
    count = whole_number(threads)
    if count is None or not 0 <= count <= MAX_THREADS:
        raise ConfigError(
            f"threads is {shown(threads)}; expected a whole number up to {MAX_THREADS}, or None: "
            "ONNX Runtime chooses"
        )


def checked_batch(batch: object) -> int:
    """Return a number of rows.

    Raises:
      ShapeError: It is not a whole number, or out of range.
    """
    count = whole_number(batch)
    if count is None or not 1 <= count <= MAX_ROWS:
        raise ShapeError(f"batch is {shown(batch)}; expected 1 to {MAX_ROWS} rows")
    return count


def checked_rows(rows: Sequence[int], batch: int) -> list[int]:
    """Return the numbers of some rows of a session.

    Args:
      rows: What the caller gave.
      batch: Number of rows of the session.

    Raises:
      ShapeError: A row does not exist or is named twice, or there are none.
    """
    given = checked_list("rows", rows)
    chosen = [number for number in map(whole_number, given) if number is not None]
    if len(chosen) < len(given):
        raise ShapeError(f"rows are {shown(given)}; expected whole numbers")
    for row in chosen:
        if not 0 <= row < batch:
            raise ShapeError(f"row {row} does not exist; expected 0 to {batch - 1}")
    if len(set(chosen)) < len(chosen) or not chosen:
        raise ShapeError(f"rows are {shown(chosen)}; expected one or more rows, each once")
    return chosen


def checked_list(name: str, values: Iterable[Any]) -> list[Any]:
    """Return several values as a list.

    Raises:
      ShapeError: They are not several.
    """
    try:
        return list(values)
    except TypeError:
        raise ShapeError(f"{name} is {shown(values)}; expected a list of whole numbers") from None


def checked_array(name: str, values: npt.ArrayLike) -> Array:
    """Return values as an array of whatever type they have.

    Args:
      name: Name of the argument in the message.
      values: What the caller gave.

    Raises:
      ShapeError: The rows have different lengths.
    """
    try:
        return np.asarray(values)
    except ValueError:
        raise ShapeError(
            f"{name} are rows of different lengths; pad them, and pass lengths"
        ) from None


def checked_numbers(name: str, values: npt.ArrayLike) -> Array:
    """Return real numbers, or truth values, as float32.

    Args:
      name: Name of the argument in the message.
      values: What the caller gave.

    Raises:
      ShapeError: The rows have different lengths, or the values are not real numbers.
    """
    given = checked_array(name, values)
    if given.dtype.kind not in "biuf":
        raise ShapeError(f"{name} is {given.dtype}; expected real numbers")
    with np.errstate(over="ignore"):  # infinite values are refused afterwards
        return given.astype(np.float32, copy=False)


def whole_number(value: Any) -> int | None:
    """Return a whole number as an `int`, or None for anything else, truth values included."""
    if isinstance(value, (bool, np.bool_)):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def shown(value: Any) -> str:
    """Return a value for a message, shortened if it is long."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
