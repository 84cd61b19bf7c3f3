"""State files: the state of R rows in one safetensors file, which every runtime reads and writes.

Tensors have the names and shapes of the model's state, [R, ...]. The metadata, all text, are
`format` ("fwl-state"), `version`, `model_id` (the model's identity from the bundle), `rows`,
`tokens` (positions of the rows, separated by commas) and `compress`. In a compressed file, other
tensors stand for some of the state's:

- "fp16": `<name>.half` [R, ...] float16 times `<name>.scale` [R] float32, for float32 tensors with
  `COMPRESS_FROM` or more elements per row.
- "lowrank": `<name>.left` [R, Dk, r] times `<name>.right` [R, r, Dv], a matrix product, for the
  fast weights' matrices, whose rank is at most the number of tokens read; and `<name>.used`
  [R, H, n, Dh], the first n slots of an attention cache of which no row has filled the others.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fwl_export.bundle import state as states
from fwl_export.bundle.state import Array, State, TensorSpec
from fwl_export.errors import ConfigError, StateError
from fwl_export.files import replaced_file

FORMAT = "fwl-state"
VERSION = 1
COMPRESSIONS = ("none", "fp16", "lowrank")
COMPRESS_FROM = 1024

# Largest error of the factors relative to the matrix (Frobenius norm): like that of float32 sums.
_LOWRANK_TOLERANCE = 2.0**-20


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
    tensors: dict[str, Array] = {}
    for spec in specs:
        tensors |= _compressed(spec, state[spec.name], tokens, compress)
    metadata = {
        "format": FORMAT,
        "version": str(VERSION),
        "model_id": model_id,
        "rows": str(len(tokens)),
        "tokens": ",".join(map(str, tokens)),
        "compress": compress,
    }
    content = save({n: np.ascontiguousarray(a) for n, a in tensors.items()}, metadata)
    with replaced_file(path) as beside:
        beside.write_bytes(content)
    back = {spec.name: _restored(spec, tensors, len(tokens)) for spec in specs}
    return SavedState(
        file_bytes=len(content),
        state_bytes=sum(array.nbytes for array in state.values()),
        tokens=tokens,
        error=max(_error(back[name], array) for name, array in state.items()),
    )


def load_state(path: Path, specs: Sequence[TensorSpec], model_id: str) -> State:
    """Read what `save_state` wrote.

    Args:
      path: File to read.
      specs: Specs of the model's state.
      model_id: Identity of the model, which must be that of the file.

    Returns:
      Arrays [R, ...] by name.

    Raises:
      StateError: The file is not a state file, is damaged, comes from another model, or has NaN or
        infinite values.
      OSError: The file cannot be read.
    """
    content = Path(path).read_bytes()
    tensors, metadata = _parsed(content, path)
    if metadata.get("format") != FORMAT:
        raise StateError(
            f"'{path}' is a safetensors file, but not a state file; expected a file that "
            "`fwl-export read` or a session's save_state wrote"
        )
    if metadata.get("version") != str(VERSION):
        raise StateError(
            f"'{path}' is a state file of version {metadata.get('version')}, but this fwl-export "
            f"reads version {VERSION}; update fwl-export, or save the state again"
        )
    if metadata.get("model_id") != model_id:
        raise StateError(
            f"'{path}' was saved from another model (its model_id is "
            f"{str(metadata.get('model_id'))[:12]}…, this bundle's is {model_id[:12]}…); only the "
            "model that wrote a state can load it, at the same precision"
        )
    try:
        rows = int(metadata["rows"])
        state = {spec.name: _restored(spec, tensors, rows) for spec in specs}
    except (KeyError, ValueError) as error:
        raise StateError(
            f"'{path}' lacks a tensor or an entry of its metadata, or has a malformed one "
            f"({error}); save it again"
        ) from None
    states.check(specs, state, rows)
    states.check_finite(state)
    if rows < 1 or (state["position"] < 0).any():
        raise StateError(
            f"'{path}' has {rows} rows at positions {state['position'].tolist()}; expected one "
            "row or more, at positions of 0 or more. Save it again"
        )
    return state


def _parsed(content: bytes, path: Path) -> tuple[dict[str, Array], dict[str, str]]:
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        tensors = load(content)
        size = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + size])
    except (SafetensorError, KeyError, ValueError) as error:
        raise StateError(
            f"'{path}' is not a state file, or was truncated or changed ({error}); save it again"
        ) from None
    return tensors, header.get("__metadata__", {})


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
    if compress == "lowrank" and spec.name.startswith("cache.") and max(tokens) < spec.shape[1]:
        return {f"{spec.name}.used": array[:, :, : max(tokens)]}
    return whole


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
    """Return a tensor of the state [R, ...] from the tensors that stand for it in a file.

    Raises:
      KeyError, ValueError: A part is missing, or the parts do not fit each other.
    """
    if spec.name in tensors:
        return tensors[spec.name]
    if (half := tensors.get(f"{spec.name}.half")) is not None:
        wide = half.astype(np.float32)
        return wide * _column(tensors[f"{spec.name}.scale"].reshape(rows), wide)
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
