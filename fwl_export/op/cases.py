"""Named, seeded inputs of the op, on which every implementation is tested."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Case:
    """Sizes of one test input, and the kind of its decay and state.

    Attributes:
      name: Name of the case, for test ids.
      sizes: The sizes B, T, Dk and Dv.
      decay: Kind of decay: "one", "constant" (0.97), "mixed" (uniform in [0, 1]), "reset" (0 at the
        middle token, else 1) or "tiny" (1e-30 for the first half, then 0.9).
      fresh: Whether the past state is zero; "rows" means in every other row.
      silent: Share of tokens that write nothing (value 0, decay 1), like tokens with weight 0.
      scale: Factor on the values.
      seed: Seed of the random numbers, used together with the name.
    """

    name: str
    sizes: tuple[int, int, int, int]
    decay: str = "one"
    fresh: bool | str = False
    silent: float = 0.0
    scale: float = 1.0
    seed: int = 0

    def arrays(self) -> dict[str, npt.NDArray[np.float32]]:
        """Return the op's inputs as float32 arrays by name."""
        rng = np.random.default_rng([self.seed, *self.name.encode()])
        batch, length, size_k, size_v = self.sizes
        arrays = {
            "query": rng.standard_normal((batch, length, size_k)),
            "key": rng.standard_normal((batch, length, size_k)),
            "value": rng.standard_normal((batch, length, size_v)) * self.scale,
            "decay": self._decay(rng),
            "past_state": rng.standard_normal((batch, size_k, size_v)),
        }
        if self.fresh == "rows":
            arrays["past_state"][::2] = 0
        elif self.fresh:
            arrays["past_state"][:] = 0
        silent = rng.random((batch, length)) < self.silent
        arrays["value"][silent] = 0
        arrays["decay"][silent] = 1
        return {name: array.astype(np.float32) for name, array in arrays.items()}

    def _decay(self, rng: np.random.Generator) -> npt.NDArray[np.float64]:
        batch, length = self.sizes[:2]
        decay = np.ones((batch, length))
        if self.decay == "constant":
            decay[:] = 0.97
        elif self.decay == "mixed":
            decay = rng.random((batch, length))
        elif self.decay == "reset":
            decay[:, length // 2] = 0
        elif self.decay == "tiny":
            decay[:, : length // 2] = 1e-30
            decay[:, length // 2 :] = 0.9
        elif self.decay != "one":
            raise ValueError(f"unknown kind of decay {self.decay!r}")
        return decay


CASES = (
    Case("one_token", (1, 1, 8, 8)),
    Case("one_token_decayed", (3, 1, 16, 5), "constant"),
    Case("one_token_reset", (2, 1, 8, 4), "reset"),
    Case("fresh", (2, 7, 16, 8), fresh=True),
    Case("fresh_and_old_rows", (5, 9, 12, 20), "constant", fresh="rows"),
    Case("odd_sizes", (3, 13, 7, 33), "mixed"),
    Case("reset_in_the_middle", (2, 21, 16, 16), "reset"),
    Case("silent_tokens", (2, 32, 16, 24), "constant", silent=0.4),
    Case("all_silent", (2, 5, 8, 8), "constant", silent=1.0),
    Case("tiny_decay", (1, 64, 8, 8), "tiny"),
    Case("long", (1, 257, 24, 40), "constant"),
    Case("wide", (2, 65, 96, 192), "constant"),
)

# All inputs fit into float16, which ends at 65504. Most outputs do not, and are up to 400 000.
BEYOND_HALF = Case("beyond_half", (2, 64, 16, 24), scale=3000.0)
