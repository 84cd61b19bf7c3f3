"""Small random models for tests."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from fwl_export.bundle.config import BackboneConfig, FastWeightsConfig, ModelConfig
from fwl_export.model.language_model import FWLModel

VOCABULARY = 37

# Both published forms, and ours: learned decay, a step size per input feature, an anchor.
VARIANTS: dict[str, dict[str, Any]] = {
    "tensorflow": {"decay": "none", "norm_epsilon": 0.0, "loss_normalizer": 3.0},
    "jax": {
        "decay": "none",
        "update_dense_bias": False,
        "step_sizes": "per_layer",
        "loss_normalizer": 3.0,
    },
    "learned decay": {},
    "step per feature": {"step_size_shape": "input"},
    "anchor": {"anchor_interval": 12},
    "anchor, step per feature": {"step_size_shape": "input", "anchor_interval": 7},
    "anchor, jax": {
        "anchor_interval": 5,
        "update_dense_bias": False,
        "step_sizes": "per_layer",
    },
    "soft cap": {"logit_softcap": 2.0},
    "anchor, soft cap": {"logit_softcap": 2.0, "anchor_interval": 9},
}


def small_model(variant: str = "learned decay", **backbone: Any) -> FWLModel:
    """Return a float64 model whose fast weights change its logits visibly."""
    config = ModelConfig(
        VOCABULARY,
        BackboneConfig(**{"width": 16, "layers": 2, "heads": 2, "window": 5, **backbone}),
        dataclasses.replace(
            FastWeightsConfig(input_size=16, hidden_size=24, output_size=12), **VARIANTS[variant]
        ),
    )
    torch.manual_seed(0)
    model = FWLModel(config).double().eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.copy_(torch.randn_like(parameter) * 0.3)
    for step in model.fast_weights.steps.values():
        step.copy_(0.02 + 0.06 * torch.rand_like(step))
    if config.fast_weights.decay == "learned":
        model.fast_weights.horizon.fill_(7.0)
    return model
