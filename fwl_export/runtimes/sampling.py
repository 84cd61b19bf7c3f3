"""Choosing the next token."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from fwl_export.bundle.state import Array
from fwl_export.errors import ConfigError


class Sampler:
    """Chooses tokens by their logits; the same seed and logits give the same tokens.

    First the `top_k` likeliest are kept, then of these the fewest whose probability together is
    `top_p` or more; then one is drawn at the given temperature.
    """

    def __init__(
        self, temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0, seed: int = 0
    ) -> None:
        """Check the settings.

        Args:
          temperature: 0 always takes the likeliest, the first of equals.
          top_k: 0 keeps all.
          top_p: in (0, 1]; 1 keeps all.
          seed: of the random choice.

        Raises:
          ConfigError: a value is out of range.
        """
        if not (np.isfinite(temperature) and temperature >= 0):
            raise ConfigError(f"temperature is {temperature}; expected 0 or more")
        if top_k < 0:
            raise ConfigError(f"top_k is {top_k}; expected 0 (all) or more")
        if not 0 < top_p <= 1:
            raise ConfigError(f"top_p is {top_p}; expected more than 0, and 1 (all) at most")
        if seed < 0:
            raise ConfigError(f"seed is {seed}; expected 0 or more")
        self._temperature = temperature
        self._top_k = top_k
        self._top_p = top_p
        self._rng = np.random.default_rng(seed)

    def __call__(self, logits: npt.NDArray[Any]) -> int:
        """Return a token for logits [V]."""
        if self._temperature == 0:
            return int(logits.argmax())
        wide = logits.astype(np.float64)
        with np.errstate(over="ignore"):  # at a temperature of almost 0
            weights = np.exp((wide - wide.max()) / self._temperature)
        order = np.argsort(-weights, kind="stable")
        if self._top_k:
            order = order[: self._top_k]
        shares = np.cumsum(weights[order]) / weights[order].sum()
        order = order[: int(np.searchsorted(shares, self._top_p)) + 1]
        return int(self._rng.choice(order, p=weights[order] / weights[order].sum()))


def log_softmax(logits: Array) -> npt.NDArray[np.float64]:
    """Return log probabilities: [..., V] -> [..., V] float64."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(-1, keepdims=True)
    result: npt.NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return result
