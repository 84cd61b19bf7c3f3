"""How far a runtime may be from float64, and why: the table behind every verdict.

A runtime in a lower precision cannot agree with float64 exactly, and how far it is off depends on
the model and the text. So PyTorch in the same precision, on the same text in the same calls, is the
yardstick: its distance from float64 is what the precision costs. The budget of a tensor, that is
its largest allowed error, is a factor times that distance. There is one budget for the largest
absolute difference and one for the relative root mean square (RMS); both must be kept. In
free-running mode, the distance is the largest up to the comparison point. In teacher-forced mode,
errors cannot grow, and the distance is the largest of the whole run, because at a single point of a
small tensor it depends on chance.

PyTorch can also be right by chance, so a budget never falls below a floor, which counts roundings:
`floor` times the rounding error of a sum of some hundred terms in the precision, plus `per_token`
float32 roundings for every token that the fast weights remember. The second part is that of the
decay, a float32 number close to 1 that is applied once per token: its rounding error, at most
2^-25, adds up over the tokens of the horizon. Floors are relative to the RMS of the tensor. For
the largest difference they are three times as wide, because the largest of many roundings is.

KL divergence, top-1 agreement and perplexity follow from the logits. They are reported for the
reader and have no budgets of their own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fwl_export.errors import ConfigError
from fwl_export.parity.compare import Error

# Relative error of a sum of some hundred terms. In float32 every addition rounds; about four times
# the machine epsilon was measured. A float16 model sums in float32 and rounds the result once, and
# float32 tensors computed from it inherit that error.
ROUNDING = {"fp64": 4 * 2.0**-52, "fp32": 4 * 2.0**-23, "fp16": 2.0**-10}
# Under a precision policy: mix16 computes some products in float16; int8w computes in float32 with
# rounded weights, which the reference has too.
ROUNDING |= {"mix16": ROUNDING["fp16"], "int8w": ROUNDING["fp32"]}

_MAX_OVER_RMS = 3  # the largest of thousands of normal deviates is at 3 to 4 standard deviations
_DECAY_ROUNDING = 2.0**-25  # largest rounding error of a float32 number between 1/2 and 1


@dataclass(frozen=True)
class Tolerance:
    """How far the tensors of one kind may be from float64.

    Attributes:
      prefix: Prefix of the tensors' names. The first row of the table that matches applies.
      rms_factor: Budget of the relative RMS, as a multiple of PyTorch's own.
      max_factor: Budget of the largest difference, as a multiple of PyTorch's own. It is larger
        than `rms_factor`, because the largest of many roundings varies more than their mean.
      floor: Smallest budget, as a multiple of `ROUNDING`.
      per_token: Addition to the floor for each token remembered, in float32 roundings.
      reason: Reason for these numbers.
      max_abs: Fixed budget of the largest difference, or None to use factor and floor.
      relative_rms: Fixed budget of the relative RMS, or None to use factor and floor.
    """

    prefix: str
    rms_factor: float
    max_factor: float
    floor: float
    per_token: float
    reason: str
    max_abs: float | None = None
    relative_rms: float | None = None


TABLE = (
    Tolerance("position", 0, 0, 0, 0, "integers: a difference is a wrong count, not a rounding"),
    Tolerance("pending.valid", 0, 0, 0, 0, "copies of 0 or 1: nothing is rounded"),
    Tolerance(
        "logits",
        5,
        6,
        1,
        1,
        "the same roundings in another order: ONNX Runtime's error was 0.1 to 2.1 times PyTorch's; "
        "5 leaves room for small models and other instruction sets",
    ),
    Tolerance(
        "cache.",
        5,
        6,
        1,
        0,
        "thousands of elements, computed layer by layer without drift: ONNX Runtime's error was "
        "0.3 to 1.9 times PyTorch's, and more only in the first calls of a small model",
    ),
    Tolerance(
        "fast.",
        5,
        6,
        2,
        2,
        "sums over all tokens, in which systematic errors add up, most of all that of the decay, "
        "which can be small in PyTorch by chance; ONNX Runtime's error was 0.2 to 1.4 times "
        "PyTorch's, and 3.4 times after eight tokens",
    ),
    Tolerance("anchor.", 5, 6, 2, 2, "copies of the fast sums, without roundings of their own"),
    Tolerance(
        "pending.inv_std",
        5,
        6,
        5,
        0,
        "one number per row, too few to measure by: ONNX Runtime's error was 6 times PyTorch's in "
        "single calls and in rows that are reset often; so the floor decides, with the roundings "
        "of two sums, the first of which is squared, and of a difference from the mean",
    ),
    Tolerance(
        "pending.",
        5,
        6,
        1,
        0,
        "values of one token per row, whose elements share their errors: ONNX Runtime's error was "
        "0.1 to 2.2 times PyTorch's",
    ),
)


@dataclass(frozen=True)
class Budget:
    """Largest allowed error of a tensor at one comparison point.

    Attributes:
      max_abs: Largest allowed absolute difference.
      relative_rms: Largest allowed RMS of the difference, divided by the RMS of the reference.
      floor: Relative error that roundings alone explain.
    """

    max_abs: float
    relative_rms: float
    floor: float = 0.0

    def use(self, error: Error) -> float:
        """Return the error divided by the budget; more than 1 is outside."""
        return max(
            _share(error.max_abs, self.max_abs), _share(error.relative_rms, self.relative_rms)
        )


def tolerance_for(name: str, table: Sequence[Tolerance] = TABLE) -> Tolerance:
    """Return the row of the table that applies to a tensor.

    Args:
      name: Name of a state tensor, or "logits".
      table: Rows to search, in order.

    Raises:
      KeyError: No row of the table matches.
    """
    for row in table:
        if name.startswith(row.prefix):
            return row
    raise KeyError(f"no tolerance for '{name}': give it a row in {__name__}.TABLE")


def changed_table(changes: Mapping[str, Any], strict: bool = False) -> tuple[Tolerance, ...]:
    """Return the table with a user's rows added; the longest matching prefix applies.

    Args:
      changes: Changed keys of a `Tolerance`, by prefix of the tensors' names.
      strict: Whether to halve every budget of the table before the changes.

    Raises:
      ConfigError: A prefix matches no row, or a key or value does not belong to a tolerance.
    """
    table = tuple(_half(row) for row in TABLE) if strict else TABLE
    if not isinstance(changes, Mapping):
        raise ConfigError(
            f"tolerances are a {type(changes).__name__}; expected an object whose keys are "
            "prefixes of tensor names"
        )
    rows = []
    for prefix, change in changes.items():
        base = next((r for r in table if prefix.startswith(r.prefix)), None)
        if base is None:
            known = ", ".join(row.prefix for row in TABLE)
            raise ConfigError(
                f"tolerances: no tensor name begins with '{prefix}'; expected one of {known}"
            )
        rows.append(_changed(base, prefix, change))
    return tuple(sorted((*rows, *table), key=lambda row: -len(row.prefix)))


_NUMBERS = ("rms_factor", "max_factor", "floor", "per_token", "max_abs", "relative_rms")


def _changed(base: Tolerance, prefix: str, change: Any) -> Tolerance:
    if not isinstance(change, Mapping) or not change.keys() <= {*_NUMBERS, "reason"}:
        raise ConfigError(
            f"tolerances: '{prefix}' is {change!r}; expected an object with keys among "
            f"{', '.join(_NUMBERS)} and reason"
        )
    for key, value in change.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if key in _NUMBERS and not (number and 0 <= value < math.inf):
            raise ConfigError(
                f"tolerances: '{prefix}': {key} is {value!r}; expected a number of 0 or more"
            )
    reason = str(change.get("reason", "given by the user"))
    return replace(base, **{**change, "prefix": prefix, "reason": reason})


def _half(row: Tolerance) -> Tolerance:
    halves = {key: getattr(row, key) / 2 for key in _NUMBERS[:4]}
    return replace(row, **halves)


def budgets(
    tolerance: Tolerance,
    own: Sequence[Error],
    tokens_read: Sequence[int],
    precision: str,
    horizon_tokens: float,
) -> list[Budget]:
    """Return the budget of a tensor at each comparison point.

    Args:
      tolerance: Row of the table that applies to the tensor.
      own: Distance of PyTorch in the candidate's precision from float64, at each point.
      tokens_read: Tokens the first row had read, at each point.
      precision: Precision of the candidate, a key of `ROUNDING`.
      horizon_tokens: Tokens over which the fast weights remember (the horizon); 0 if they never
        forget, because their decay is then exactly 1.
    """
    result = []
    max_abs = relative_rms = 0.0
    for error, read in zip(own, tokens_read, strict=True):
        max_abs = max(max_abs, error.max_abs)
        relative_rms = max(relative_rms, error.relative_rms)
        decay = tolerance.per_token * _DECAY_ROUNDING * min(read, horizon_tokens)
        floor = tolerance.floor * ROUNDING[precision] + decay
        result.append(
            Budget(
                max(tolerance.max_factor * max_abs, _MAX_OVER_RMS * floor * error.scale)
                if tolerance.max_abs is None
                else tolerance.max_abs,
                max(tolerance.rms_factor * relative_rms, floor)
                if tolerance.relative_rms is None
                else tolerance.relative_rms,
                floor,
            )
        )
    return result


def _share(value: float, budget: float) -> float:
    if value == 0:
        return 0.0
    return value / budget if budget > 0 else float("inf")
