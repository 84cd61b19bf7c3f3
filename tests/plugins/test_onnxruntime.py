"""libfwl_ort in ONNX Runtime: results in all cases, in place, with threads, and errors."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest

from fwl_export.op.cases import BEYOND_HALF, CASES, Case
from fwl_export.op.spec import DOMAIN, INPUTS, NAME, NODE_ATTRIBUTES, OUTPUTS
from tests.op.helpers import ONNX_TYPES, assert_matches_reference, one_node_model, rounded_inputs

ort = pytest.importorskip("onnxruntime")

OPSET = 20
TYPES = ("float32", "float16")

Array = npt.NDArray[Any]

# Sizes around those of the tiles and chunks of every instruction set.
ODD_CASES = (
    Case("two_tokens", (2, 2, 40, 24), "mixed"),
    Case("chunk_less_one", (1, 63, 19, 45), "mixed"),
    Case("chunk", (1, 64, 18, 48), "constant"),
    Case("chunk_and_one", (2, 65, 17, 47), "mixed"),
    Case("long_chunk_and_one", (1, 129, 523, 17), "constant"),
    Case("one_column", (1, 40, 33, 1), "reset"),
    Case("one_row", (5, 40, 1, 33), "constant"),
    Case("one_token_many_blocks", (1, 1, 301, 1030), "constant"),
)


@pytest.mark.parametrize("activation_type", TYPES)
@pytest.mark.parametrize("case", [*CASES, *ODD_CASES], ids=lambda case: case.name)
def test_matches_reference(ort_library: Path, case: Case, activation_type: str) -> None:
    inputs = rounded_inputs(case, activation_type)
    output, state = _session(ort_library, activation_type).run(None, inputs)
    assert output.dtype == np.float32
    assert state.dtype == np.float32
    _assert_matches(case, activation_type, inputs, output, state)


@pytest.mark.parametrize("activation_type", TYPES)
def test_sums_beyond_half_precision(ort_library: Path, activation_type: str) -> None:
    inputs = rounded_inputs(BEYOND_HALF, activation_type)
    output, state = _session(ort_library, activation_type).run(None, inputs)
    assert_matches_reference(activation_type, inputs, output, state, "beyond_half")


@pytest.mark.parametrize("activation_type", TYPES)
@pytest.mark.parametrize("case", [*CASES, *ODD_CASES], ids=lambda case: case.name)
def test_one_buffer_or_two(ort_library: Path, case: Case, activation_type: str) -> None:
    inputs = rounded_inputs(case, activation_type)
    session = _session(ort_library, activation_type)
    output, state = _run_bound(session, inputs, in_place=False)
    _assert_matches(case, activation_type, inputs, output, state)
    for same, wanted in zip(
        _run_bound(session, inputs, in_place=True), (output, state), strict=True
    ):
        np.testing.assert_array_equal(same, wanted)


@pytest.mark.parametrize("activation_type", TYPES)
@pytest.mark.parametrize("sizes", [(1, 1, 300, 512), (3, 1, 64, 300), (2, 300, 96, 192)])
def test_threads_change_no_bit(
    ort_library: Path, sizes: tuple[int, int, int, int], activation_type: str
) -> None:
    inputs = rounded_inputs(Case("threads", sizes, "mixed"), activation_type)
    one, *more = (
        _session(ort_library, activation_type, threads).run(None, inputs) for threads in (1, 2, 4)
    )
    for results in more:
        for same, wanted in zip(results, one, strict=True):
            np.testing.assert_array_equal(same, wanted)


@pytest.mark.slow
@pytest.mark.parametrize("activation_type", TYPES)
def test_ten_thousand_tokens(ort_library: Path, activation_type: str) -> None:
    case = Case("ten_thousand", (1, 10_000, 24, 40), "constant", silent=0.1)
    inputs = rounded_inputs(case, activation_type)
    session = _session(ort_library, activation_type)
    output, state = session.run(None, inputs)
    _assert_matches(case, activation_type, inputs, output, state)
    split = dict(inputs)
    for start in range(0, 10_000, 999):
        for name in ("query", "key", "value", "decay"):
            split[name] = inputs[name][:, start : start + 999]
        output[:, start : start + 999], split["past_state"] = session.run(None, split)
    _assert_matches(case, activation_type, inputs, output, split["past_state"])


def test_our_kernel_runs_and_not_the_body(ort_library: Path) -> None:
    # The function body of this model is wrong, so only the kernel gives the right result.
    model = one_node_model("float32", OPSET)
    for node in model.functions[0].node:
        if "present_state" in node.output:
            node.op_type = "Sub"
    inputs = rounded_inputs(CASES[0], "float32")
    output, state = open_node(ort_library, model).run(None, inputs)
    assert_matches_reference("float32", inputs, output, state)
    _, wrong = open_node(None, model).run(None, inputs)
    assert not np.allclose(wrong, state)


def test_a_node_without_attributes_or_body_runs(ort_library: Path) -> None:
    model = one_node_model("float32", OPSET)
    del model.functions[:]
    del model.graph.node[0].attribute[:]
    inputs = rounded_inputs(CASES[0], "float32")
    output, state = open_node(ort_library, model).run(None, inputs)
    assert_matches_reference("float32", inputs, output, state)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query": (2, 5)}, r"'query' has shape \[2, 5\]; expected \[B, T, Dk\]"),
        ({"key": (2, 5, 9)}, r"'key' has shape \[2, 5, 9\]; expected \[2, 5, 8\]"),
        ({"value": (2, 4, 3)}, r"'value' has shape \[2, 4, 3\]; expected \[2, 5, Dv\]"),
        ({"decay": (2, 5, 1)}, r"'decay' has shape \[2, 5, 1\]; expected \[2, 5\]"),
        ({"past_state": (2, 3, 8)}, r"'past_state' has shape \[2, 3, 8\]; expected \[2, 8, 3\]"),
        (
            {"query": (2, 0, 8), "key": (2, 0, 8), "value": (2, 0, 3), "decay": (2, 0)},
            r"T \(tokens\) is 0; expected 1 or more",
        ),
        (
            {"value": (2, 5, 0), "past_state": (2, 8, 0)},
            r"Dv \(value size\) is 0; expected 1 or more",
        ),
    ],
)
def test_bad_shapes(ort_library: Path, changes: dict[str, tuple[int, ...]], message: str) -> None:
    session = open_node(ort_library, one_node_model("float32", OPSET), shapeless=True)
    shapes = {
        "query": (2, 5, 8),
        "key": (2, 5, 8),
        "value": (2, 5, 3),
        "decay": (2, 5),
        "past_state": (2, 8, 3),
    }
    good = {name: np.ones(shape, np.float32) for name, shape in shapes.items()}
    bad = {name: np.ones(changes.get(name, shape), np.float32) for name, shape in shapes.items()}
    with pytest.raises(Exception, match=f"fwl::LinearAttentionUpdate: {message}"):
        session.run(None, bad)
    session.run(None, good)


@pytest.mark.parametrize("name", [*(a.name for a in INPUTS if a.name != "past_state")])
def test_output_that_overlaps_with_an_input(ort_library: Path, name: str) -> None:
    arrays = {
        a.name: np.ones((2, 4) if len(a.shape) == 2 else (2, 4, 4), np.float32) for a in INPUTS
    }
    session = _session(ort_library, "float32")
    values = {key: ort.OrtValue.ortvalue_from_numpy(array) for key, array in arrays.items()}
    binding = session.io_binding()
    for key, value in values.items():
        binding.bind_ortvalue_input(key, value)
    binding.bind_output("output", "cpu", 0, np.float32, (2, 4, 4), values[name].data_ptr())
    binding.bind_output("present_state")
    with pytest.raises(Exception, match=f"output 'output' overlaps with input '{name}'"):
        session.run_with_iobinding(binding)


def test_states_that_overlap_in_part(ort_library: Path) -> None:
    case = Case("overlap", (2, 4, 8, 8))
    inputs = rounded_inputs(case, "float32")
    memory = np.zeros(2 * 8 * 8 + 64, np.float32)
    session = _session(ort_library, "float32")
    binding = session.io_binding()
    for name, array in inputs.items():
        if name != "past_state":
            binding.bind_cpu_input(name, array)
    address = memory.ctypes.data
    binding.bind_input("past_state", "cpu", 0, np.float32, (2, 8, 8), address)
    binding.bind_output("present_state", "cpu", 0, np.float32, (2, 8, 8), address + 64)
    binding.bind_output("output")
    with pytest.raises(Exception, match="'present_state' overlaps with input 'past_state'"):
        session.run_with_iobinding(binding)


@pytest.mark.parametrize("attribute", NODE_ATTRIBUTES)
def test_another_version_of_the_op(ort_library: Path, attribute: str) -> None:
    model = one_node_model("float32", OPSET)
    for found in model.graph.node[0].attribute:
        if found.name == attribute:
            found.s = b"99"
    with pytest.raises(Exception, match=f"attribute '{attribute}' is '99'; this library has"):
        open_node(ort_library, model)


def _of_version_1(activation_type: str, with_body: bool) -> onnx.ModelProto:
    """Return a model as the release before wrote it: its output has the activations' type."""
    model = one_node_model(activation_type, OPSET)
    kind = ONNX_TYPES[activation_type]
    model.graph.output[0].type.tensor_type.elem_type = kind
    for opset in model.opset_import:
        if opset.domain == DOMAIN:
            opset.version = 1
    for found in model.graph.node[0].attribute:
        if found.name == "plugin_version":
            found.s = b"1"
    last = next(n for n in model.functions[0].node if "output" in n.output)
    last.output[0] = "wide_output"
    model.functions[0].node.append(
        onnx.helper.make_node("Cast", ["wide_output"], ["output"], to=kind)
    )
    if not with_body:
        del model.functions[:]
    return model


@pytest.mark.parametrize("with_body", [False, True])
def test_version_1_of_the_op(ort_library: Path, with_body: bool) -> None:
    inputs = rounded_inputs(CASES[0], "float32")
    session = open_node(ort_library, _of_version_1("float32", with_body))
    assert_matches_reference("float32", inputs, *session.run(None, inputs))
    with pytest.raises(Exception, match=r"float16.*does not match expected type"):
        open_node(ort_library, _of_version_1("float16", with_body))


@pytest.mark.parametrize("name", ["key", "decay", "past_state"])
def test_wrong_type(ort_library: Path, name: str) -> None:
    model = one_node_model("float32", OPSET)
    for value in model.graph.input:
        if value.name == name:
            value.type.tensor_type.elem_type = onnx.TensorProto.DOUBLE
    with pytest.raises(Exception, match=f"(?s){NAME}|{DOMAIN}"):
        open_node(ort_library, model)


def test_onnx_runtime_that_is_too_old_gets_an_error(ort_library: Path) -> None:
    library = ctypes.CDLL(str(ort_library))
    told: list[tuple[int, bytes]] = []
    create_status_type = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p)
    get_api_type = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_uint32)
    get_version_type = ctypes.CFUNCTYPE(ctypes.c_void_p)

    @create_status_type
    def create_status(code: int, message: bytes) -> int:
        told.append((code, message))
        return 1234

    # CreateStatus is the first function of the interface in every version.
    api = (ctypes.c_void_p * 64)(ctypes.cast(create_status, ctypes.c_void_p).value)

    @get_api_type
    def get_api(version: int) -> int | None:
        return ctypes.addressof(api) if version <= 16 else None

    version = ctypes.create_string_buffer(b"1.16.3")

    @get_version_type
    def get_version() -> int:
        return ctypes.addressof(version)

    base = (ctypes.c_void_p * 2)(
        ctypes.cast(get_api, ctypes.c_void_p).value, ctypes.cast(get_version, ctypes.c_void_p).value
    )
    library.RegisterCustomOps.restype = ctypes.c_void_p
    library.RegisterCustomOps.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    assert library.RegisterCustomOps(None, ctypes.addressof(base)) == 1234
    ((code, message),) = told
    assert code != 0
    assert b"needs ONNX Runtime 1.17 or newer; this is 1.16.3" in message


def open_node(
    library: Path | None, model: onnx.ModelProto, threads: int = 2, shapeless: bool = False
) -> Any:
    """Open a one-node model. With `shapeless`, ONNX Runtime passes any shape to the kernel."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    if library is not None:
        options.register_custom_ops_library(str(library))
    if shapeless:
        for value in (*model.graph.input, *model.graph.output):
            value.type.tensor_type.ClearField("shape")
    return ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def _session(library: Path | None, activation_type: str, threads: int = 2) -> Any:
    return open_node(library, one_node_model(activation_type, OPSET), threads)


def _run_bound(session: Any, inputs: dict[str, Array], in_place: bool) -> list[Array]:
    """Run with outputs in buffers full of NaN, or in the buffer of past_state if `in_place`."""
    batch, length, _ = inputs["query"].shape
    output = np.full((batch, length, inputs["value"].shape[2]), np.nan, np.float32)
    state = inputs["past_state"].copy() if in_place else np.full_like(inputs["past_state"], np.nan)
    binding = session.io_binding()
    for name, array in inputs.items():
        bound = state if in_place and name == "past_state" else array
        binding.bind_input(name, "cpu", 0, bound.dtype, bound.shape, bound.ctypes.data)
    for argument, array in zip(OUTPUTS, (output, state), strict=True):
        binding.bind_output(argument.name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
    session.run_with_iobinding(binding)
    return [output, state]


def _assert_matches(
    case: Case, activation_type: str, inputs: dict[str, Array], output: Array, state: Array
) -> None:
    rows = "op" if case in CASES else "kernel"
    assert_matches_reference(activation_type, inputs, output, state, rows)
