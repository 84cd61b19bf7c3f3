"""The formats: files of the frameworks, and files that are truncated, changed or foreign."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import ml_dtypes
import msgpack
import numpy as np
import pytest
import tensorstore

from fwl_export.errors import CheckpointError, FwlError, MissingDependencyError
from fwl_export.importers.arrays import Arrays, read_jax, read_tensorflow

DATA = Path(__file__).parents[1] / "data"
MSGPACK = DATA / "importers" / "jax.msgpack"
ORBAX = DATA / "importers" / "jax_orbax"
BUNDLE = DATA / "importers" / "tf_checkpoint"


def flax_array(array: np.ndarray, kind: str = "") -> msgpack.ExtType:
    """Encode as flax/serialization.py does."""
    data = (array.shape, kind or array.dtype.name, array.tobytes())
    return msgpack.ExtType(1, msgpack.packb(data))


def write_flax(path: Path, tree: object) -> Path:
    path.write_bytes(msgpack.packb(tree))
    return path


def write_zarr(place: Path, array: np.ndarray, driver: str) -> None:
    spec = {"driver": driver, "kvstore": {"driver": "file", "path": f"{place}/"}}
    store = tensorstore.open(spec, create=True, dtype=array.dtype, shape=array.shape).result()
    store[...] = array


def all_of(arrays: Arrays) -> dict[str, np.ndarray]:
    return {name: read() for name, read in arrays.items()}


@pytest.mark.parametrize("source", [MSGPACK, ORBAX])
def test_flax_parameters_as_flax_and_orbax_write_them(source: Path) -> None:
    read = all_of(read_jax(source))
    expected = all_of(read_jax(DATA / "fwl_reference_jax.npz"))
    assert read
    for name, array in read.items():
        np.testing.assert_array_equal(array, expected[name], strict=True)
    assert set(read) == {name for name in expected if name.startswith("params/")}


@pytest.mark.parametrize("driver", ["zarr", "zarr3"])
def test_orbax_folders_without_ocdbt_and_steps_of_a_manager(tmp_path: Path, driver: str) -> None:
    array = np.arange(6, dtype=ml_dtypes.bfloat16).reshape(2, 3)
    for step in (7, 12):
        write_zarr(tmp_path / str(step) / "default" / "params.a.kernel", array * step, driver)
    read = all_of(read_jax(tmp_path))
    assert set(read) == {"params/a/kernel"}
    np.testing.assert_array_equal(
        read["params/a/kernel"], 12 * np.arange(6, dtype=np.float32).reshape(2, 3), strict=True
    )


def test_flax_arrays_in_half_precision_in_chunks_and_alone(tmp_path: Path) -> None:
    half = np.array([1.5, -2.25], ml_dtypes.bfloat16)
    chunked = {
        "__msgpack_chunked_array__": True,
        "shape": {"0": 2, "1": 6},
        # As strings, "10" sorts before "2".
        "chunks": {str(i): flax_array(np.array([float(i)])) for i in range(12)},
    }
    scalar = msgpack.ExtType(3, flax_array(np.array(0.5)).data)
    tree = {"a": {"half": flax_array(half), "chunked": chunked, "scalar": scalar, "name": "x"}}
    read = all_of(read_jax(write_flax(tmp_path / "p", tree)))
    np.testing.assert_array_equal(read["a/half"], np.float32([1.5, -2.25]), strict=True)
    np.testing.assert_array_equal(read["a/chunked"], np.arange(12.0).reshape(2, 6), strict=True)
    assert read["a/scalar"] == 0.5
    assert set(read) == {"a/half", "a/chunked", "a/scalar"}


@pytest.mark.parametrize("size", [0, 1, 30, 700, -1])
def test_a_truncated_msgpack_file(tmp_path: Path, size: int) -> None:
    path = tmp_path / "params"
    path.write_bytes(MSGPACK.read_bytes()[:size])
    refused(path, "or an .npz file. If it is truncated, copy it again")


@pytest.mark.parametrize(
    "array",
    [
        flax_array(np.zeros(3), "float32"),
        flax_array(np.zeros(3), "object"),
        flax_array(np.zeros(3), "no_type"),
        msgpack.ExtType(1, b"\xc1"),
    ],
)
def test_a_wrong_array_in_a_msgpack_file(tmp_path: Path, array: msgpack.ExtType) -> None:
    refused(write_flax(tmp_path / "params", {"a": array}), "cannot be read as Flax's msgpack")


def test_an_npz_file_that_is_truncated_or_holds_pickled_objects(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    path.write_bytes((DATA / "fwl_reference_jax.npz").read_bytes()[:5000])
    refused(path, "cannot be read as .npz")
    np.savez(path, a=np.array([{}, []], dtype=object))
    with pytest.raises(CheckpointError, match="'a' cannot be read \\(Object arrays cannot be load"):
        read_jax(path)["a"]()


def test_an_orbax_folder_that_is_not_complete(tmp_path: Path) -> None:
    refused(tmp_path, "holds no arrays; expected an orbax folder")
    copy = Path(shutil.copytree(ORBAX, tmp_path / "copy"))
    shutil.rmtree(copy / "d")
    refused(copy, "cannot be read as an orbax folder")
    (copy / "manifest.ocdbt").write_bytes(b"no manifest")
    refused(copy, "cannot be read as an orbax folder")


def test_a_missing_part_of_an_array_is_not_read_as_zeros(tmp_path: Path) -> None:
    write_zarr(tmp_path / "params.a", np.ones(3), "zarr")
    (tmp_path / "params.a" / "0").unlink()
    with pytest.raises(
        CheckpointError, match=r"'params\.a' cannot be read .* if the folder is incomplete"
    ):
        read_jax(tmp_path)["params/a"]()


def test_a_tensorflow_checkpoint_as_tensorflow_writes_it() -> None:
    read = all_of(read_tensorflow(BUNDLE))
    with np.load(DATA / "fwl_reference_tf.npz") as expected:
        np.testing.assert_array_equal(
            read["model/fwl/layers/0/kernel"], expected["up_kernel"], strict=True
        )
    assert read["model/fwl/layers/3/beta_step_size"] == 0.2
    assert read["optimizer/iter"] == 1


def test_the_checkpoint_is_named_by_folder_or_path(tmp_path: Path) -> None:
    copy = Path(shutil.copytree(BUNDLE, tmp_path / "copy"))
    names = set(read_tensorflow(copy))
    assert set(read_tensorflow(copy / "ckpt-1")) == names
    assert set(read_tensorflow(copy / "ckpt-1.index")) == names
    (copy / "checkpoint").unlink()
    assert set(read_tensorflow(copy)) == names
    shutil.copy(copy / "ckpt-1.index", copy / "ckpt-2.index")
    refused(copy, "has 2 .index files and no file 'checkpoint' that names", read_tensorflow)
    refused(copy / "ckpt-3", "ckpt-3.index' does not exist; expected a TensorFlow", read_tensorflow)


@pytest.mark.parametrize("size", [0, 20, 60, 900, -1])
def test_a_truncated_index(tmp_path: Path, size: int) -> None:
    path = tmp_path / "a.index"
    path.write_bytes((BUNDLE / "ckpt-1.index").read_bytes()[:size])
    refused(path, "cannot be read as the index of a TensorFlow checkpoint", read_tensorflow)


def test_any_changed_byte_of_an_index_is_found_or_harmless(tmp_path: Path) -> None:
    """Whatever the bytes, a reader ends with our error or with the true values."""
    whole, path = (BUNDLE / "ckpt-1.index").read_bytes(), tmp_path / "a.index"
    expected = set(read_tensorflow(BUNDLE))
    found = 0
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :])
        try:
            assert set(read_tensorflow(path)) == expected, at
        except CheckpointError:
            found += 1
    # Changes go unnoticed in the footer's padding and in the block of statistics, which is skipped.
    assert found > len(whole) - 80


@pytest.mark.parametrize("change", ["cut off", "changed", "missing"])
def test_data_that_is_not_what_was_written(tmp_path: Path, change: str) -> None:
    copy = Path(shutil.copytree(BUNDLE, tmp_path / "copy"))
    data = copy / "ckpt-1.data-00000-of-00001"
    whole = data.read_bytes()
    data.write_bytes({"cut off": b"", "changed": bytes(len(whole)), "missing": b""}[change])
    if change == "missing":
        data.unlink()
    expected = {
        "cut off": "0 bytes for shape",
        "changed": "checksum is wrong",
        "missing": "No such",
    }
    with pytest.raises(CheckpointError, match=expected[change]):
        read_tensorflow(copy)["model/fwl/layers/0/kernel"]()


@pytest.mark.parametrize(
    ("package", "read", "source"),
    [
        ("msgpack", read_jax, MSGPACK),
        ("tensorstore", read_jax, ORBAX),
        ("google_crc32c", read_tensorflow, BUNDLE),
    ],
)
def test_a_missing_package_is_named_with_the_extra(
    monkeypatch: pytest.MonkeyPatch, package: str, read, source: Path
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'fwl-export\[import\]'"):
        read(source)


def test_a_source_that_does_not_exist(tmp_path: Path) -> None:
    refused(tmp_path / "nothing", "does not exist; expected the checkpoint to import")


def refused(source: Path, message: str, read=read_jax, kind: type[FwlError] = CheckpointError):
    with pytest.raises(kind, match=re.escape(message)) as info:
        read(source)
    assert "\n" not in str(info.value)
