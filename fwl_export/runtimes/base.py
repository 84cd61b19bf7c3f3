"""What a runtime implements, and what one call of the model takes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from fwl_export.bundle.state import Array, State, TensorSpec
from fwl_export.errors import ConfigError

Rows = Sequence[int] | slice


@dataclass(frozen=True)
class Call:
    """The inputs of one call of the model, beside the state (`state.INPUTS`), as contiguous arrays.

    Attributes:
      input_ids: [B, T] int64.
      label_weights: [B, T] float32.
      lengths: [B] int64.
      logit_positions: [B, P] int64, the positions in the call whose logits are wanted.
      learning_rate_scale: [B] float32, times the model's step sizes.
    """

    input_ids: npt.NDArray[np.int64]
    label_weights: npt.NDArray[np.float32]
    lengths: npt.NDArray[np.int64]
    logit_positions: npt.NDArray[np.int64]
    learning_rate_scale: npt.NDArray[np.float32]


class Runner(Protocol):
    """One session's way to the model: calls from one set of buffers to another.

    Buffers are the runtime's own kind of memory for the state of all rows.
    """

    def another(self) -> Runner:
        """Return a runner of the same loaded model, for another session."""

    def new_buffers(self, batch: int) -> Any:
        """Return buffers for `batch` fresh rows."""

    def run(self, call: Call, past: Any, present: Any) -> Array:
        """Read `past`, overwrite `present` (never the same buffers), return logits [B, P, V].

        A call that comes again, the same object, may have other `input_ids` and nothing else.
        """

    def read(self, buffers: Any, rows: Rows) -> State:
        """Copy rows of buffers to arrays by name.

        Of a slice the arrays may be the buffers' own memory, which later calls overwrite.
        """

    def write(self, buffers: Any, state: Mapping[str, Array], rows: Sequence[int]) -> None:
        """Copy arrays by name into rows of buffers."""

    def release(self, buffers: Any) -> None:
        """Forget buffers that no call will use again."""


@dataclass(frozen=True)
class Loaded:
    """A model in a runtime, ready for sessions.

    Attributes:
      runner: Runner of the first session; other sessions use `runner.another()`.
      state: Specs of the state's tensors, in the model's order.
      max_tokens: Largest T of one call.
    """

    runner: Runner
    state: Sequence[TensorSpec]
    max_tokens: int


def index(rows: Rows) -> list[int] | slice:
    """Return what picks rows of an array: copied, but for a slice."""
    return rows if isinstance(rows, slice) else list(rows)


def parse_device(device: str) -> tuple[str, int]:
    """Return kind and number of a device such as "cpu", "cuda" or "cuda:1".

    Raises:
      ConfigError: it is none.
    """
    found = re.fullmatch(r"(cpu|cuda)(?::(\d+))?", device)
    if found is None:
        raise ConfigError(f"device is '{device}'; expected cpu, cuda or, say, cuda:1")
    return found[1], int(found[2] or 0)
