"""The parallel form against the paper's own code and against a literal gradient step."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fwl_export.model.config import FastWeightsConfig
from fwl_export.model.fast_weights import (
    DENSE_BIASES,
    FAST_TENSORS,
    FastWeights,
    squared_relu,
    step_shapes,
)
from tests.model.models import VARIANTS, VOCABULARY, small_model
from tests.tolerances import assert_close

DATA = Path(__file__).parents[1] / "data"

JAX_NAMES = {
    "up_kernel": "params/layers_0/Dense_0/kernel",
    "up_bias": "params/layers_0/Dense_0/bias",
    "down_kernel": "params/layers_2/Dense_0/kernel",
    "down_bias": "params/layers_2/Dense_0/bias",
    "norm_scale": "params/layers_3/LayerNorm_0/scale",
    "norm_bias": "params/layers_3/LayerNorm_0/bias",
    "unembed": "params/unembed/kernel",
    "unembed_bias": "params/unembed/bias",
    "steps.up": "params/step_size_0",
    "steps.down": "params/step_size_2",  # 1 belongs to the activation, which has no weights
    "steps.norm": "params/step_size_3",
}
TENSORFLOW_NAMES = {
    **{name: name for name in JAX_NAMES if "." not in name},
    "unembed": "unembed_kernel",
    **{f"steps.{name}": f"step_{name}" for name, _ in step_shapes(FastWeightsConfig())},
}


def paper_layer(variant: str) -> tuple[FastWeights, dict[str, Tensor]]:
    """Return the layer with the published parameters, and the arrays of the file."""
    with np.load(DATA / f"fwl_reference_{variant}.npz") as file:
        arrays = {name: torch.tensor(file[name]) for name in file.files if name != "variant"}
    names = JAX_NAMES if variant == "jax" else TENSORFLOW_NAMES
    inputs, hidden = arrays[names["up_kernel"]].shape
    outputs, vocabulary = arrays[names["unembed"]].shape
    config = FastWeightsConfig(
        inputs,
        hidden,
        outputs,
        update_dense_bias=variant == "tf",
        step_sizes="per_layer" if variant == "jax" else "per_tensor",
        norm_epsilon=float(arrays["norm_epsilon"]) if variant == "jax" else 0.0,
        loss_normalizer=float(arrays["loss_normalizer"]),
        decay="none",
    )
    layer = FastWeights(config, vocabulary).double().requires_grad_(False)
    tensors = {name: arrays[source] for name, source in names.items()}
    tensors["unembed"] = tensors["unembed"].T
    layer.load_state_dict(tensors)
    return layer, arrays


@pytest.mark.parametrize("variant", ["jax", "tf"])
@pytest.mark.parametrize("chunk", [1, 7, 256])
def test_equals_the_code_of_the_paper(variant: str, chunk: int) -> None:
    layer, arrays = paper_layer(variant)
    fast, slow = layer.parallel(arrays["hidden"], arrays["labels"], arrays["weights"], chunk)
    assert_close("model.paper_code", slow, arrays["slow_logits"])
    assert_close("model.paper_code", fast, arrays["fast_logits"])
    assert not torch.allclose(fast, slow, rtol=0, atol=1e-3), "the layer did not adapt"


def slow_logits(layer: FastWeights, weights: dict[str, Tensor], hidden: Tensor) -> Tensor:
    """Return logits [T, V] of hidden states [T, input] with the given weights."""
    r = squared_relu(hidden @ weights["up_kernel"] + weights["up_bias"])
    m = r @ weights["down_kernel"] + weights["down_bias"]
    eps = layer.config.norm_epsilon
    n = F.layer_norm(m, m.shape[-1:], weights["norm_scale"], weights["norm_bias"], eps)
    logits = n @ layer.unembed.T + layer.unembed_bias
    cap = layer.config.logit_softcap
    return cap * torch.tanh(logits / cap) if cap else logits


def gradient_step(layer: FastWeights, hidden: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Return the layer's weights after a gradient step of autograd on [T] tokens, T >= 0."""
    names = [tensor.replace(".", "_") for tensor in FAST_TENSORS]
    weights = {n: getattr(layer, n).detach().clone().requires_grad_() for n in names}
    if len(labels):
        logits = slow_logits(layer, weights, hidden)
        F.cross_entropy(logits, labels, reduction="sum").backward()
    stepped = {}
    for tensor, (name, weight) in zip(FAST_TENSORS, weights.items(), strict=True):
        stepped[name] = weight.detach()
        learns = layer.config.update_dense_bias or tensor not in DENSE_BIASES
        if weight.grad is not None and learns:
            step = layer.scaled_step(tensor)
            stepped[name] = stepped[name] - (step[:, None] if step.ndim else step) * weight.grad
    return stepped


def logits_by_autograd(layer: FastWeights, hidden: Tensor, labels: Tensor) -> Tensor:
    """Return the logits [T, V] of one text by taking a gradient step before every token."""
    return torch.cat(
        [
            slow_logits(layer, gradient_step(layer, hidden[:t], labels[:t]), hidden[t : t + 1])
            for t in range(len(labels))
        ]
    )


@pytest.mark.parametrize(
    ("variant", "softcap"), [("tensorflow", 0.0), ("jax", 0.0), ("tensorflow", 2.0)]
)
def test_equals_a_literal_gradient_step(variant: str, softcap: float) -> None:
    layer = small_model(variant).fast_weights
    layer.config = dataclasses.replace(layer.config, logit_softcap=softcap)
    hidden = torch.randn(1, 12, 16, dtype=torch.float64)
    labels = torch.randint(0, VOCABULARY, (1, 12))
    fast, _ = layer.parallel(hidden, labels, chunk=5)
    expected = logits_by_autograd(layer, hidden[0], labels[0])
    assert_close("model.float64", fast[0], expected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_chunks_do_not_change_the_result(variant: str) -> None:
    layer = small_model(variant).fast_weights
    hidden = torch.randn(2, 33, 16, dtype=torch.float64)
    labels = torch.randint(0, VOCABULARY, (2, 33))
    weights = torch.rand(2, 33, dtype=torch.float64)
    whole, _ = layer.parallel(hidden, labels, weights, chunk=64)
    for chunk in (1, 8, 32):
        parts, _ = layer.parallel(hidden, labels, weights, chunk=chunk)
        assert_close("model.float64", parts, whole)


def test_an_anchor_is_a_literal_gradient_step_at_the_weights_of_then() -> None:
    """With two intervals: gradients of the second are those at the weights after the first.

    The last position of the first interval is left out: its label comes with the second.
    """
    interval, length = 6, 12
    anchored = small_model("jax").fast_weights
    anchored.config = dataclasses.replace(anchored.config, anchor_interval=interval)
    hidden = torch.randn(1, length, 16, dtype=torch.float64)
    labels = torch.randint(0, VOCABULARY, (1, length))
    weights = torch.ones(1, length, dtype=torch.float64)
    weights[:, interval - 1] = 0
    fast, slow = anchored.parallel(hidden, labels, weights)

    first = slice(0, interval - 1)
    stepped = gradient_step(anchored, hidden[0, first], labels[0, first])
    moved = small_model("jax").fast_weights
    moved.load_state_dict({**moved.state_dict(), **stepped})
    second = slice(interval, length)
    expected, at_anchor = moved.parallel(hidden[:, second], labels[:, second])
    assert_close("model.float64", fast[:, second], expected)
    assert_close("model.float64", slow[:, second], at_anchor)
    without, _ = small_model("jax").fast_weights.parallel(hidden, labels, weights)
    assert_close("model.float64", fast[:, :interval], without[:, :interval])
    assert (fast - without)[:, second].abs().max() > 1e-5, "the anchor made no difference"


def test_weight_zero_teaches_nothing() -> None:
    layer = small_model().fast_weights
    hidden = torch.randn(1, 9, 16, dtype=torch.float64)
    labels = torch.randint(0, VOCABULARY, (1, 9))
    fast, slow = layer.parallel(hidden, labels, torch.zeros(1, 9, dtype=torch.float64))
    assert_close("model.float64", fast, slow)


def test_a_long_horizon_is_the_paper_without_decay() -> None:
    layer = small_model().fast_weights
    hidden = torch.randn(1, 20, 16, dtype=torch.float64)
    labels = torch.randint(0, VOCABULARY, (1, 20))
    undecayed = small_model("learned decay").fast_weights
    undecayed.load_state_dict(layer.state_dict())
    undecayed.horizon.fill_(1e16)
    layer.config = dataclasses.replace(layer.config, decay="none")
    assert_close(
        "model.float64", undecayed.parallel(hidden, labels)[0], layer.parallel(hidden, labels)[0]
    )


def test_gradients_flow_through_the_gradient_step() -> None:
    layer = small_model().fast_weights.requires_grad_(True)
    hidden = torch.randn(1, 6, 16, dtype=torch.float64)
    labels = torch.randint(0, VOCABULARY, (1, 6))

    def loss(step: Tensor) -> Tensor:
        layer.steps["up_kernel"].data.copy_(step)
        return F.cross_entropy(layer.parallel(hidden, labels)[0][0], labels[0])

    at, delta = torch.tensor(0.05, dtype=torch.float64), 1e-6
    value = loss(at)
    value.backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
    numeric = (loss(at + delta) - loss(at - delta)) / (2 * delta)
    assert_close("model.central_difference", layer.steps["up_kernel"].grad, numeric.detach())
