"""Other ways to read with the trained weights: rows (c) and (c') of evaluate_demo.py."""

from __future__ import annotations

import dataclasses

import torch

from fwl_export.model.language_model import FWLModel


def paper_form(model: FWLModel) -> FWLModel:
    """Return the model in the paper's form: sums that only grow, gradients at the slow weights.

    Args:
      model: Trained model, whose weights and step sizes are kept.
    """
    layer = dataclasses.replace(model.config.fast_weights, decay="none", anchor_interval=0)
    pure = FWLModel(dataclasses.replace(model.config, fast_weights=layer))
    weights = {k: v for k, v in model.state_dict().items() if k != "fast_weights.horizon"}
    pure.load_state_dict(weights)
    return pure.eval()


def anchored(model: FWLModel, interval: int, step_factor: float, horizon_factor: float) -> FWLModel:
    """Return a model with the same weights that takes its gradients at an anchor.

    The gradient of something already learned is then small, so it is not learned again and can be
    kept for longer.

    Args:
      model: Trained model, which is left unchanged.
      interval: Tokens between anchors.
      step_factor: Factor on all step sizes.
      horizon_factor: Factor on the learned horizon.
    """
    layer = dataclasses.replace(model.config.fast_weights, anchor_interval=interval)
    read = FWLModel(dataclasses.replace(model.config, fast_weights=layer))
    read.load_state_dict(model.state_dict())
    with torch.no_grad():
        read.fast_weights.horizon.mul_(horizon_factor)
        for step in read.fast_weights.steps.values():
            step.mul_(step_factor)
    return read.eval()
