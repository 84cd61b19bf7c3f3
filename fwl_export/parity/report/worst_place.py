"""Find the text around the place where a candidate is worst, from the planned calls."""

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
      id: Token id.
      text: Text of the token, or "" without a tokenizer.
      weight: Label weight: how much the model learned from the token.
      in_call: Whether the row read it in the call of the worst place.
    """

    id: int
    text: str
    weight: float
    in_call: bool


@dataclass(frozen=True)
class WorstPlace:
    """Where a candidate uses most of a budget.

    Attributes:
      case: Name of the case.
      mode: Mode of the run, "free" or "forced".
      tensor: Name of the tensor.
      tokens_read: Tokens the first row had read.
      use: Error divided by the budget.
      place: Element with the largest difference.
      tokens: Tokens that its row read before and after.
      at: Index in `tokens` of the token at that place; for a state tensor, the call's last token.
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
    """Return where a candidate is worst, or None if nothing was compared.

    Args:
      verdict: Verdict on the candidate.
      calls: Calls of each case, by the case's name.
      decode: Function that returns the text of a token id, or None to leave texts empty.
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
    """Return the tokens that the row read around a place, and the index of the place in them."""
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
