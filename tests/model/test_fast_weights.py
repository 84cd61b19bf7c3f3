"""The parallel form equals the paper's own code, and literal gradient steps."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fwl_export.bundle.config import FastWeightsConfig
from fwl_export.importers import import_block
from fwl_export.model.fast_weights import (
    DENSE_BIASES,
    FAST_TENSORS,
    FastWeights,
    _DecayedSums,
    squared_relu,
)
from tests.model.models import VARIANTS, VOCABULARY, small_model
from tests.tolerances import TOLERANCES, assert_close

DATA = Path(__file__).parents[1] / "data"


def paper_layer(variant: Literal["jax", "tf"]) -> tuple[FastWeights, dict[str, Tensor]]:
    """Return the layer with the published parameters, and the arrays of the file."""
    path = DATA / f"fwl_reference_{variant}.npz"
    with np.load(path) as file:
        arrays = {name: torch.tensor(file[name]) for name in file.files if name != "variant"}
    block = import_block(variant, path, float(arrays["loss_normalizer"]))
    assert block.vocab_size is not None
    layer = FastWeights(block.config, block.vocab_size).double().requires_grad_(False)
    layer.load_state_dict(dict(block.tensors))
    return layer, arrays


@pytest.mark.parametrize("variant", ["jax", "tf"])
@pytest.mark.parametrize("chunk", [1, 7, 256])
def test_equals_the_code_of_the_paper(variant: Literal["jax", "tf"], chunk: int) -> None:
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
    """Return the layer's weights after an autograd gradient step on T tokens; T may be 0."""
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
    """Return the logits of one text, [T, V], with a literal gradient step before every token."""
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
    """The gradients of a second interval are taken at the weights after the first interval.

    Those weights lack the last position of the first interval, whose label comes with the second.
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


def tiny_layer(variant: str) -> tuple[FastWeights, Tensor, Tensor, Tensor]:
    """Return a small float64 layer, with hidden states, labels and weights to run it on."""
    sizes = {"input_size": 3, "hidden_size": 4, "output_size": 3}
    layer = FastWeights(dataclasses.replace(FastWeightsConfig(**sizes), **VARIANTS[variant]), 5)
    layer = layer.double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.7)
        for step in layer.steps.values():
            step.copy_(0.1 + 0.2 * torch.rand_like(step))
        if layer.config.decay == "learned":
            layer.horizon.fill_(4.0)
    hidden = torch.randn(1, 5, 3, dtype=torch.float64)
    return layer, hidden, torch.randint(0, 5, (1, 5)), torch.rand(1, 5, dtype=torch.float64)


@pytest.mark.parametrize(
    ("variant", "checkpointing"),
    [("tensorflow", False), ("jax", False), ("learned decay", False), ("step per feature", True)],
)
def test_second_order_gradients_are_those_of_differences(variant: str, checkpointing: bool) -> None:
    """Check the gradients of all parameters and hidden states through the gradient steps."""
    layer, hidden, labels, weights = tiny_layer(variant)
    layer.gradient_checkpointing = checkpointing
    names = [name for name, _ in layer.named_parameters()]

    def loss(hidden: Tensor, *parameters: Tensor) -> Tensor:
        given = {f"layer.{n}": p for n, p in zip(names, parameters, strict=True)}
        fast, _ = torch.func.functional_call(_Parallel(layer), given, (hidden, labels, weights))
        return F.cross_entropy(fast.flatten(0, 1), labels.flatten())

    inputs = (hidden.requires_grad_(), *layer.parameters())
    tolerance = TOLERANCES["model.gradcheck"]
    assert torch.autograd.gradcheck(loss, inputs, atol=tolerance.atol, rtol=tolerance.rtol)


class _Parallel(torch.nn.Module):
    def __init__(self, layer: FastWeights) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, hidden: Tensor, labels: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        return self.layer.parallel(hidden, labels, weights, chunk=3)


def test_first_order_gradients_take_the_steps_for_constants() -> None:
    layer, hidden, labels, weights = tiny_layer("learned decay")
    frozen = copy.deepcopy(layer).requires_grad_(False)
    assert layer.parallel(hidden, labels, weights)[0].equal(
        frozen.parallel(hidden, labels, weights)[0]
    )

    def gradients(logits: Tensor) -> dict[str, Tensor]:
        layer.zero_grad()
        F.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
        return {name: p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None}

    second = gradients(layer.parallel(hidden, labels, weights)[0])
    layer.first_order = True
    first = gradients(layer.parallel(hidden, labels, weights)[0])

    # Do the same by hand: take what the steps consist of from a layer that is not trained.
    known, taught = (F.pad(x[:, :-1], (1, 0)) for x in (labels, weights))
    slow = frozen.slow(hidden)
    before = slow.pending(frozen.expected_embedding(frozen.logits(slow.output))).one_later(None)
    sums = _DecayedSums({}, layer.log_decay(taught))
    steps = frozen.gradients(before, known, taught)
    by_hand = gradients(layer.logits(layer.fast(layer.slow(hidden), before, steps, sums)))
    assert set(first) == set(by_hand) == set(second)
    for name, gradient in by_hand.items():
        assert_close("model.float64", first[name], gradient, name)
    # Step sizes and horizon only scale the steps, so for them first and second order agree.
    scales = {name for name in first if name.startswith("steps.") or name == "horizon"}
    for name in first:
        assert torch.allclose(first[name], second[name]) == (name in scales), name
