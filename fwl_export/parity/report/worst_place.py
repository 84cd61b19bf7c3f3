"""Find the text around the place where a candidate is worst, from the planned calls.

The worst place is where a value is not finite, and otherwise where most of a budget is used.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from fwl_export.parity.compare import Place
from fwl_export.parity.drift import LOGITS
from fwl_export.parity.schedule import ScheduledCall
from fwl_export.parity.verdict import CandidateVerdict, RunVerdict

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
    """Where a candidate is not finite, or uses most of a budget.

    Attributes:
      case: Name of the case.
      mode: Mode of the run, "free" or "forced".
      tensor: Name of the tensor.
      tokens_read: Tokens the first row had read.
      use: Error divided by the budget; infinite if the place is not finite.
      place: Element with the largest difference. Of one that is not finite, only call and row are
        known.
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
    if verdict.not_finite and (found := _not_finite(verdict.not_finite, calls, decode)):
        return found
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


def _not_finite(
    run: RunVerdict,
    calls: Mapping[str, Iterable[ScheduledCall]],
    decode: Callable[[int], str] | None,
) -> WorstPlace | None:
    failure = run.not_finite
    if failure is None or failure.row is None:
        return None
    place = Place(failure.step, failure.tokens_read, (failure.row,), math.nan, math.nan)
    tokens, at = _around(calls[run.case], place, False, decode, failure.token_in_call)
    tensor, read = failure.tensor or LOGITS, failure.tokens_read
    return WorstPlace(run.case, run.mode, tensor, read, math.inf, place, tokens, at)


def _around(
    calls: Iterable[ScheduledCall],
    place: Place,
    is_logit: bool,
    decode: Callable[[int], str] | None,
    in_call: int | None = None,
) -> tuple[list[ContextToken], int]:
    """Return the tokens that the row read around a place, and the index of the place in them.

    Args:
      calls: Calls of the case.
      place: The place: its call and row, and for a logit its position in the row's text.
      is_logit: Whether it is a logit.
      decode: Function that returns the text of a token id, or None to leave texts empty.
      in_call: Index in the call of the token at the place; None means that of the logit, or the
        last token of the call.
    """
    row, position = place.index[0], -1
    read: list[ContextToken] = []
    for call in calls:
        if call.step <= place.step and row in call.reset:
            read = []
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
            if in_call is None:
                in_call = place.index[1] - int(call.positions[row]) if is_logit else length - 1
            position = len(read) - length + in_call
        if position >= 0 and len(read) > position + _AFTER:
            break
    position = max(position, 0)
    start = max(position - _BEFORE, 0)
    return read[start : position + _AFTER + 1], position - start
