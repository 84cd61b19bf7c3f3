"""Random shapes and attributes: the library accepts what the spec accepts, with the same errors.

For a longer search, run pytest tests/plugins/test_fuzz.py --hypothesis-profile=explore, with the
number of examples in FWL_FUZZ_EXAMPLES.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fwl_export.errors import ShapeError
from fwl_export.op.spec import INPUTS, NODE_ATTRIBUTES, check_shapes
from tests.op.helpers import one_node_model
from tests.plugins.test_onnxruntime import open_node
from tests.tolerances import assert_close

pytest.importorskip("onnxruntime")

_EXAMPLES = int(os.environ.get("FWL_FUZZ_EXAMPLES", "150"))

Shapes = dict[str, tuple[int, ...]]


@st.composite
def _shapes(draw: st.DrawFn) -> Shapes:
    """Draw shapes that fit each other, except that sometimes one of them does not."""
    sizes = {axis: draw(st.integers(0 if axis in "BT" else 1, 9)) for axis in ("B", "T")}
    sizes |= {axis: draw(st.integers(1, 40)) for axis in ("Dk", "Dv")}
    shapes = {a.name: tuple(sizes[axis] for axis in a.shape) for a in INPUTS}
    if draw(st.booleans()):
        name = draw(st.sampled_from(sorted(shapes)))
        shapes[name] = tuple(draw(st.lists(st.integers(0, 9), max_size=5)))
    return shapes


def _checked(shapes: Shapes) -> tuple[dict[str, int], str]:
    """Return the sizes, or the spec's error message for the shapes."""
    try:
        return check_shapes(shapes), ""
    except ShapeError as error:
        return {}, str(error)


@pytest.fixture(scope="module")
def session(ort_library: Path) -> Any:
    return open_node(ort_library, one_node_model("float32", 20), shapeless=True)


@settings(max_examples=_EXAMPLES, deadline=None)
@given(shapes=_shapes())
@example(shapes={"query": (), "key": (), "value": (), "decay": (), "past_state": ()})
@example(
    shapes={
        "query": (1, 1, 1),
        "key": (1, 1, 1),
        "value": (1, 1, 1),
        "decay": (1, 1),
        "past_state": (0, 1, 1),
    }
)
def test_shapes(session: Any, shapes: Shapes) -> None:
    inputs = {name: np.ones(shape, np.float32) for name, shape in shapes.items()}
    sizes, problem = _checked(shapes)
    if problem:
        with pytest.raises(Exception, match=re.escape(problem)):
            session.run(None, inputs)
        return
    if min(sizes.values()) < 1:
        with pytest.raises(Exception, match="is 0; expected 1 or more"):
            session.run(None, inputs)
        return
    output, state = session.run(None, inputs)
    # All inputs are 1, so after i tokens each element of the state is 1 + i.
    expected = np.broadcast_to(
        sizes["Dk"] * (2 + np.arange(sizes["T"], dtype=np.float32))[None, :, None], output.shape
    )
    assert_close("kernel.output.float32", output, expected)
    assert_close("kernel.state.float32", state, np.full(shapes["past_state"], 1 + sizes["T"]))


@settings(max_examples=max(_EXAMPLES // 5, 20), deadline=None)
@given(
    name=st.sampled_from(sorted(NODE_ATTRIBUTES)),
    value=st.one_of(st.binary(max_size=40), st.integers(), st.floats(width=32)),
)
def test_attributes(ort_library: Path, name: str, value: bytes | int | float) -> None:
    from onnx import helper

    model = one_node_model("float32", 20)
    attributes = model.graph.node[0].attribute
    kept = [a for a in attributes if a.name != name]
    del attributes[:]
    attributes.extend(kept)
    if isinstance(value, int):
        value = max(-(2**63), min(2**63 - 1, value))
    attributes.append(helper.make_attribute(name, value))
    if value == NODE_ATTRIBUTES[name].encode():
        open_node(ort_library, model)
        return
    with pytest.raises(Exception, match=f"attribute '{name}' is"):
        open_node(ort_library, model)
