"""Precision of the exported activations; sums, step sizes and norms stay in float32."""

from __future__ import annotations

import copy

import torch

from fwl_export.model.language_model import FWLModel

# Names used on the command line, in manifests and in file names.
EXPORTED = ("fp32", "fp16")
PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "fp64": torch.float64}


def in_precision(model: FWLModel, precision: str) -> FWLModel:
    """Return a copy of the model with activations of the given precision.

    Args:
      model: float32.
      precision: "fp32", "fp16", or "fp64" (for checking; it is not exported).
    """
    dtype = PRECISIONS[precision]
    converted = copy.deepcopy(model).to(dtype)
    if dtype == torch.float16:
        # A step size over a large loss_normalizer would underflow; they are read in float32.
        original, layer = model.fast_weights, converted.fast_weights
        for name, step in original.steps.items():
            layer.steps[name].data = step.data.clone()
        if original.config.decay == "learned":
            layer.horizon.data = original.horizon.data.clone()
    return converted
