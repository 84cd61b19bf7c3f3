"""JSON files with a schema version: clear errors when reading, and no NaN when writing."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fwl_export.errors import FwlError


def read_json(path: Path, error: type[FwlError], hint: str = "was it truncated?") -> Any:
    """Return the data of a JSON file.

    Args:
      path: File to read, in UTF-8.
      error: Class of the exception to raise.
      hint: What may be wrong or what to do; ends the error message.

    Raises:
      FwlError: The file is not JSON; raised as `error`.
      OSError: The file cannot be read.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as problem:
        raise error(f"{path} is not JSON ({problem}); {hint}") from None


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
    if version != expected:
        newer = isinstance(version, int) and version > expected
        raise error(
            f"{source}: schema_version is {version!r}, but this fwl-export reads {expected}; "
            f"{'update fwl-export' if newer else remedy}"
        )
    result: dict[str, Any] = data
    return result


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
