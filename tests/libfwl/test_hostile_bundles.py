"""libfwl runs the bytes whose hashes it checked, and refuses what a manifest cannot vouch for."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from attacks.common import edit_manifest, edited_model, list_file
from tests.libfwl.library import Library, Model
from tests.libfwl.test_session import ids, refused

Opener = Callable[[], Model]


@pytest.fixture
def opened(library: Library, runtime: Path, own_bundle: Path) -> Opener:
    return lambda: library.open(own_bundle, runtime)


@pytest.mark.parametrize("change", ["overwritten", "truncated", "removed"])
def test_files_may_change_under_an_open_session(
    own_bundle: Path, opened: Opener, change: str
) -> None:
    session = opened().session(1)
    tokens = ids(1, 20)
    expected = session.feed(tokens)
    session.reset()
    for name in ("model.onnx", "model.onnx.data", "manifest.json"):
        path = own_bundle / name
        if change == "overwritten":
            with path.open("r+b") as stream:  # the same file, not another one in its place
                stream.write(os.urandom(path.stat().st_size))
        elif change == "truncated":
            os.truncate(path, 0)
        else:
            path.unlink()
    np.testing.assert_array_equal(session.feed(tokens), expected)


def outside(name: str, location: str = "loose.bin", **more: str) -> TensorProto:
    """Return a tensor of one float whose data is in another file."""
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[1])
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"location": location, **more}.items():
        tensor.external_data.add(key=key, value=value)
    return tensor


def branch(tensor: TensorProto) -> onnx.GraphProto:
    """Return a graph whose output is a tensor of its own."""
    info = helper.make_tensor_value_info(tensor.name, TensorProto.FLOAT, [1])
    return helper.make_graph([], "branch", [], [info], [tensor])


def node(*attributes: onnx.AttributeProto) -> onnx.NodeProto:
    made = helper.make_node("Identity", ["input_ids"], ["planted"])
    made.attribute.extend(attributes)
    return made


def sparse(tensor: TensorProto) -> onnx.SparseTensorProto:
    indices = helper.make_tensor("indices", TensorProto.INT64, [1], [0])
    return onnx.SparseTensorProto(values=tensor, indices=indices, dims=[4])


def graphs(tensor: TensorProto) -> onnx.AttributeProto:
    attribute = onnx.AttributeProto(name="branches", type=onnx.AttributeProto.GRAPHS)
    attribute.graphs.append(branch(tensor))
    return attribute


def add_initializer(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(outside("w"))
    model.graph.node.append(helper.make_node("Identity", ["w"], ["planted"]))
    model.graph.output.append(helper.make_tensor_value_info("planted", TensorProto.FLOAT, [1]))


# Every place of an ONNX file in which a tensor can be.
PLACES: dict[str, Callable[[onnx.ModelProto], Any]] = {
    "initializer": add_initializer,
    "sparse initializer": lambda m: m.graph.sparse_initializer.append(sparse(outside("w"))),
    "constant": lambda m: m.graph.node.append(node(helper.make_attribute("value", outside("w")))),
    "tensors": lambda m: m.graph.node.append(node(helper.make_attribute("v", [outside("w")]))),
    "sparse constant": lambda m: m.graph.node.append(
        node(helper.make_attribute("sparse_value", sparse(outside("w"))))
    ),
    "subgraph": lambda m: m.graph.node.append(
        node(helper.make_attribute("then_branch", branch(outside("w"))))
    ),
    "subgraphs": lambda m: m.graph.node.append(node(graphs(outside("w")))),
    "subgraph of a subgraph": lambda m: m.graph.node.append(
        node(
            helper.make_attribute(
                "body", helper.make_graph([node(graphs(outside("w")))], "body", [], [])
            )
        )
    ),
    "function": lambda m: m.functions[0].node.append(
        node(helper.make_attribute("value", outside("w")))
    ),
    "default of a function's attribute": lambda m: m.functions[0].attribute_proto.append(
        helper.make_attribute("w", outside("w"))
    ),
    "training": lambda m: m.training_info.add().algorithm.initializer.append(outside("w")),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("listed", [False, True])
def test_external_data_anywhere_in_the_model(
    own_bundle: Path, opened: Opener, place: str, listed: bool
) -> None:
    (own_bundle / "loose.bin").write_bytes(bytes(4))
    with edited_model(own_bundle) as model:
        PLACES[place](model)
    if not listed:
        refused(
            "bundle", "takes data from the file 'loose.bin', which the manifest does not", opened
        )
        return
    list_file(own_bundle, "loose.bin")
    if place == "initializer":
        opened().close()
    else:
        refused("bundle", "only initializers of the main graph may be outside", opened)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (outside("w", "../outside.bin"), "which the manifest does not list"),
        (outside("w", "/etc/hostname"), "which the manifest does not list"),
        (outside("w", "*/_ORT_MEM_ADDR_/*", offset="4096"), "which the manifest does not list"),
        (outside("w", "./model.onnx.data"), "which the manifest does not list"),
        (outside("w", ""), "which the manifest does not list"),
        (outside("w", "model.onnx.data", offset="-4"), "'offset' is not a number from 0"),
        (outside("w", "model.onnx.data", offset="9" * 30), "'offset' is not a number from 0"),
        (outside("w", "model.onnx.data", offset="999999999999"), "does not fit its place"),
        (outside("w", "model.onnx.data", length="5"), "does not fit its place"),
        (outside("w", "model.onnx.data", prepacked_0="x|0;4"), "unknown key 'prepacked_0'"),
    ],
)
def test_places_of_external_data(
    own_bundle: Path, opened: Opener, tensor: TensorProto, message: str
) -> None:
    with edited_model(own_bundle) as model:
        model.graph.initializer.append(tensor)
    refused("bundle", message, opened)


def test_a_tensor_larger_than_its_file(own_bundle: Path, opened: Opener) -> None:
    with edited_model(own_bundle) as model:
        tensor = outside("w", "model.onnx.data")
        tensor.dims[:] = [2**40, 2**40]
        model.graph.initializer.append(tensor)
    refused("bundle", "the data of 'w' does not fit its place", opened)


def test_an_unaligned_tensor_is_read(own_bundle: Path, opened: Opener) -> None:
    before = opened().session(1).feed(ids(1, 9))
    data = own_bundle / "model.onnx.data"
    data.write_bytes(b"\0" + data.read_bytes())
    with edited_model(own_bundle) as model:
        for tensor in model.graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "offset":
                    entry.value = str(int(entry.value) + 1)
    list_file(own_bundle, data.name)
    np.testing.assert_array_equal(opened().session(1).feed(ids(1, 9)), before)


def test_bytes_that_are_no_model(own_bundle: Path, opened: Opener) -> None:
    deep = b""
    for number in (6, 5, 1) * 40 + (7,):  # graphs inside each other, from the innermost
        deep = bytes([number << 3 | 2]) + _varint(len(deep)) + deep
    for content, message in (
        (b"\xff" * 4_000_000, "it has a number of more than ten bytes"),
        (b"\x3a\xff\xff\xff\xff\x0f", "it ends inside a field"),
        (b"\x3a\x00\x3a\x00", "field 7 occurs twice"),
        (b"\x3b\x3c", "a field of the unknown type 3"),
        (b"\x38\x01", "field 7 has the wrong type"),
        (b"\x00\x00", "a field without a valid number"),
        (deep, "its graphs are nested too deeply"),
        (b"\x18\x00\x00\x00ORTM", "without a valid number"),  # ONNX Runtime's own format
        (b"", "ONNX Runtime: "),
    ):
        (own_bundle / "model.onnx").write_bytes(content)
        list_file(own_bundle, "model.onnx")
        refused("bundle", message, opened)


def _varint(value: int) -> bytes:
    parts = []
    while value >= 128:
        parts.append(value & 127 | 128)
        value >>= 7
    return bytes([*parts, value])


STATE = {"name": "position", "shape": [], "dtype": "int64"}

# What is changed in a manifest, and what the message says then.
MANIFESTS: list[tuple[Callable[[dict[str, Any]], object], str]] = [
    (lambda m: m.update(max_tokens=0), "'max_tokens' is not a whole number from 1"),
    (lambda m: m.update(max_tokens=2**40), "'max_tokens' is not a whole number from 1"),
    (lambda m: m.update(max_tokens=16.0), "'max_tokens' is not a whole number from 1"),
    (lambda m: m.update(max_tokens=True), "'max_tokens' is not a whole number from 1"),
    (lambda m: m.update(schema_version=3.0), "schema_version is 3.0, but this libfwl reads 3"),
    (lambda m: m.pop("op"), "'op' is missing"),
    (lambda m: m["op"].update(version=1.5), "'version of the op' is not a whole number"),
    (lambda m: m["op"].update(version=3), "has version 3, but this libfwl runs versions 1 to 2"),
    (lambda m: m["op"].update(version=0), "has version 0, but this libfwl runs versions 1 to 2"),
    (
        lambda m: (m["op"].update(version=1), m.update(precision="fp16")),
        "the model has the precision fp16 with version 1 of fwl::LinearAttentionUpdate, whose sums "
        "overflow in half precision; export the model again",
    ),
    (lambda m: m["config"].update(vocab_size=-1), "'vocab_size' is not a whole number from 1"),
    (lambda m: m["config"].update(vocab_size=2**31 - 1), "no input or output 'logits'"),
    (lambda m: m["config"]["fast_weights"].update(anchor_interval=-1), "'anchor_interval' is not"),
    (lambda m: m["config"]["backbone"].update(max_positions=1e999), "is malformed"),
    (lambda m: m["config"].update(backbone=[]), "'backbone' is not an object"),
    (lambda m: m.update(model_id=None), "'model_id' is not a text"),
    (lambda m: m.update(model_id="a" * 65), "'model_id' is not a text of at most 64"),
    (lambda m: m.update(state={}), "'state' is not a list"),
    (lambda m: m["state"].pop(0), "the state does not start with the position"),
    (lambda m: m["state"].append(STATE), "the state has two tensors called 'position'"),
    (lambda m: m["state"][1].update(dtype="object"), "of the unknown type 'object'"),
    (lambda m: m["state"][1].update(dtype="float16"), "no input or output 'past.cache.0.key'"),
    (lambda m: m["state"][1].update(shape=[2**40, 2**40]), "is too large"),
    (lambda m: m["state"][1].update(shape=[2**30]), "no input or output 'past.cache.0.key'"),
    (lambda m: m["state"][1].update(shape=[0]), "is not a whole number from 1"),
    (lambda m: m["state"][1].update(shape=[1] * 9), "is not a list of at most 8"),
    (lambda m: m["state"][1].update(name="a\nb"), "without control characters"),
    (lambda m: m["state"][1].update(name="__metadata__"), "a tensor called '__metadata__'"),
    (lambda m: m["state"].extend([STATE] * 5000), "'state' is not a list of at most 4096"),
    (lambda m: m["files"].update({"a\0b": m["files"]["model.onnx"]}), "without control characters"),
    (lambda m: m["files"].update({"": m["files"]["model.onnx"]}), "leaves the bundle's folder"),
    (lambda m: m["files"].update({"a/../../b": m["files"]["model.onnx"]}), "leaves the bundle's"),
    (lambda m: m["files"]["model.onnx"].update(bytes=2**62), "is not a whole number"),
    (lambda m: m["files"]["model.onnx"].update(bytes=2**50), "is not what the manifest says"),
    (lambda m: m["files"]["model.onnx"].update(sha256=1), "is not a text"),
]


@pytest.mark.parametrize("number", range(len(MANIFESTS)))
def test_manifests(own_bundle: Path, opened: Opener, number: int) -> None:
    change, message = MANIFESTS[number]
    edit_manifest(own_bundle, change)
    refused("bundle", message, opened)


def test_texts_that_are_no_manifest(own_bundle: Path, opened: Opener) -> None:
    path = own_bundle / "manifest.json"
    text = path.read_text()
    twice = text.replace('"max_tokens"', '"max_tokens": 1, "max_tokens"', 1)
    for content, message in (
        (twice.encode(), "the key 'max_tokens' occurs twice"),
        (("{" + '"a":{' * 100_000).encode(), "it is nested more than 16 deep"),
        (b"\xef\xbb\xbf" + text.encode(), "it is not a JSON object"),
        (text.encode() + b"\0{", "it is not a JSON object"),
        (text.replace("fp32", "\udcff").encode("utf-8", "surrogateescape"), "is malformed"),
        (b"[]", "it is not a JSON object"),
        (b"", "it is not a JSON object"),
        (text.encode() + b" " * (4 << 20), "but a manifest has at most"),
    ):
        path.write_bytes(content)
        refused("bundle", message, opened)
    path.unlink()
    os.mkfifo(path)
    refused("bundle", "no manifest.json that can be read (it is not a regular file)", opened)


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data"])
def test_files_that_are_pipes(own_bundle: Path, opened: Opener, name: str) -> None:
    (own_bundle / name).unlink()
    os.mkfifo(own_bundle / name)
    refused("bundle", f"'{name}' cannot be read: it is not a regular file", opened)


def test_the_good_bundle_opens(own_bundle: Path, opened: Opener) -> None:
    assert json.loads((own_bundle / "manifest.json").read_text())["state"][0] == STATE
    opened().close()
