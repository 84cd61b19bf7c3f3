"""The consistency of the op's definition, and the errors of its shape check."""

from __future__ import annotations

import pytest

from fwl_export.errors import ShapeError
from fwl_export.op.spec import ACTIVATION_TYPES, INPUTS, NODE_ATTRIBUTES, OUTPUTS, check_shapes

SHAPES = {
    "query": (2, 3, 8),
    "key": (2, 3, 8),
    "value": (2, 3, 5),
    "decay": (2, 3),
    "past_state": (2, 8, 5),
}


def test_names_are_unique() -> None:
    names = [a.name for a in (*INPUTS, *OUTPUTS)]
    assert len(names) == len(set(names)) == 7


def test_outputs_use_no_size_that_inputs_do_not_give() -> None:
    given = {symbol for a in INPUTS for symbol in a.shape}
    assert {symbol for a in OUTPUTS for symbol in a.shape} <= given


def test_types_are_t_or_float32() -> None:
    assert {a.dtype for a in (*INPUTS, *OUTPUTS)} == {"T", "float32"}
    assert ACTIVATION_TYPES == ("float32", "float16", "bfloat16")


def test_node_attributes_are_what_tensorrt_looks_a_plugin_up_by() -> None:
    assert NODE_ATTRIBUTES == {"plugin_namespace": "fwl", "plugin_version": "2"}


def test_check_shapes_returns_the_sizes() -> None:
    assert check_shapes(SHAPES) == {"B": 2, "T": 3, "Dk": 8, "Dv": 5}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"query": (3, 8)}, "'query' has shape [3, 8]; expected [B, T, Dk]"),
        ({"query": (2, 3, 1, 8)}, "'query' has shape [2, 3, 1, 8]; expected [B, T, Dk]"),
        ({"key": (2, 3, 9)}, "'key' has shape [2, 3, 9]; expected [2, 3, 8]"),
        ({"key": (1, 3, 8)}, "'key' has shape [1, 3, 8]; expected [2, 3, 8]"),
        ({"value": (2, 4, 5)}, "'value' has shape [2, 4, 5]; expected [2, 3, Dv]"),
        ({"decay": (2, 3, 1)}, "'decay' has shape [2, 3, 1]; expected [2, 3]"),
        ({"decay": ()}, "'decay' has shape []; expected [2, 3]"),
        ({"past_state": (2, 5, 8)}, "'past_state' has shape [2, 5, 8]; expected [2, 8, 5]"),
        ({"past_state": (1, 8, 5)}, "'past_state' has shape [1, 8, 5]; expected [2, 8, 5]"),
    ],
)
def test_check_shapes_names_the_input_that_does_not_fit(
    changed: dict[str, tuple[int, ...]], message: str
) -> None:
    with pytest.raises(ShapeError) as error:
        check_shapes({**SHAPES, **changed})
    assert str(error.value) == f"fwl::LinearAttentionUpdate: {message}"


@pytest.mark.parametrize(
    ("batch", "length", "message"),
    [
        (2, 0, "T (tokens) is 0; expected 1 or more"),
        (0, 3, "B (rows) is 0; expected 1 or more"),
    ],
)
def test_check_shapes_refuses_sizes_of_zero(batch: int, length: int, message: str) -> None:
    shapes = {
        "query": (batch, length, 8),
        "key": (batch, length, 8),
        "value": (batch, length, 5),
        "decay": (batch, length),
        "past_state": (batch, 8, 5),
    }
    with pytest.raises(ShapeError) as error:
        check_shapes(shapes)
    assert str(error.value) == f"fwl::LinearAttentionUpdate: {message}"
