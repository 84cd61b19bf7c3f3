"""Read the arrays of a checkpoint by their paths, without the framework that wrote it.

Paths have slashes, e.g. `params/layers_0/Dense_0/kernel`. An array is read only when it is asked
for, because the rest of a checkpoint may be large. None of these formats can hold code.
"""

from __future__ import annotations

import functools
import math
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fwl_export.bundle.state import Array
from fwl_export.errors import CheckpointError, MissingDependencyError
from fwl_export.filesystem import open_regular
from fwl_export.importers import tensor_bundle
from fwl_export.json_files import brief, shown

# Maps the path of each array to a function that reads it.
Arrays = Mapping[str, Callable[[], Array]]

# What zipfile and NumPy raise for damaged files.
_NPZ_ERRORS = (
    *(ValueError, TypeError, OSError, EOFError, KeyError, RuntimeError, struct.error),
    *(zipfile.BadZipFile, zlib.error, SyntaxError, RecursionError),
)
# Weights hardly compress. An array that grows more than this, and is large, is an attack.
_LARGEST_RATIO = 20
_SMALL_ARRAY = 1 << 26  # in bytes

_EXTRA = "pip install 'fwl-export[import]'"

# What Python raises for data of another structure than expected.
_MALFORMED = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)

# Codes of Flax's msgpack extensions (flax/serialization.py).
_FLAX_ARRAY, _FLAX_COMPLEX, _FLAX_SCALAR = 1, 2, 3
_FLAX_CHUNKED = "__msgpack_chunked_array__"


def read_jax(source: Path) -> Arrays:
    """Return the arrays of Flax parameters.

    Args:
      source: Path of a msgpack file, an orbax folder, or an .npz file whose names are the paths.

    Raises:
      CheckpointError: The source is none of these, or is truncated.
      MissingDependencyError: The package that reads the format is not installed.
    """
    _check_exists(source)
    if source.is_dir():
        return _read_orbax(source)
    return _read_npz(source) if _is_zip(source) else _read_msgpack(source)


def read_tensorflow(source: Path) -> Arrays:
    """Return the arrays of a TensorFlow 2 checkpoint or an .npz file.

    Args:
      source: Folder of the checkpoint, the path of its files up to ".index", or an .npz file.

    Raises:
      CheckpointError: The source is neither, or is truncated.
      MissingDependencyError: google-crc32c is not installed.
    """
    if source.is_file() and _is_zip(source):
        return _read_npz(source)
    suffix = "/.ATTRIBUTES/VARIABLE_VALUE"  # ends the name of every variable
    arrays = tensor_bundle.read_bundle(tensor_bundle.find_index(source))
    return {name.removesuffix(suffix): read for name, read in arrays.items()}


def _check_exists(source: Path) -> None:
    if not source.exists():
        raise CheckpointError(
            f"'{source}' does not exist; expected the checkpoint to import: a msgpack file, an "
            "orbax folder, or an .npz file"
        )


def _is_zip(source: Path) -> bool:
    with open_regular(source, CheckpointError) as stream:
        return stream.read(2) == b"PK"


def _read_npz(source: Path) -> Arrays:
    def read(name: str) -> Array:
        try:
            _check_npy(source, name)
            with np.load(source, allow_pickle=False) as file:
                return file[name]
        except _NPZ_ERRORS as error:
            raise CheckpointError(
                f"{source}: array {shown(name)} cannot be read ({brief(error)}); save its "
                "numbers again with numpy.savez"
            ) from None

    try:
        with np.load(source, allow_pickle=False) as file:
            names = list(file.files)
    except _NPZ_ERRORS as error:
        raise CheckpointError(
            f"{source} cannot be read as .npz ({brief(error)}); if it is truncated, copy it again"
        ) from None
    return {name: functools.partial(read, name) for name in names}


def _check_npy(source: Path, name: str) -> None:
    """Check that an array of an .npz file holds what its header says, before it is read.

    Raises:
      ValueError, OSError, ...: See `_NPZ_ERRORS`.
    """
    with zipfile.ZipFile(source) as archive:
        names = archive.namelist()
        info = archive.getinfo(name if name in names else f"{name}.npy")
        if info.file_size > _SMALL_ARRAY + _LARGEST_RATIO * info.compress_size:
            raise ValueError(
                f"it grows from {info.compress_size} to {info.file_size} bytes, which no weights do"
            )
        with archive.open(info) as stream:
            major, _ = np.lib.format.read_magic(stream)
            reader = "read_array_header_1_0" if major == 1 else "read_array_header_2_0"
            shape, _, dtype = getattr(np.lib.format, reader)(stream)
    if math.prod(shape) * dtype.itemsize > info.file_size:
        raise ValueError(
            f"its header says {dtype} {list(shape)}, but it has {info.file_size} bytes"
        )


def _check_claim(claimed: int, held: int) -> None:
    if claimed > held:
        raise ValueError(f"it claims {claimed} bytes, of which the file holds {held}")


def _read_msgpack(source: Path) -> Arrays:
    try:
        import msgpack
    except ImportError:
        raise MissingDependencyError(
            f"Flax's msgpack files need the package msgpack, which is not installed; {_EXTRA}"
        ) from None
    try:
        tree = msgpack.unpackb(
            source.read_bytes(), ext_hook=_flax_extension, raw=False, strict_map_key=False
        )
        arrays: dict[str, Array] = {}
        _flatten(tree, "", arrays)
    except (*_MALFORMED, msgpack.UnpackException) as error:
        raise CheckpointError(
            f"{source} cannot be read as Flax's msgpack ({str(error) or type(error).__name__}); "
            "expected a msgpack file, an orbax folder, or an .npz file. If it is truncated, copy "
            "it again"
        ) from None
    return {name: functools.partial(np.asarray, array) for name, array in arrays.items()}


def _flax_extension(code: int, data: bytes) -> Any:
    import msgpack

    if code in (_FLAX_ARRAY, _FLAX_SCALAR):
        shape, kind, raw = msgpack.unpackb(data, raw=True)
        array = tensor_bundle.array_from_bytes(raw, kind.decode(), shape)
        return array if code == _FLAX_ARRAY else array[()]
    if code == _FLAX_COMPLEX:
        return None  # the Fast Weight Layer has no complex parameters
    return msgpack.ExtType(code, data)


def _flatten(tree: Any, path: str, arrays: dict[str, Array]) -> None:
    """Add the arrays of nested dictionaries to `arrays`, by their paths."""
    if isinstance(tree, dict) and _FLAX_CHUNKED in tree:
        # Flax splits arrays of more than 2^30 bytes, and writes lists as {"0": ..., "1": ...}.
        chunks, shape = (
            [part for _, part in sorted(tree[key].items(), key=lambda item: int(item[0]))]
            for key in ("chunks", "shape")
        )
        arrays[path] = np.concatenate([np.ravel(chunk) for chunk in chunks]).reshape(shape)
    elif isinstance(tree, dict):
        for key, value in tree.items():
            _flatten(value, f"{path}/{key}" if path else str(key), arrays)
    elif isinstance(tree, (np.ndarray, np.generic, float)):
        arrays[path] = np.asarray(tree)


def _read_orbax(source: Path) -> Arrays:
    """Return the arrays of an orbax folder: zarr arrays, as files or in an OCDBT store."""
    try:
        import tensorstore
    except ImportError:
        raise MissingDependencyError(
            f"orbax folders need the package tensorstore, which is not installed; {_EXTRA}"
        ) from None
    folder = _orbax_item(source)
    store: dict[str, Any] = {"driver": "file", "path": f"{folder.resolve()}/"}
    if (folder / "manifest.ocdbt").exists():
        store = {"driver": "ocdbt", "base": store}

    def read(place: str, driver: str) -> Array:
        part = {**store, "path": f"{store.get('path', '')}{place}/"}
        # By default a missing file reads as zeros, which would hide a damaged folder. Orbax itself
        # writes arrays of zeros like all others.
        spec = {"driver": driver, "kvstore": part, "fill_missing_data_reads": False}
        try:
            array = tensorstore.open(spec, read=True).result()
            # tensorstore ends the process when memory is short.
            sizes = array.shape, array.chunk_layout.read_chunk.shape or ()
            largest = max(math.prod(size or 0 for size in shape) for shape in sizes)
            held = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
            _check_claim(
                largest * array.dtype.numpy_dtype.itemsize, _SMALL_ARRAY + _LARGEST_RATIO * held
            )
            return _plain(np.asarray(array.read().result()))
        except (ValueError, OSError) as error:
            raise CheckpointError(
                f"{source}: array '{place}' cannot be read ({_first_line(error)}); if the folder "
                "is incomplete, copy it again"
            ) from None

    try:
        keys = [key.decode() for key in tensorstore.KvStore.open(store).result().list().result()]
    except (ValueError, OSError) as error:
        raise CheckpointError(
            f"{source} cannot be read as an orbax folder ({_first_line(error)}); if it is "
            "incomplete, copy it again"
        ) from None
    arrays = {}
    for key in keys:
        place, _, name = key.rpartition("/")
        driver = {".zarray": "zarr", "zarr.json": "zarr3"}.get(name)
        if driver and place:
            arrays[place.replace(".", "/")] = functools.partial(read, place, driver)
    if not arrays:
        raise CheckpointError(
            f"'{source}' holds no arrays; expected an orbax folder of Flax parameters, a msgpack "
            "file, or an .npz file"
        )
    return arrays


def _orbax_item(source: Path) -> Path:
    """Return the folder of the parameters; orbax's CheckpointManager puts them in STEP/default."""
    if (source / "_METADATA").exists() or (source / "manifest.ocdbt").exists():
        return source
    steps = [path for path in source.iterdir() if path.is_dir() and path.name.isdigit()]
    if steps:
        source = max(steps, key=lambda path: int(path.name))
    return next((source / n for n in ("default", "params") if (source / n).is_dir()), source)


def _plain(array: Array) -> Array:
    """Return an array as float32 if numpy lacks its type, as it does bfloat16; else unchanged."""
    return array.astype(np.float32) if array.dtype.kind == "V" else array


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0][:200]
