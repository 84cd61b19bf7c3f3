"""The GPU kernels on a real GPU: the op's cases, through the launcher and the PyTorch op."""

from __future__ import annotations

import pytest
import torch

from fwl_export.op import cuda
from fwl_export.op.cases import CASES, Case
from fwl_export.op.spec import ACTIVATION_TYPES
from fwl_export.op.torch_op import linear_attention_update
from plugins.kernels.gpu.plan import plan
from tests.op.helpers import assert_matches_reference, rounded_inputs

pytestmark = pytest.mark.gpu

LARGE = (
    Case("decode_768_3072", (1, 1, 768, 3072), "constant"),
    Case("decode_batch", (64, 1, 256, 512), "mixed"),
    Case("prefill_odd", (3, 513, 250, 301), "mixed"),
    Case("prefill_segments", (2, 2048, 256, 256), "constant"),
    Case("book", (1, 10_000, 64, 64), "constant"),
)


@pytest.fixture(autouse=True)
def _needs_torch_with_cuda() -> None:
    if not torch.cuda.is_available():
        pytest.skip(f"torch {torch.__version__} was built without CUDA")
    pytest.importorskip("triton")


@pytest.mark.parametrize("dtype", ACTIVATION_TYPES)
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_matches_reference(case: Case, dtype: str, in_place: bool) -> None:
    inputs = rounded_inputs(case, dtype)
    output, state = _run(case, dtype, in_place)
    assert_matches_reference(dtype, inputs, output.double().cpu(), state.cpu())


@pytest.mark.parametrize("dtype", ACTIVATION_TYPES)
@pytest.mark.parametrize("case", LARGE, ids=lambda case: case.name)
def test_large_sizes_match_float64_on_the_gpu(case: Case, dtype: str) -> None:
    output, state = _run(case, dtype, in_place=False)
    wide = [tensor.double() for tensor in _tensors(case, dtype).values()]
    expected_output, expected_state = linear_attention_update(*wide)
    # Allow 20 float32 roundings at the scale of the whole tensor.
    epsilon = 20 * torch.finfo(torch.float32).eps
    torch.testing.assert_close(
        output.double(),
        expected_output,
        atol=epsilon * expected_output.abs().max().item(),
        rtol=0.0,
    )
    torch.testing.assert_close(
        state.double(),
        expected_state,
        atol=epsilon * expected_state.abs().max().item(),
        rtol=0.0,
    )


@pytest.mark.parametrize("case", LARGE, ids=lambda case: case.name)
def test_every_run_gives_the_same_bits(case: Case) -> None:
    first = _run(case, "float16", in_place=False)
    again = _run(case, "float16", in_place=False)
    for one, other in zip(first, again, strict=True):
        assert torch.equal(one, other)


def test_the_pytorch_op_launches_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    launched = []
    launcher = cuda._launcher()
    plain = launcher.launch
    monkeypatch.setattr(
        launcher, "launch", lambda steps, tensors: (launched.append(steps), plain(steps, tensors))
    )
    output, state = linear_attention_update(*_tensors(CASES[-1], "float16").values())
    assert len(launched) == 1
    inputs = rounded_inputs(CASES[-1], "float16")
    assert_matches_reference("float16", inputs, output.double().cpu(), state.cpu())


def _tensors(case: Case, dtype: str) -> dict[str, torch.Tensor]:
    tensors = {name: torch.from_numpy(array).cuda() for name, array in case.arrays().items()}
    for name in ("query", "key", "value"):
        tensors[name] = tensors[name].to(getattr(torch, dtype))
    return tensors


def _run(case: Case, dtype: str, in_place: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the plan chosen for this GPU. Every buffer that it writes is first filled with NaN."""
    tensors = _tensors(case, dtype)
    steps = plan(*case.sizes, dtype, cuda._planned(torch.cuda.get_device_capability()) or 0)
    past = tensors["past_state"]
    tensors["output"] = torch.full_like(tensors["value"], float("nan"))
    tensors["present_state"] = past if in_place else torch.full_like(past, float("nan"))
    tensors["workspace"] = past.new_full((steps.workspace,), float("nan"))
    cuda._launcher().launch(steps, tensors)
    return tensors["output"], tensors["present_state"]
