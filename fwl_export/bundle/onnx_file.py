"""Reads a few properties of ONNX files without the package onnx, which sessions do not need.

An ONNX file is a protobuf message; this module decodes only the fields that it wants. The file may
come from anybody: numbers, sizes, nesting and the number of fields are bounded.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from fwl_export.errors import BundleError
from fwl_export.json_files import read_bounded, shown

# The messages of onnx.proto in which tensors can be: the kind of message in each field, by its
# number. Branches of `If` and bodies of `Loop` and `Scan` are graphs in attributes.
_MESSAGES = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
}
# Other field numbers of onnx.proto.
_MODEL_GRAPH = 7
_GRAPH_NODE, _GRAPH_INITIALIZER, _GRAPH_INPUT, _GRAPH_OUTPUT = 1, 5, 11, 12
_NODE_INPUT, _NODE_OP_TYPE, _NODE_DOMAIN = 1, 4, 7
_VALUE_NAME, _VALUE_TYPE, _TYPE_TENSOR = 1, 2, 1
_TENSOR_TYPE_ELEMENT, _TENSOR_TYPE_SHAPE, _SHAPE_AXIS, _AXIS_SIZE = 1, 2, 1, 1
_TENSOR_SIZES, _TENSOR_TYPE, _TENSOR_NAME, _TENSOR_EXTERNAL_DATA = 1, 2, 8, 13
_ENTRY_KEY, _ENTRY_VALUE = 1, 2

# NumPy's names of the types of elements: of our inputs and outputs, and of stored tensors.
_DTYPES = {1: "float32", 7: "int64", 10: "float16", 11: "float64"}
_STORED_DTYPES = _DTYPES | {
    2: "uint8",
    3: "int8",
    4: "uint16",
    5: "int16",
    6: "int32",
    9: "bool",
    12: "uint32",
    13: "uint64",
}

# Protobuf's wire types, and the sizes in bytes of those with a fixed size.
_VARINT, _BYTES = 0, 2
_FIXED_SIZES = {1: 8, 5: 4}

_LARGEST_FILE = 2 << 30  # protobuf's own limit, in bytes
_LONGEST_VARINT = 10  # bytes of 64 bits
_DEEPEST = 100  # protobuf's own limit of nesting
# Seconds of work; models of a hundred layers have a tenth of it.
_MOST_FIELDS = 4_000_000


class ValueInfo(NamedTuple):
    """Type and shape of an input or output of the graph.

    Attributes:
      dtype: NumPy's name of the type, or "" for a type that no input of ours has.
      shape: Sizes of the axes; 0 where the size is dynamic.
    """

    dtype: str
    shape: tuple[int, ...]


class ExternalTensor(NamedTuple):
    """A tensor of the graph whose data are in another file.

    Attributes:
      name: Name of the tensor.
      dtype: NumPy's name of the type, or "" for a type that NumPy does not have.
      shape: Sizes of the axes.
      location: Name of the file, relative to the ONNX file's folder.
      offset: First byte of the data in the file.
      size: Number of bytes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    location: str
    offset: int
    size: int


def external_data_locations(path: Path, content: bytes | None = None) -> set[str]:
    """Return the files that an ONNX file's tensors keep their data in, relative to its folder.

    All tensors count: those of the graph, of graphs inside nodes, and of functions.

    Args:
      path: Path of the ONNX file.
      content: Content of the file, if it was read already.

    Raises:
      BundleError: The file is not an ONNX model, or a tensor does not name one file.
    """
    with _opened(path, content) as model:
        found = set()
        for tensor in model.tensors("model", model.whole, 0):
            entries = list(model.parts(tensor, _TENSOR_EXTERNAL_DATA))
            keys = [model.text(entry, _ENTRY_KEY) for entry in entries]
            if keys.count("location") > 1:
                raise ValueError("a tensor has its data in more than one file")
            found |= {
                model.text(entry, _ENTRY_VALUE)
                for entry, key in zip(entries, keys, strict=True)
                if key == "location"
            }
        # ONNX Runtime takes the address of memory from a location of this kind.
        if addresses := sorted(location for location in found if "*" in location):
            raise ValueError(f"a tensor has its data at {shown(addresses[0])}, which is not a file")
        return found


def external_tensors(path: Path, content: bytes) -> list[ExternalTensor]:
    """Return the weights whose data are in other files.

    ONNX Runtime can take these from memory. Those of graphs inside nodes and of functions it would
    still look for on disk, in the current folder: they may have no external data.

    Args:
      path: Path of the ONNX file.
      content: Content of the file.

    Raises:
      BundleError: A tensor other than the graph's own weights has its data in another file, or the
        file is not an ONNX model.
    """
    with _opened(path, content) as model:
        found = [
            model.external_tensor(tensor)
            for graph in model.parts(model.whole, _MODEL_GRAPH)
            for tensor in model.parts(graph, _GRAPH_INITIALIZER)
            if any(True for _ in model.parts(tensor, _TENSOR_EXTERNAL_DATA))
        ]
        everywhere = sum(
            any(True for _ in model.parts(tensor, _TENSOR_EXTERNAL_DATA))
            for tensor in model.tensors("model", model.whole, 0)
        )
    if everywhere != len(found):
        raise BundleError(
            f"'{path}' has {everywhere - len(found)} tensors inside nodes or functions whose data "
            "are in another file; expected external data of the graph's own weights only. Put "
            "these tensors into the ONNX file, or export the model again"
        )
    return found


def graph_values(path: Path, content: bytes | None = None) -> dict[str, ValueInfo]:
    """Return type and shape of the graph's inputs and outputs, by name.

    Args:
      path: Path of the ONNX file.
      content: Content of the file, if it was read already.

    Raises:
      BundleError: The file is not an ONNX model.
    """
    with _opened(path, content) as model:
        return {
            model.text(value, _VALUE_NAME): model.value_info(value)
            for graph in model.parts(model.whole, _MODEL_GRAPH)
            for number in (_GRAPH_INPUT, _GRAPH_OUTPUT)
            for value in model.parts(graph, number)
        }


def count_ops(path: Path) -> dict[str, int]:
    """Return how often each operator occurs in the graph, the most frequent first.

    Operators outside ONNX's standard come before all others, as "domain::name".

    Args:
      path: Path of the ONNX file.

    Raises:
      BundleError: The file is not an ONNX model.
    """
    with _opened(path) as model:
        counts = Counter(
            f"{domain}::{name}" if domain else name for domain, name, _ in model.nodes()
        )
    ranked = sorted(counts.items(), key=lambda item: ("::" not in item[0], -item[1], item[0]))
    return dict(ranked)


def op_inputs(path: Path, domain: str, name: str) -> list[list[str]]:
    """Return the names of the inputs of each node of one operator, in the graph's order.

    Args:
      path: Path of the ONNX file.
      domain: Domain of the operator; "" is ONNX's standard.
      name: Name of the operator.

    Raises:
      BundleError: The file is not an ONNX model.
    """
    with _opened(path) as model:
        return [
            [str(each, "utf-8") for each in model.parts(node, _NODE_INPUT)]
            for found_domain, found_name, node in model.nodes()
            if (found_domain, found_name) == (domain, name)
        ]


@contextmanager
def _opened(path: Path, content: bytes | None = None) -> Iterator[_Reader]:
    try:
        if content is None:
            content = read_bounded(path, BundleError, _LARGEST_FILE)
        yield _Reader(content)
    except (IndexError, ValueError) as error:
        raise BundleError(
            f"'{path}' is not an ONNX file that this fwl-export reads ({error}); export the model "
            "again"
        ) from None


class _Reader:
    """Reads protobuf messages, without copies of their content.

    Attributes:
      whole: The file's content: a message of the kind "model".
    """

    def __init__(self, content: bytes) -> None:
        self.whole = memoryview(content)
        self._fields_left = _MOST_FIELDS

    def tensors(self, kind: str, message: memoryview, depth: int) -> Iterator[memoryview]:
        """Yield all tensors inside a message of a kind, see `_MESSAGES`."""
        if kind == "tensor":
            yield message
        elif depth > _DEEPEST:
            raise ValueError(f"it is nested more than {_DEEPEST} levels deep")
        else:
            kinds = _MESSAGES[kind]
            for number, part in self.fields(message):
                if number in kinds and isinstance(part, memoryview):
                    yield from self.tensors(kinds[number], part, depth + 1)

    def external_tensor(self, tensor: memoryview) -> ExternalTensor:
        """Return name, type, shape and place of a tensor whose data are in another file."""
        shape: list[int] = []
        element = 0
        for number, value in self.fields(tensor):
            if number == _TENSOR_TYPE and isinstance(value, int):
                element = value
            elif number == _TENSOR_SIZES and isinstance(value, int):
                shape.append(value)
            elif number == _TENSOR_SIZES and isinstance(value, memoryview):  # several in one field
                at = 0
                while at < len(value):
                    size, at = _varint(value, at)
                    shape.append(size)
        entries = list(self.parts(tensor, _TENSOR_EXTERNAL_DATA))
        texts = {self.text(e, _ENTRY_KEY): self.text(e, _ENTRY_VALUE) for e in entries}
        name, dtype = self.text(tensor, _TENSOR_NAME), _STORED_DTYPES.get(element, "")
        size = math.prod(shape) * _bytes_of(dtype)
        if dtype and int(texts.get("length", size)) != size:
            raise ValueError(f"tensor {shown(name)} has {texts['length']} bytes, not {size}")
        offset = int(texts.get("offset", "0"))
        return ExternalTensor(name, dtype, tuple(shape), texts["location"], offset, size)

    def nodes(self) -> Iterator[tuple[str, str, memoryview]]:
        """Yield domain and name of the operator of each of the graph's nodes, and the node."""
        for graph in self.parts(self.whole, _MODEL_GRAPH):
            for node in self.parts(graph, _GRAPH_NODE):
                yield self.text(node, _NODE_DOMAIN), self.text(node, _NODE_OP_TYPE), node

    def value_info(self, value: memoryview) -> ValueInfo:
        """Return type and shape from a `ValueInfoProto`."""
        tensors = [
            tensor
            for kind in self.parts(value, _VALUE_TYPE)
            for tensor in self.parts(kind, _TYPE_TENSOR)
        ]
        elements = [v for t in tensors for n, v in self.fields(t) if n == _TENSOR_TYPE_ELEMENT]
        axes = [
            axis
            for tensor in tensors
            for shape in self.parts(tensor, _TENSOR_TYPE_SHAPE)
            for axis in self.parts(shape, _SHAPE_AXIS)
        ]
        sizes = [[v for n, v in self.fields(axis) if n == _AXIS_SIZE] for axis in axes]
        dtype = _DTYPES.get(elements[-1], "") if elements and isinstance(elements[-1], int) else ""
        return ValueInfo(dtype, tuple(s[-1] if s and isinstance(s[-1], int) else 0 for s in sizes))

    def parts(self, message: memoryview, number: int) -> Iterator[memoryview]:
        """Yield those fields of a message that have this number and hold bytes."""
        for found, part in self.fields(message):
            if found == number and isinstance(part, memoryview):
                yield part

    def text(self, message: memoryview, number: int) -> str:
        """Return a field that holds text; where there are several, protobuf takes the last."""
        found = memoryview(b"")
        for part in self.parts(message, number):
            found = part
        return str(found, "utf-8")

    def fields(self, message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
        """Yield number and value of each field: an integer, or bytes.

        Raises:
          IndexError, ValueError: The bytes are not a protobuf message, or the file has too many
            fields.
        """
        at, end = 0, len(message)
        while at < end:
            self._fields_left -= 1
            if self._fields_left < 0:
                raise ValueError(f"it has more than {_MOST_FIELDS} fields")
            tag, at = _varint(message, at)
            kind = tag & 7
            if tag >> 32:  # protobuf would drop these bits, and find another field
                raise ValueError(f"field number {tag >> 3} at byte {at}")
            value: int | memoryview
            if kind == _VARINT:
                value, at = _varint(message, at)
                yield tag >> 3, value
                continue
            if kind == _BYTES:
                size, at = _varint(message, at)
            elif kind in _FIXED_SIZES:
                size = _FIXED_SIZES[kind]
            else:
                raise ValueError(f"wire type {kind} at byte {at}")
            if at + size > end:
                raise ValueError(f"it ends inside a field at byte {at}")
            yield tag >> 3, message[at : at + size]
            at += size


def _bytes_of(dtype: str) -> int:
    """Return the size of an element; the name of a type ends with its bits, except for "bool"."""
    return int(dtype.lstrip("abfilnotu") or 8) // 8


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    """Return the number at a place, and the place after it."""
    value = message[at]
    if value < 0x80:  # nearly all are one byte long
        return value, at + 1
    value &= 0x7F
    for shift in range(7, 7 * _LONGEST_VARINT, 7):
        at += 1
        byte = message[at]
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at + 1
    raise ValueError(f"a number has no end at byte {at}")
