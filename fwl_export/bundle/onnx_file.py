"""Reads a few properties of ONNX files without the package onnx, which sessions do not need.

An ONNX file is a protobuf message; this module decodes only the fields that it wants.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from fwl_export.errors import BundleError

# Field numbers of onnx.proto.
_MODEL_GRAPH, _MODEL_FUNCTIONS = 7, 25
_FUNCTION_NODE = 7
_GRAPH_NODE, _GRAPH_INITIALIZER = 1, 5
_NODE_INPUT, _NODE_OP_TYPE, _NODE_ATTRIBUTE, _NODE_DOMAIN = 1, 4, 5, 7
_ATTRIBUTE_TENSOR = 5
_TENSOR_EXTERNAL_DATA = 13
_ENTRY_KEY, _ENTRY_VALUE = 1, 2

# Protobuf's wire types, and the sizes in bytes of those with a fixed size.
_VARINT, _BYTES = 0, 2
_FIXED_SIZES = {1: 8, 5: 4}


def external_data_locations(path: Path) -> set[str]:
    """Return the files that an ONNX file's tensors keep their data in, relative to its folder.

    Args:
      path: Path of the ONNX file.

    Raises:
      BundleError: The file is not an ONNX model.
    """
    try:
        model = path.read_bytes()
        graphs = list(_fields(model, _MODEL_GRAPH))
        nodes = [node for graph in graphs for node in _fields(graph, _GRAPH_NODE)]
        for function in _fields(model, _MODEL_FUNCTIONS):
            nodes += _fields(function, _FUNCTION_NODE)
        tensors = [t for graph in graphs for t in _fields(graph, _GRAPH_INITIALIZER)]
        for node in nodes:
            for attribute in _fields(node, _NODE_ATTRIBUTE):
                tensors += _fields(attribute, _ATTRIBUTE_TENSOR)
        entries = [entry for tensor in tensors for entry in _fields(tensor, _TENSOR_EXTERNAL_DATA)]
        return {
            _text(entry, _ENTRY_VALUE)
            for entry in entries
            if _text(entry, _ENTRY_KEY) == "location"
        }
    except (IndexError, ValueError) as error:
        raise BundleError(
            f"'{path}' is not an ONNX file ({error}); export the model again"
        ) from None


def count_ops(path: Path) -> dict[str, int]:
    """Return how often each operator occurs in the graph, the most frequent first.

    Operators outside ONNX's standard come before all others, as "domain::name".

    Args:
      path: Path of the ONNX file.

    Raises:
      BundleError: The file is not an ONNX model.
    """
    counts: Counter[str] = Counter()
    try:
        for graph in _fields(path.read_bytes(), _MODEL_GRAPH):
            for node in _fields(graph, _GRAPH_NODE):
                domain, name = _text(node, _NODE_DOMAIN), _text(node, _NODE_OP_TYPE)
                counts[f"{domain}::{name}" if domain else name] += 1
    except (IndexError, ValueError) as error:
        raise BundleError(
            f"'{path}' is not an ONNX file ({error}); export the model again"
        ) from None
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
    try:
        graphs = _fields(path.read_bytes(), _MODEL_GRAPH)
        nodes = [node for graph in graphs for node in _fields(graph, _GRAPH_NODE)]
        return [
            [each.decode() for each in _fields(node, _NODE_INPUT)]
            for node in nodes
            if (_text(node, _NODE_DOMAIN), _text(node, _NODE_OP_TYPE)) == (domain, name)
        ]
    except (IndexError, ValueError) as error:
        raise BundleError(
            f"'{path}' is not an ONNX file ({error}); export the model again"
        ) from None


def _text(message: bytes, field: int) -> str:
    return b"".join(_fields(message, field)).decode()


def _fields(message: bytes, number: int) -> Iterator[bytes]:
    """Yield the content of those fields of a message that have this number and hold bytes.

    Raises:
      IndexError, ValueError: The bytes are not a protobuf message.
    """
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        size, kind = 0, tag & 7
        if kind == _VARINT:
            _, at = _varint(message, at)
        elif kind == _BYTES:
            size, at = _varint(message, at)
        elif kind in _FIXED_SIZES:
            size = _FIXED_SIZES[kind]
        else:
            raise ValueError(f"wire type {kind} at byte {at}")
        if at + size > len(message):
            raise ValueError(f"it ends inside a field at byte {at}")
        if kind == _BYTES and tag >> 3 == number:
            yield message[at : at + size]
        at += size


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value, shift = 0, 0
    while True:
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
