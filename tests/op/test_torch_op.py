"""The PyTorch op: against the reference in every dtype, under torch.export, and its errors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fwl_export.errors import ShapeError
from fwl_export.op.cases import BEYOND_HALF, CASES, Case
from fwl_export.op.spec import INPUTS
from fwl_export.op.torch_op import decay_products, linear_attention_update
from tests.op.helpers import Array, assert_matches_reference, rounded_inputs
from tests.tolerances import assert_close

TYPES = ("float64", "float32", "float16", "bfloat16")
_CASES = {case.name: case for case in CASES}


@pytest.mark.parametrize("activation_type", TYPES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_matches_reference(case: Case, activation_type: str) -> None:
    inputs = rounded_inputs(case, activation_type)
    output, state = linear_attention_update(*_tensors(inputs, activation_type))
    assert output.dtype == state.dtype
    assert state.dtype == (torch.float64 if activation_type == "float64" else torch.float32)
    assert_matches_reference(activation_type, inputs, output.double(), state)


@pytest.mark.parametrize("activation_type", TYPES[1:])
def test_sums_beyond_half_precision(activation_type: str) -> None:
    inputs = rounded_inputs(BEYOND_HALF, activation_type)
    output, state = linear_attention_update(*_tensors(inputs, activation_type))
    assert output.abs().max() > 2 * torch.finfo(torch.float16).max
    assert_matches_reference(activation_type, inputs, output, state, "beyond_half")


@pytest.mark.gpu
@pytest.mark.parametrize("activation_type", TYPES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_matches_reference_on_a_gpu(case: Case, activation_type: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip(f"torch {torch.__version__} is a build without CUDA")
    inputs = rounded_inputs(case, activation_type)
    tensors = [tensor.cuda() for tensor in _tensors(inputs, activation_type)]
    output, state = linear_attention_update(*tensors)
    assert output.is_cuda
    assert state.is_cuda
    assert_matches_reference(activation_type, inputs, output.double().cpu(), state.cpu())


def test_small_updates_survive_half_precision() -> None:
    # 4000 writes of 1e-3 into a state of 4. Rounding the state, or any sum, to bfloat16 would lose
    # each of them, since neighbouring bfloat16 numbers near 4 differ by 2^-6 or more.
    steps, size = 4000, 1e-3
    tensors = [
        torch.ones(1, steps, 1, dtype=torch.bfloat16),
        torch.ones(1, steps, 1, dtype=torch.bfloat16),
        torch.full((1, steps, 1), size, dtype=torch.bfloat16),
        torch.ones(1, steps),
        torch.full((1, 1, 1), 4.0),
    ]
    output, state = linear_attention_update(*tensors)
    expected = 4 + steps * tensors[2][0, 0, 0].item()
    assert state.item() == pytest.approx(expected, rel=1e-6)
    assert output[0, -1, 0].item() == pytest.approx(expected, rel=1e-6)


@given(length=st.integers(2, 300), data=st.data())
def test_any_split_into_calls_gives_the_same_output_and_state(
    length: int, data: st.DataObject
) -> None:
    cut = data.draw(st.integers(1, length - 1))
    inputs = rounded_inputs(Case("split", (2, length, 5, 3), "mixed"), "float64")
    q, k, v, decay, past = _tensors(inputs, "float64")
    first, middle = linear_attention_update(
        q[:, :cut], k[:, :cut], v[:, :cut], decay[:, :cut], past
    )
    second, end = linear_attention_update(
        q[:, cut:], k[:, cut:], v[:, cut:], decay[:, cut:], middle
    )
    assert_matches_reference("float64", inputs, torch.cat([first, second], 1), end)


def test_inputs_are_not_written_to() -> None:
    tensors = _tensors(rounded_inputs(_CASES["long"], "float32"), "float32")
    before = [tensor.clone() for tensor in tensors]
    _, state = linear_attention_update(*tensors)
    state.zero_()
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


@pytest.mark.parametrize("activation_type", TYPES)
def test_opcheck(activation_type: str) -> None:
    tensors = _tensors(rounded_inputs(_CASES["odd_sizes"], activation_type), activation_type)
    torch.library.opcheck(torch.ops.fwl.linear_attention_update.default, tensors)


def test_arguments_of_the_registered_op_are_the_specs() -> None:
    schema = torch.ops.fwl.linear_attention_update.default._schema
    assert [a.name for a in schema.arguments] == [a.name for a in INPUTS]
    assert len(schema.returns) == 2


class _Update(nn.Module):
    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, decay: Tensor, past_state: Tensor
    ) -> tuple[Tensor, Tensor]:
        return linear_attention_update(query, key, value, decay, past_state)


@pytest.mark.parametrize("activation_type", ["float32", "float16"])
def test_torch_export_keeps_one_node_with_dynamic_rows_and_tokens(activation_type: str) -> None:
    example = rounded_inputs(Case("example", (3, 7, 16, 24), "mixed"), activation_type)
    rows, tokens = torch.export.Dim("B", min=1), torch.export.Dim("T", min=1)
    dynamic = {
        a.name: {i: {"B": rows, "T": tokens}[s] for i, s in enumerate(a.shape) if s in "BT"}
        for a in INPUTS
    }
    program = torch.export.export(
        _Update(), tuple(_tensors(example, activation_type)), dynamic_shapes=dynamic
    )
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert targets.count(torch.ops.fwl.linear_attention_update.default) == 1
    for rows_now, tokens_now in ((1, 1), (2, 5), (5, 1), (1, 130)):
        case = Case("other", (rows_now, tokens_now, 16, 24), "mixed")
        inputs = rounded_inputs(case, activation_type)
        output, state = program.module()(*_tensors(inputs, activation_type))
        assert_matches_reference(activation_type, inputs, output.double(), state)


def test_decay_products() -> None:
    decay = torch.tensor([[0.5, 0.0, 0.25, 1.0], [1.0, 1.0, 1.0, 1.0]])
    expected = torch.tensor(
        [
            [
                [0.5, 1.0, 0.0, 0.0, 0.0],
                [0.0, 0.0, 1.0, 0.0, 0.0],
                [0.0, 0.0, 0.25, 1.0, 0.0],
                [0.0, 0.0, 0.25, 1.0, 1.0],
            ],
            torch.ones(4, 5).tril(1).tolist(),
        ]
    )
    found = decay_products(decay)
    assert_close("op.decay_products.float32", found, expected)
    # Decays of 0 and 1 are exact: a reset leaves nothing, and a silent token forgets nothing.
    assert torch.equal(found == 0, expected == 0)
    assert torch.equal(found == 1, expected == 1)


@pytest.mark.parametrize(
    ("argument", "change", "message"),
    [
        ("query", lambda x: x[0], "'query' has shape [3, 8]; expected [B, T, Dk]"),
        ("key", lambda x: x[:, :, 1:], "'key' has shape [2, 3, 7]; expected [2, 3, 8]"),
        ("value", lambda x: x[:1], "'value' has shape [1, 3, 5]; expected [2, 3, Dv]"),
        ("decay", lambda x: x[..., None], "'decay' has shape [2, 3, 1]; expected [2, 3]"),
        (
            "past_state",
            lambda x: x.transpose(1, 2),
            "'past_state' has shape [2, 5, 8]; expected [2, 8, 5]",
        ),
        (
            "query",
            lambda x: x.int(),
            "'query' is torch.int32; expected one of torch.float32, torch.float16, "
            "torch.bfloat16, torch.float64",
        ),
        ("key", lambda x: x.half(), "'key' is torch.float16; expected torch.float32"),
        ("value", lambda x: x.bfloat16(), "'value' is torch.bfloat16; expected torch.float32"),
        ("decay", lambda x: x.half(), "'decay' is torch.float16; expected torch.float32"),
        (
            "past_state",
            lambda x: x.double(),
            "'past_state' is torch.float64; expected torch.float32",
        ),
    ],
)
def test_errors_name_the_argument(argument, change, message) -> None:
    inputs = rounded_inputs(Case("wrong", (2, 3, 8, 5)), "float32")
    tensors = dict(zip(inputs, _tensors(inputs, "float32"), strict=True))
    tensors[argument] = change(tensors[argument])
    with pytest.raises(ShapeError) as error:
        linear_attention_update(**tensors)
    assert str(error.value) == f"fwl::LinearAttentionUpdate: {message}"


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((2, 0, 8, 5), "T (tokens) is 0; expected 1 or more"),
        ((0, 3, 8, 5), "B (rows) is 0; expected 1 or more"),
    ],
)
def test_refuses_sizes_of_zero(sizes: tuple[int, int, int, int], message: str) -> None:
    tensors = _tensors(rounded_inputs(Case("empty", sizes), "float32"), "float32")
    with pytest.raises(ShapeError) as error:
        linear_attention_update(*tensors)
    assert str(error.value) == f"fwl::LinearAttentionUpdate: {message}"


def _tensors(inputs: dict[str, Array], activation_type: str) -> list[Tensor]:
    """Return the inputs as tensors, with query, key and value in the given dtype."""
    tensors = []
    for argument, array in zip(INPUTS, inputs.values(), strict=True):
        tensor = torch.from_numpy(np.asarray(array, dtype=np.float64))
        state_type = "float64" if activation_type == "float64" else "float32"
        kind = activation_type if argument.dtype == "T" else state_type
        tensors.append(tensor.to(getattr(torch, kind)))
    return tensors
