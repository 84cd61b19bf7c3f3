"""Launch a plan with Triton's own launcher, for PyTorch on CUDA and for Triton's interpreter."""

from __future__ import annotations

from typing import Any

from . import linear_attention
from .plan import SIGNATURES, Plan


def launch(plan: Plan, tensors: dict[str, Any]) -> None:
    """Launch the kernels of a plan on the current device and stream.

    Args:
      plan: Plan for the sizes and the dtype of the tensors.
      tensors: Contiguous tensors by their names in the op's spec: inputs, outputs (which are
        overwritten), and "workspace" with at least `plan.workspace` float32 elements.
    """
    pointers = {
        **tensors,
        "past": tensors["past_state"],
        "present": tensors["present_state"],
        "partial": tensors["workspace"],
    }
    for step in plan.launches:
        kernel = getattr(linear_attention, step.variant.kernel)
        if not step.first_segment:
            pointers["past"] = tensors["present_state"]
        arguments = {**pointers, **step.scalars}
        kernel[(step.grid,)](
            *(arguments[name] for name in SIGNATURES[step.variant.kernel]),
            **dict(step.variant.constants),
            num_warps=step.variant.warps,
            num_stages=step.variant.stages,
        )
