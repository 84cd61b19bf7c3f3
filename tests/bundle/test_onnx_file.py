"""ONNX files: every tensor counts, and no file takes long."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from onnx import ModelProto, TensorProto, helper

from fwl_export.bundle.onnx_file import (
    ValueInfo,
    count_ops,
    external_data_locations,
    graph_values,
    op_inputs,
)
from fwl_export.errors import BundleError
from tests.fuzz.mutators import varint


def external(location: str) -> TensorProto:
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[1])
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    return tensor


def graph(*tensors: TensorProto) -> onnx.GraphProto:
    return helper.make_graph([], "inner", [], [], tensors)


def node(attribute: str, value: object) -> onnx.NodeProto:
    made = helper.make_node("Any", ["x"], ["y"])
    made.attribute.append(helper.make_attribute(attribute, value))
    return made


def sparse(tensor: TensorProto) -> onnx.SparseTensorProto:
    return onnx.SparseTensorProto(values=tensor)


PLACES: dict[str, Callable[[ModelProto, TensorProto], object]] = {
    "initializer": lambda m, t: m.graph.initializer.append(t),
    "sparse initializer": lambda m, t: m.graph.sparse_initializer.append(sparse(t)),
    "sparse indices": lambda m, t: m.graph.sparse_initializer.add(indices=t),
    "attribute": lambda m, t: m.graph.node.append(node("a", t)),
    "list of tensors": lambda m, t: m.graph.node.append(node("a", [t])),
    "sparse attribute": lambda m, t: m.graph.node.append(node("a", sparse(t))),
    "subgraph": lambda m, t: m.graph.node.append(node("a", graph(t))),
    "list of subgraphs": lambda m, t: m.graph.node.append(node("a", [graph(), graph(t)])),
    "subgraph of a subgraph": lambda m, t: m.graph.node.append(
        node("a", helper.make_graph([node("b", graph(t))], "outer", [], []))
    ),
    "function": lambda m, t: m.functions.add(node=[node("a", t)]),
    "default of a function": lambda m, t: m.functions.add(
        attribute_proto=[helper.make_attribute("a", t)]
    ),
    "training": lambda m, t: m.training_info.add(algorithm=graph(t)),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_tensor_is_found_wherever_it_is(place: str, tmp_path: Path) -> None:
    model = ModelProto()
    model.graph.name = "main"
    PLACES[place](model, external("weights.bin"))
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    assert external_data_locations(path) == {"weights.bin"}


@pytest.mark.parametrize(
    ("location", "message"),
    [("*/_ORT_MEM_ADDR_/*", "has its data at '*/_ORT_MEM_ADDR_/*', which is not a file")],
)
def test_a_location_that_is_not_a_file(location: str, message: str, tmp_path: Path) -> None:
    model = ModelProto()
    model.graph.initializer.append(external(location))
    refused(tmp_path, model.SerializeToString(), message)


def test_two_locations_of_a_tensor(tmp_path: Path) -> None:
    model, tensor = ModelProto(), external("a.bin")
    tensor.external_data.add(key="location", value="b.bin")
    model.graph.initializer.append(tensor)
    refused(tmp_path, model.SerializeToString(), "has its data in more than one file")


def test_of_a_key_that_is_written_twice_the_last_one_counts(tmp_path: Path) -> None:
    entry = field(1, b"x") + field(1, b"location") + field(2, b"weights.bin")
    path = tmp_path / "model.onnx"
    path.write_bytes(field(7, field(5, field(13, entry))))
    (tensor,) = onnx.load_model_from_string(path.read_bytes()).graph.initializer
    assert tensor.external_data[0].key == "location"
    assert external_data_locations(path) == {"weights.bin"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff" * 4_000_000, "a number has no end"),
        (b"\x3a\xff\xff\xff\xff\x7f", "it ends inside a field"),
        (b"\x3a\x05\x08", "it ends inside a field"),
        (b"\x3b", "wire type 3"),
        (b"\x08", "index out of"),
        (b"\xba\x80\x80\x80\x10\x00", "field number 536870919"),
        (b"\x08\x01" * 5_000_000, "it has more than 4000000 fields"),
    ],
)
def test_a_file_that_is_no_message(content: bytes, message: str, tmp_path: Path) -> None:
    refused(tmp_path, content, message)


def test_nesting_has_an_end(tmp_path: Path) -> None:
    content = b""
    for _ in range(200):
        for number in (6, 5, 1):  # graph in an attribute of a node of a graph
            content = field(number, content)
    refused(tmp_path, field(7, content), "nested more than 100 levels deep")


def field(number: int, content: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(content)) + content


def test_inputs_outputs_and_operators(tiny_bundle: Path) -> None:
    path = tiny_bundle / "model.onnx"
    values = graph_values(path)
    assert values["input_ids"] == ValueInfo("int64", (0, 0))
    assert values["past.fast.up.kernel"] == ValueInfo("float32", (0, 16, 32))
    assert values["logits"] == ValueInfo("float32", (0, 0, 64))
    model = onnx.load(str(path), load_external_data=False)
    assert count_ops(path)["MatMul"] == sum(n.op_type == "MatMul" for n in model.graph.node)
    assert len(op_inputs(path, "fwl", "LinearAttentionUpdate")) == 2


def refused(folder: Path, content: bytes, message: str) -> None:
    path = folder / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(BundleError) as caught:
        external_data_locations(path)
    assert message in str(caught.value)
    assert "export the model again" in str(caught.value)
