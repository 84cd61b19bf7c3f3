"""Models in half precision on what hurts it: large values, and one token repeated."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fwl_export.model.language_model import FWLModel
from fwl_export.model.numerics import fitted, narrowed, product
from fwl_export.op.torch_op import linear_attention_update
from fwl_export.precision.policy import PrecisionPolicy, parts, streaming_model
from tests.backbones import tiny_pretrained
from tests.model.models import VOCABULARY, small_model

LARGEST = 65504  # of float16
CALL = 64


def read(model: FWLModel, precision: str | PrecisionPolicy, ids: Tensor) -> Tensor:
    """Return the logits of the streaming model, [B, T, V]."""
    streaming = streaming_model(model, precision, CALL)
    rows = len(ids)
    state = [
        torch.zeros(rows, *spec.shape, dtype=getattr(torch, spec.dtype)) for spec in streaming.specs
    ]
    logits = []
    with torch.inference_mode():
        for part in ids.split(CALL, 1):
            size = part.shape[1]
            found, *state = streaming(
                part,
                torch.ones(rows, size),
                torch.full((rows,), size),
                torch.arange(size).repeat(rows, 1),
                torch.ones(rows),
                *state,
            )
            logits.append(found)
    return torch.cat(logits, 1)


def repeated(length: int) -> Tensor:
    """Return a little text, then tokens that are repeated `length` times, [2, 64 + length]."""
    text = torch.randint(0, VOCABULARY, (2, 64), generator=torch.Generator().manual_seed(0))
    return torch.cat((text, torch.tensor([[1], [2]]).expand(2, length)), 1)


def large_hidden_states(model: FWLModel) -> None:
    model.backbone.norm.weight *= 3000


def outliers_in_the_residual_stream(model: FWLModel) -> None:
    model.backbone.embedding.weight[:, 3] += 5000
    model.backbone.embedding.weight[:, 7] -= 3000


def residual_stream_beyond_half(model: FWLModel) -> None:
    model.backbone.blocks[0].up.weight.mul_(10)
    model.backbone.blocks[0].down.weight[3] += 500


def large_squares_in_the_backbone(model: FWLModel) -> None:
    for block in model.backbone.blocks:
        block.up.weight.mul_(1000)


def large_squares_in_the_layer(model: FWLModel) -> None:
    model.fast_weights.up_kernel *= 1000


def small_squares_in_the_layer(model: FWLModel) -> None:
    layer = model.fast_weights
    layer.up_kernel *= 1e-3
    layer.up_bias *= 1e-3
    layer.down_bias.zero_()


def large_outputs(model: FWLModel) -> None:
    model.fast_weights.down_kernel *= 3000


def large_biases(model: FWLModel) -> None:
    model.fast_weights.down_bias += 3000
    model.fast_weights.unembed_bias -= 300


def a_long_memory(model: FWLModel) -> None:
    model.fast_weights.horizon.fill_(1e6)
    for step in model.fast_weights.steps.values():
        step.mul_(1e-2)


HURTS = (
    large_hidden_states,
    outliers_in_the_residual_stream,
    residual_stream_beyond_half,
    large_squares_in_the_backbone,
    large_squares_in_the_layer,
    small_squares_in_the_layer,
    large_outputs,
    large_biases,
    a_long_memory,
)


@pytest.mark.parametrize("policy", [False, True], ids=["plain", "policy"])
@pytest.mark.parametrize("hurt", HURTS, ids=lambda hurt: hurt.__name__)
def test_half_precision_stays_near(hurt: Callable[[FWLModel], None], policy: bool) -> None:
    model = small_model().float()
    hurt(model)
    ids = repeated(256)
    precision = PrecisionPolicy("fp16", list(parts(model, "fp16")), []) if policy else "fp16"
    expected = torch.log_softmax(read(model, "fp32", ids), -1)
    found = torch.log_softmax(read(model, precision, ids), -1)
    assert torch.isfinite(found).all()
    # Rounding to 11 bits changes these log-probabilities, of size 4, by up to 0.009; the mean
    # change is 0.0005.
    assert (found - expected).abs().max() < 0.02
    assert (found - expected).abs().mean() < 0.001


@pytest.mark.parametrize("variant", ["learned decay", "tensorflow", "soft cap"])
def test_repetition_over_a_thousand_tokens(variant: str) -> None:
    model = small_model(variant).float()
    model.backbone.norm.weight *= 100  # so that the sums exceed what float16 holds
    if variant != "tensorflow":
        model.fast_weights.horizon.fill_(1e4)
    for step in model.fast_weights.steps.values():
        step.mul_(1e-3)
    sums: list[float] = []

    def update(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        output, state = linear_attention_update(*tensors)
        sums.append(output.abs().max().item())
        return output, state

    ids = repeated(1024)
    expected = torch.log_softmax(read(model, "fp32", ids), -1)
    found = torch.log_softmax(read(model, "fp16", ids), -1)
    assert (found - expected).abs().max() < 0.02
    streaming = streaming_model(model, "fp32", 1088, update)
    state = [
        torch.zeros(2, *spec.shape, dtype=getattr(torch, spec.dtype)) for spec in streaming.specs
    ]
    streaming(ids, torch.ones(2, 1088), torch.full((2,), 1088), ids[:, :1], torch.ones(2), *state)
    assert max(sums) > 10 * LARGEST


def test_what_waits_for_a_label_is_float32() -> None:
    specs = streaming_model(small_model().float(), "fp16", 4).specs
    waiting = {spec.name: spec.dtype for spec in specs if spec.name.startswith("pending.")}
    assert waiting.pop("pending.hidden") == "float16"
    assert set(waiting.values()) == {"float32"}


@pytest.mark.parametrize("size", [1e-30, 1e-6, 1.0, 300.0, 1e6, 1e30])
def test_products_in_half_precision_keep_their_relative_error(size: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x = size * torch.randn(5, 64, generator=generator)
    weight = torch.randn(64, 32, generator=generator).half()
    found = product(x, weight)
    assert found.dtype == torch.float32
    error = (found.double() / size - x.double() / size @ weight.double()).abs().max()
    assert error < 0.02  # of values of size 8, rounded to 11 bits twice


def test_rows_of_zeros_stay_zeros() -> None:
    x, scale = fitted(torch.zeros(2, 3), torch.float16)
    assert scale is not None
    assert (x * scale == 0).all()
    assert (product(torch.zeros(2, 3), torch.ones(3, 4).half()) == 0).all()


@pytest.mark.parametrize(("key", "value"), [(1e6, 1.0), (1.0, 1e6), (1e4, 1e-7), (1e-3, 1e-3)])
def test_updates_in_half_precision_balance_keys_and_values(key: float, value: float) -> None:
    generator = torch.Generator().manual_seed(0)
    query, keys, values = (
        size * torch.randn(2, 9, 16, generator=generator) for size in (1e5, key, value)
    )
    tensors = (query, keys, values, torch.full((2, 9), 0.9), torch.zeros(2, 16, 16))
    found = narrowed(linear_attention_update, torch.float16)(*tensors)
    expected = linear_attention_update(*tensors)
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).abs().max() < 2e-3 * theirs.abs().max()


def with_large_keys(body: nn.Module) -> None:
    for name, parameter in body.named_parameters():
        if name.endswith(("q_proj.bias", "k_proj.bias")):
            parameter[:] = 300  # as some layers of published Qwen models have it


def with_outliers(body: nn.Module) -> None:
    embedding = body.get_input_embeddings().weight
    embedding[:, 3] += 5000
    embedding[:, 7] -= 3000


@pytest.mark.parametrize(
    ("name", "hurt"),
    [("Qwen2", with_large_keys), ("Qwen2", with_outliers), ("Llama", with_outliers)],
)
def test_a_published_architecture_in_half_precision(
    name: str, hurt: Callable[[nn.Module], None]
) -> None:
    model = tiny_pretrained(name).requires_grad_(False)
    hurt(model.backbone.body)
    ids = repeated(30)[:, 40:] % model.config.vocab_size
    expected = torch.log_softmax(read(model, "fp32", ids), -1)
    found = torch.log_softmax(read(model, "fp16", ids), -1)
    assert torch.isfinite(found).all()
    # Rounding to 11 bits changes these log-probabilities, of size 4, by up to 0.009.
    assert (found - expected).abs().max() < 0.02
    assert (found - expected).abs().mean() < 0.003
