"""Limits on what a session learns, and the norms of what its rows have learned.

Text alone does no lasting harm, but weights can: a token's gradient is multiplied by its label
weight and by the row's learning-rate scale, and one token with a factor of 10 000 spoils the
predictions of thousands of tokens. docs/concepts/limits.md has the measurements.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fwl_export.bundle.defaults import DEFAULT_MAX_LEARNING_WEIGHT
from fwl_export.bundle.state import Array, State, TensorSpec
from fwl_export.errors import (
    ConfigError,
    NotFiniteError,
    StateError,
    TokenError,
    UpdateNormError,
)

# Tokens of a row between two places where what it has learned is clipped. Calls are split there, as
# at anchors, so that the logits do not depend on how a text is split into calls.
CLIP_INTERVAL = 32

FAST = "fast."  # what the names of the sums of gradients begin with


@dataclass(frozen=True)
class LearningLimits:
    """How much a session may learn.

    Attributes:
      max_learning_weight: Largest product of a token's label weight and its row's learning-rate
        scale, and largest scale; more than 0. Infinity means no limit.
      max_update_norm: Largest norm of what a row has learned, see `Learned.norms`; more than 0.
        Infinity means no limit, and then the norms are not computed.
      clip_update_norm: Norm to which what a row has learned is scaled down, if it is larger, at
        every position of the row that `CLIP_INTERVAL` divides; more than 0. Infinity means that
        nothing is clipped.
    """

    max_learning_weight: float = DEFAULT_MAX_LEARNING_WEIGHT
    max_update_norm: float = math.inf
    clip_update_norm: float = math.inf

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            number = isinstance(value, numbers.Real) and not isinstance(value, bool)
            if not (number and value > 0):
                raise ConfigError(
                    f"{name} is {value!r}; expected a number above 0, or math.inf for no limit"
                )


@dataclass(frozen=True)
class Learned:
    """How much the rows of a session have learned.

    The norms are those of the sums of gradients in the state, which the model multiplies by its
    step sizes and adds to the trained weights. So they have no unit, and compare texts and rows of
    one model, not models. A fresh row has 0, and what is forgotten makes them smaller. All values
    are plain numbers, so `json.dumps(dataclasses.asdict(learned))` works.

    Attributes:
      norms: Norm over all fast weights together, one number per row: the root of the sum of the
        squares of `tensors`. `max_update_norm` limits it.
      tensors: Frobenius norm of each tensor, one number per row, by the tensor's name in the state,
        e.g. "fast.up.kernel".
    """

    norms: list[float]
    tensors: dict[str, list[float]]


def learned(specs: Sequence[TensorSpec], state: Mapping[str, Array]) -> Learned:
    """Return the norms of what the rows of a state have learned.

    Args:
      specs: Specs of the model's state.
      state: Arrays [B, ...] by name.
    """
    names = [spec.name for spec in specs if spec.name.startswith(FAST)]
    with np.errstate(over="ignore"):
        tensors = {name: [_norm(row) for row in state[name]] for name in names}
    rows = len(state[specs[0].name])
    return Learned([math.hypot(*(tensors[n][row] for n in names)) for row in range(rows)], tensors)


def clipped(
    specs: Sequence[TensorSpec], state: State, rows: Sequence[int], norm: float
) -> State | None:
    """Return the state of some rows, with what each has learned scaled down to a norm.

    Args:
      specs: Specs of the model's state.
      state: Copies of the rows' arrays [len(rows), ...] by name; those of `FAST` may be changed.
      rows: Numbers of the rows, for the message.
      norm: Largest norm that a row keeps, more than 0.

    Returns:
      The state, or None if no norm is larger.

    Raises:
      NotFiniteError: What a row has learned is not finite, so that it cannot be clipped.
    """
    found = learned(specs, state)
    for place, row in enumerate(rows):
        if not math.isfinite(found.norms[place]):
            raise NotFiniteError(
                f"what row {row} would have learned is not finite, so it cannot be clipped; no row "
                "has moved: read these tokens with smaller label_weights, or reset the row",
                row,
                tensor=next(n for n, t in found.tensors.items() if not math.isfinite(t[place])),
            )
    over = [place for place, size in enumerate(found.norms) if size > norm]
    for place in over:
        for name in found.tensors:
            state[name][place] *= np.float32(norm / found.norms[place])
    return state if over else None


def check_update(found: Learned, limit: float) -> None:
    """Check what rows would have learned after a call of the model.

    Raises:
      UpdateNormError: A norm exceeds the limit.
    """
    row = _first_over(found, limit)
    if row is not None:
        raise UpdateNormError(
            f"what row {row} would have learned has the norm {found.norms[row]:.6g}, but "
            f"max_update_norm is {limit:g}; no row has moved: read these tokens with smaller "
            "label_weights, or reset the row"
        )


def check_state(found: Learned, limit: float) -> None:
    """Check what the rows of a given state have learned.

    Raises:
      StateError: A norm exceeds the limit.
    """
    row = _first_over(found, limit)
    if row is not None:
        raise StateError(
            f"what row {row} of this state has learned has the norm {found.norms[row]:.6g}, but "
            f"max_update_norm is {limit:g}; use a state that has learned less, or open the session "
            "with a larger max_update_norm"
        )


def _first_over(found: Learned, limit: float) -> int | None:
    return next((row for row, norm in enumerate(found.norms) if not norm <= limit), None)


def check_weights(weights: Array, scale: Array, limit: float, ids: Array) -> None:
    """Check the products of label weights and learning-rate scales.

    Args:
      weights: [B, T] label weights, 0 at padding.
      scale: [B] learning-rate scales.
      limit: Largest product that is allowed.
      ids: [B, T] token ids, for the message.

    Raises:
      TokenError: A product exceeds the limit.
    """
    products, largest = weights * scale[:, None], _in_float32(limit)
    if products.max() <= largest:
        return
    row, column = np.argwhere(~(products <= largest))[0]
    raise TokenError(
        f"the label weight {weights[row, column]:g} of token id {ids[row, column]} (row {row}, "
        f"position {column}) times the row's learning_rate_scale {scale[row]:g} is "
        f"{products[row, column]:g}, but max_learning_weight is {limit:g}; use smaller weights, or "
        "open the session with a larger max_learning_weight"
    )


def check_scale(scale: Array, limit: float) -> None:
    """Check the learning-rate scales, [B], against the limit for a label weight of 1.

    Raises:
      ConfigError: A scale exceeds the limit.
    """
    if scale.max() > _in_float32(limit):
        row = int(scale.argmax())
        raise ConfigError(
            f"the learning_rate_scale of row {row} is {scale[row]:g}, but max_learning_weight is "
            f"{limit:g}; use a smaller scale, or open the session with a larger "
            "max_learning_weight"
        )


def _in_float32(limit: float) -> np.float32:
    """Round a limit as weights and scales are rounded, so that a weight of 0.1 is within 0.1."""
    with np.errstate(over="ignore"):
        return np.float32(limit)


def _norm(row: Array) -> float:
    values = row.reshape(-1)
    square = float(np.dot(values, values))  # ten times as fast as with a conversion to float64
    if not math.isfinite(square):  # it overflows float32
        wide = values.astype(np.float64)
        square = float(np.dot(wide, wide))
    return math.sqrt(square)
