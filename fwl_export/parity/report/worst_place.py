"""Where a candidate is worst: the tokens around, made again from the calls."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from fwl_export.parity.compare import Place
from fwl_export.parity.drift import LOGITS
from fwl_export.parity.schedule import ScheduledCall
from fwl_export.parity.verdict import CandidateVerdict

_BEFORE, _AFTER = 24, 8


@dataclass(frozen=True)
class ContextToken:
    """A token that a row read.

    Attributes:
      id: of it.
      text: of it; "" where there is no tokenizer.
      weight: how much was learned from it.
      in_call: whether the call in question brought it.
    """

    id: int
    text: str
    weight: float
    in_call: bool


@dataclass(frozen=True)
class WorstPlace:
    """Where a candidate uses most of its budget.

    Attributes:
      case, mode, tensor: where.
      tokens_read: tokens the first row had read.
      use: of the budget.
      place: of the largest difference there.
      tokens: what the row read around.
      at: which of them was read there; of a state tensor, the last of the call.
    """

    case: str
    mode: str
    tensor: str
    tokens_read: int
    use: float
    place: Place
    tokens: list[ContextToken]
    at: int


def worst_place(
    verdict: CandidateVerdict,
    calls: Mapping[str, Iterable[ScheduledCall]],
    decode: Callable[[int], str] | None = None,
) -> WorstPlace | None:
    """Return where a candidate is worst; None where nothing was compared.

    Args:
      verdict: of the candidate.
      calls: of every case, by its name.
      decode: text of a token id.
    """
    spot = verdict.closest
    if spot is None or (place := spot.measured.error.worst) is None:
        return None
    tokens, at = _around(calls[spot.run.case], place, spot.tensor.name == LOGITS, decode)
    return WorstPlace(
        spot.run.case,
        spot.run.mode,
        spot.tensor.name,
        spot.measured.tokens_read,
        spot.measured.use,
        place,
        tokens,
        at,
    )


def _around(
    calls: Iterable[ScheduledCall],
    place: Place,
    is_logit: bool,
    decode: Callable[[int], str] | None,
) -> tuple[list[ContextToken], int]:
    """Return tokens of the row around a place, and which of them was read there."""
    row, position = place.index[0], -1
    read: list[ContextToken] = []
    for call in calls:
        if call.step <= place.step and row in call.reset:
            read, first = [], int(call.positions[row])
        elif call.step == 0:
            first = 0
        length = int(call.lengths[row])
        read += [
            ContextToken(
                int(token),
                decode(int(token)) if decode else "",
                float(weight),
                call.step == place.step,
            )
            for token, weight in zip(
                call.ids[row, :length], call.weights[row, :length], strict=True
            )
        ]
        if call.step == place.step:
            last = int(call.positions[row]) + length - 1
            position = (place.index[1] if is_logit else last) - first
        if position >= 0 and len(read) > position + _AFTER:
            break
    position = max(position, 0)
    start = max(position - _BEFORE, 0)
    return read[start : position + _AFTER + 1], position - start
