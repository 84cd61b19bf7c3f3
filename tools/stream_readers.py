"""Other readings of the trained weights: the rows (c) and (c') of evaluate_demo.py."""

from __future__ import annotations

import dataclasses

import torch

from fwl_export.model.language_model import FWLModel


def paper_form(model: FWLModel) -> FWLModel:
    """Return a model with the same weights and step sizes whose sums only grow (decay 1), with
    gradients at the slow weights.
    """
    layer = dataclasses.replace(model.config.fast_weights, decay="none", anchor_interval=0)
    pure = FWLModel(dataclasses.replace(model.config, fast_weights=layer))
    weights = {k: v for k, v in model.state_dict().items() if k != "fast_weights.horizon"}
    pure.load_state_dict(weights)
    return pure.eval()


def anchored(model: FWLModel, interval: int, step_factor: float, horizon_factor: float) -> FWLModel:
    """Return a model with the same weights that takes its gradients at an anchor.

    What was learned is then not learned again, so it can be kept for longer: `horizon_factor`
    and `step_factor` multiply the learned horizon and all step sizes.
    """
    layer = dataclasses.replace(model.config.fast_weights, anchor_interval=interval)
    read = FWLModel(dataclasses.replace(model.config, fast_weights=layer))
    read.load_state_dict(model.state_dict())
    with torch.no_grad():
        read.fast_weights.horizon.mul_(horizon_factor)
        for step in read.fast_weights.steps.values():
            step.mul_(step_factor)
    return read.eval()
