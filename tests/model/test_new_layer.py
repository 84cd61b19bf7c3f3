"""A new layer for a pretrained backbone says what the backbone says."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fwl_export.errors import ConfigError
from fwl_export.model import new_layer
from fwl_export.model.language_model import FWLModel
from fwl_export.model.new_layer import final_norm, start_near_identity
from tests.backbones import ARCHITECTURES, tiny_causal

IDS = (torch.arange(48) * 7 + 3)[None] % 60
# Its hidden states come from a projection after the norm.
WITHOUT_NORM = "OPT"


def divergence(found: Tensor, expected: Tensor) -> float:
    """Return the mean KL divergence of logits from those that are expected, in nats."""
    wanted = torch.log_softmax(expected, -1)
    each = (wanted.exp() * (wanted - torch.log_softmax(found, -1))).sum(-1)
    return float(each.mean().detach())


def with_layer(model: FWLModel, **changes: Any) -> FWLModel:
    """Return the model with a new layer whose configuration has other values."""
    layer = replace(model.config.fast_weights, **changes)
    other = FWLModel(replace(model.config, fast_weights=layer), model.backbone)
    with torch.no_grad():
        other.fast_weights.unembed.copy_(model.fast_weights.unembed)
        start_near_identity(other.fast_weights, model.backbone)
    return other


@pytest.mark.parametrize("name", sorted(ARCHITECTURES.keys() - {WITHOUT_NORM}))
def test_a_new_layer_predicts_like_its_backbone(name: str) -> None:
    causal = tiny_causal(name)
    model = FWLModel.from_pretrained(causal)
    norm = final_norm(model.backbone)
    hidden = model.backbone(IDS)
    normalized = (hidden - norm.bias) / norm.scale
    # The epsilon of a norm, 1e-5 to 1e-6, beside the small mean squares of tiny models.
    torch.testing.assert_close(normalized.square().mean(-1), torch.ones(1, 48), atol=1e-3, rtol=0)
    if norm.centered:
        output = model.fast_weights.slow(hidden).output
        # A difference of squares: (x + c)² loses some digits of x, and the norm has an epsilon.
        torch.testing.assert_close(output, hidden, atol=1e-4, rtol=1e-3)
    else:  # one of 16 directions is missing
        logits = causal(IDS).logits
        nothing = divergence(torch.zeros_like(logits), logits)
        assert divergence(model.plain(IDS), logits) < 0.2 * nothing


def test_the_direction_that_is_missing_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    causal = tiny_causal("Llama")
    logits = causal(IDS).logits
    chosen = FWLModel.from_pretrained(causal).plain(IDS)

    def plus(sensitivity: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones(16), torch.eye(16)

    monkeypatch.setattr(new_layer, "_least_missed", plus)
    first = FWLModel.from_pretrained(causal).plain(IDS)
    assert divergence(chosen, logits) < 0.5 * divergence(first, logits)


def test_it_is_the_same_every_time() -> None:
    first, second = (FWLModel.from_pretrained(tiny_causal("Qwen3")) for _ in range(2))
    for name, tensor in first.fast_weights.state_dict().items():
        assert torch.equal(tensor, second.fast_weights.state_dict()[name]), name


def test_features_that_the_norm_switches_off_do_no_harm() -> None:
    causal = tiny_causal("GPT-2")
    causal.transformer.ln_f.weight[:3] = torch.tensor([0.0, 1e-9, -1e-30])
    model = FWLModel.from_pretrained(causal)
    assert all(tensor.isfinite().all() for tensor in model.fast_weights.state_dict().values())
    assert divergence(model.plain(IDS), causal(IDS).logits) < 1e-3


def test_learning_is_on_and_gentle() -> None:
    model = FWLModel.from_pretrained(tiny_causal("GPT-2"))
    adapting, slow = model(IDS, IDS.roll(-1, 1))
    change = (adapting - slow).abs().max()
    assert 1e-6 < change < 0.1 * slow.std()
    assert model.config.fast_weights.anchor_interval == new_layer.ANCHOR_INTERVAL


@pytest.mark.parametrize(
    "changes",
    [{}, {"step_size_shape": "input"}, {"step_sizes": "per_layer", "update_dense_bias": False}],
)
def test_at_first_only_the_first_kernel_learns(changes: dict[str, Any]) -> None:
    model = with_layer(FWLModel.from_pretrained(tiny_causal("Llama")), **changes)
    with torch.no_grad():
        adapting, slow = model(IDS, IDS.roll(-1, 1))
        for name, step in model.fast_weights.steps.items():
            if name not in ("up", "up_kernel"):
                step.zero_()
        alone, _ = model(IDS, IDS.roll(-1, 1))
    assert (adapting - alone).abs().max() < 1e-3 * (adapting - slow).abs().max()


def test_hidden_units_beyond_twice_the_width_have_no_effect_at_first() -> None:
    model = FWLModel.from_pretrained(tiny_causal("GPT-2"))
    other = with_layer(model, hidden_size=40)
    hidden = model.backbone(IDS)
    output = other.fast_weights.slow(hidden).output
    # As in the test of all architectures: a difference of squares.
    torch.testing.assert_close(output, hidden, atol=1e-4, rtol=1e-3)
    with pytest.raises(ConfigError, match="hidden_size is 31 and output_size 16; to start from"):
        with_layer(model, hidden_size=31)


def test_a_backbone_without_a_final_norm_is_refused() -> None:
    with pytest.raises(ConfigError, match="no layer norm or RMS norm, from which a new"):
        FWLModel.from_pretrained(tiny_causal(WITHOUT_NORM))
