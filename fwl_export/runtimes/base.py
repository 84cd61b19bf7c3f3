"""The interface that every runtime implements, and the inputs of one call of the model."""

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
    """The inputs of one call of the model, other than the state (see `state.INPUTS`).

    All arrays are C-contiguous.

    Attributes:
      input_ids: [B, T] int64 token ids.
      label_weights: [B, T] float32: how much to learn from each token.
      lengths: [B] int64: tokens of each row that are not padding, 0 to T.
      logit_positions: [B, P] int64: positions in this call whose logits are returned.
      learning_rate_scale: [B] float32: factor of the model's step sizes.
    """

    input_ids: npt.NDArray[np.int64]
    label_weights: npt.NDArray[np.float32]
    lengths: npt.NDArray[np.int64]
    logit_positions: npt.NDArray[np.int64]
    learning_rate_scale: npt.NDArray[np.float32]


class Runner(Protocol):
    """Runs the model for one session.

    A runner keeps state in buffers: memory of the runtime's own kind that holds the state of all
    rows of a batch. A call reads one set of buffers and writes another, so that the session can
    discard the result of a call that failed.
    """

    def another(self) -> Runner:
        """Return a runner for another session that shares the loaded model."""

    def new_buffers(self, batch: int) -> Any:
        """Return buffers for `batch` rows in the fresh state, all zeros."""

    def run(self, call: Call, past: Any, present: Any) -> Array:
        """Compute one call of the model.

        Args:
          call: The inputs. If the object is the one of the previous call, only the values of
            `input_ids` may have changed since, and a runner may rely on that.
          past: Buffers with the state before the call; read only.
          present: Other buffers, whose content is replaced by the state after the call.

        Returns:
          Logits [B, P, V]; at padding their values are undefined.
        """

    def read(self, buffers: Any, rows: Rows) -> State:
        """Return the state of some rows as arrays [len(rows), ...] by name.

        For a sequence of row numbers these are copies. For a slice, they may alias the buffers'
        own memory, which later calls overwrite.
        """

    def write(self, buffers: Any, state: Mapping[str, Array], rows: Sequence[int]) -> None:
        """Copy arrays [len(rows), ...] by name into rows of buffers."""

    def release(self, buffers: Any) -> None:
        """Drop what is kept for buffers that no call will use again."""


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
    """Return an index that copies rows of an array, or a slice, which does not copy."""
    return rows if isinstance(rows, slice) else list(rows)


def parse_device(device: str) -> tuple[str, int]:
    """Return kind and number of a device: "cuda:1" -> ("cuda", 1), "cpu" -> ("cpu", 0).

    Raises:
      ConfigError: The text does not name a device.
    """
    found = re.fullmatch(r"(cpu|cuda)(?::(\d+))?", device)
    if found is None:
        raise ConfigError(
            f"device is '{device}'; expected cpu, cuda, or a numbered GPU such as cuda:1"
        )
    return found[1], int(found[2] or 0)
