"""The optimizer Muon (Jordan et al., 2024), with its iteration in float32.

`torch.optim.Muon` iterates in bfloat16, which CPUs without bfloat16 units emulate. There it takes
three quarters of a training step of the demo model; this one takes about a tenth.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

# Coefficients of the quintic Newton-Schulz iteration, from the reference implementation.
_A, _B, _C = 3.4445, -4.7750, 2.0315


class Muon(torch.optim.Optimizer):
    """Gradient descent with momentum that replaces each update by the nearest orthogonal matrix.

    Args:
      params: The matrices to train.
      lr: Learning rate. It is scaled by 0.2 sqrt(larger size), so that updates are as large as
        AdamW's.
      momentum: Factor of the Nesterov momentum.
      weight_decay: Decoupled weight decay, as in AdamW.
      iterations: Number of Newton-Schulz iterations per update.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.1,
        iterations: int = 5,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "iterations": iterations,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                momentum = state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
                update = orthogonalize(
                    parameter.grad.lerp(momentum, group["momentum"]), group["iterations"]
                )
                scale = 0.2 * max(parameter.shape) ** 0.5
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update, alpha=-group["lr"] * scale)


def orthogonalize(matrix: Tensor, iterations: int) -> Tensor:
    """Return approximately U V^T of the singular value decomposition U S V^T of a matrix [m, n].

    The singular values of the result lie between about 0.7 and 1.2, which is enough for Muon.
    """
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(iterations):
        gram = x @ x.T
        x = _A * x + (_B * gram + _C * gram @ gram) @ x
    return x.T if tall else x
