"""The choice of the next token from logits."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from fwl_export.bundle.state import Array
from fwl_export.errors import ConfigError


class Sampler:
    """Chooses a token from logits: greedy, or at random with temperature, top-k and top-p.

        sampler = Sampler(temperature=0.8, top_p=0.95, seed=7)
        token = sampler(session.feed(prompt, last_only=True)[0])

    Logits are divided by the temperature; of the `top_k` most likely tokens the fewest stay whose
    probabilities add up to `top_p` or more; one of these is drawn. The same settings, seed and
    logits give the same tokens. Each draw advances the random generator, so give each text a
    sampler of its own. Not for use by several threads at once.
    """

    def __init__(
        self, temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0, seed: int = 0
    ) -> None:
        """Make a sampler; the default is greedy.

        Args:
          temperature: 0 takes the most likely token, the lowest id among equals. 1 samples from
            the model's own probabilities; less makes likely tokens even more likely.
          top_k: Sample from the k most likely tokens; 0 means all.
          top_p: Sample from the most likely tokens that hold this share of the probability; more
            than 0, and 1 means all.
          seed: Seed of the random generator, 0 or more.

        Raises:
          ConfigError: A value is out of range.
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
        """Return the id of the chosen token.

        Args:
          logits: [V] floats, finite.
        """
        if self._temperature == 0:
            return int(logits.argmax())
        wide = logits.astype(np.float64)
        with np.errstate(over="ignore"):  # a temperature near 0 may overflow to -inf: exp is 0
            weights = np.exp((wide - wide.max()) / self._temperature)
        order = np.argsort(-weights, kind="stable")
        if self._top_k:
            order = order[: self._top_k]
        shares = np.cumsum(weights[order]) / weights[order].sum()
        order = order[: int(np.searchsorted(shares, self._top_p)) + 1]
        return int(self._rng.choice(order, p=weights[order] / weights[order].sum()))


def log_softmax(logits: Array) -> npt.NDArray[np.float64]:
    """Return log probabilities in nats, log softmax(logits): [..., V] -> [..., V] float64."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(-1, keepdims=True)
    result: npt.NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return result
