"""What runs is what was hashed: files may change under an open session, and it does not notice."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from fwl_export import open_session
from fwl_export.bundle.manifest import MODEL_FILE, Bundle, read_bundle
from fwl_export.bundle.onnx_file import external_tensors
from fwl_export.errors import BundleError

IDS = list(range(20))


def zero(path: Path) -> None:
    with path.open("r+b") as stream:  # in place: the file stays the same
        stream.write(bytes(path.stat().st_size))


def noise(path: Path) -> None:
    size = path.stat().st_size
    with path.open("r+b") as stream:
        stream.write(np.random.default_rng(0).bytes(size))


# Truncating a file that is mapped into memory kills the process that reads it.
@pytest.mark.parametrize(
    "change", [zero, noise, lambda path: os.truncate(path, 0), lambda path: path.unlink()]
)
@pytest.mark.parametrize("runtime", ["onnxruntime", "onnx-reference", "torch"])
def test_changed_files_do_not_move_an_open_session(
    own_bundle: Path, runtime: str, change: Callable[[Path], object]
) -> None:
    expected = open_session(own_bundle, runtime).feed(IDS)
    session = open_session(own_bundle, runtime)
    for name in read_bundle(own_bundle).manifest.files:
        change(own_bundle / name)
    assert np.array_equal(session.feed(IDS), expected)
    assert np.array_equal(session.another().feed(IDS), expected)
    with pytest.raises(BundleError, match=r"was changed or truncated|lacks the file"):
        open_session(own_bundle, runtime)


def test_a_file_that_changes_while_it_is_opened_is_refused_or_not_noticed(
    own_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = open_session(own_bundle).feed(IDS)
    original = Bundle.read_file

    def changed_right_after(bundle: Bundle, name: str) -> bytes:
        content = original(bundle, name)
        zero(bundle.folder / name)
        return content

    monkeypatch.setattr(Bundle, "read_file", changed_right_after)
    assert np.array_equal(open_session(own_bundle).feed(IDS), expected)


def external(name: str, file: str) -> TensorProto:
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[4])
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", file), ("offset", "0"), ("length", "16")):
        tensor.external_data.add(key=key, value=value)
    return tensor


# ONNX Runtime would take these from the current folder, where the attacker may have put a file.
@pytest.mark.parametrize("place", ["branch", "constant", "function"])
def test_external_data_inside_nodes_are_refused_though_the_manifest_lists_them(
    own_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    for folder in (own_bundle, tmp_path):
        np.ones(4, np.float32).tofile(folder / "w.bin")
    monkeypatch.chdir(tmp_path)
    model = onnx.load(str(own_bundle / MODEL_FILE), load_external_data=False)
    result = helper.make_tensor_value_info("planted", TensorProto.FLOAT, [4])
    constant = helper.make_node("Constant", [], ["planted"], value=external("w", "w.bin"))
    if place == "branch":
        node = helper.make_node("Identity", ["w"], ["planted"])
        branch = helper.make_graph([node], "b", [], [result], [external("w", "w.bin")])
        model.graph.initializer.append(helper.make_tensor("yes", TensorProto.BOOL, [], [True]))
        constant = helper.make_node(
            "If", ["yes"], ["planted"], then_branch=branch, else_branch=branch
        )
    if place == "function":
        model.functions[0].node.insert(0, constant)
    else:
        model.graph.node.append(constant)
        model.graph.output.append(result)
    (own_bundle / MODEL_FILE).write_bytes(model.SerializeToString())
    read_bundle(own_bundle).add_files([MODEL_FILE, "w.bin"])
    with pytest.raises(BundleError, match="tensors inside nodes or functions whose data are in "):
        open_session(own_bundle)


@pytest.mark.parametrize(("key", "value"), [("offset", "999999999"), ("length", "12")])
def test_a_tensor_outside_of_its_file_is_refused(own_bundle: Path, key: str, value: str) -> None:
    model = onnx.load(str(own_bundle / MODEL_FILE), load_external_data=False)
    tensor = next(t for t in model.graph.initializer if t.external_data)
    next(entry for entry in tensor.external_data if entry.key == key).value = value
    (own_bundle / MODEL_FILE).write_bytes(model.SerializeToString())
    read_bundle(own_bundle).add_files([MODEL_FILE])
    with pytest.raises(BundleError, match=r"lies outside of 'model\.onnx\.data'|has 12 bytes, not"):
        open_session(own_bundle)


def test_external_tensors_are_those_that_onnx_finds(tiny_bundle_fp16: Path) -> None:
    path = tiny_bundle_fp16 / MODEL_FILE
    model = onnx.load(str(path), load_external_data=False)
    stored = [tensor for tensor in model.graph.initializer if tensor.external_data]
    found = {tensor.name: tensor for tensor in external_tensors(path, path.read_bytes())}
    assert len(stored) == len(found) > 0
    for tensor in stored:
        dtype, place = helper.tensor_dtype_to_np_dtype(tensor.data_type), found[tensor.name]
        assert (place.dtype, place.shape) == (dtype.name, tuple(tensor.dims))
        entries = {entry.key: entry.value for entry in tensor.external_data}
        assert (str(place.offset), str(place.size)) == (entries["offset"], entries["length"])
