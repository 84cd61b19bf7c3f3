"""Say where a call of the model left the range of its numbers, and what to do about it.

A session refuses a call whose logits are NaN or infinite. The functions here run only then: they
make the call again from the state before it, which is as it was, to name the first token after
which something is not finite, and what.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fwl_export.bundle.state import Array, State, TensorSpec
from fwl_export.errors import NotFiniteError
from fwl_export.runtimes.base import Call, Runner
from fwl_export.runtimes.limits import learned

_log = logging.getLogger(__name__)

LOGITS = "logits"

# Logits that are computed at a time in the search, 64 MB.
_LOGITS_AT_ONCE = 1 << 24

HALF_PRECISIONS = ("fp16", "mix16")  # bundles some of whose numbers are float16
_LARGEST_HALF = 65504


@dataclass(frozen=True)
class FailedCall:
    """A call of the model whose logits are not finite.

    Attributes:
      runner: Runner that made it.
      call: The call.
      past: Buffers with the state before it.
      present: Other buffers, whose content may be replaced.
      specs: Specs of the state's tensors.
      precision: Precision of the model, or "" if it is not known.
      done: Tokens that each row had read in earlier parts of the user's call, [B].
      positions: Tokens that each row had read before the user's call, [B].
    """

    runner: Runner
    call: Call
    past: Any
    present: Any
    specs: Sequence[TensorSpec]
    precision: str
    done: Sequence[int]
    positions: Sequence[int]

    def error(self, logits: Array) -> NotFiniteError:
        """Return the error that names the row, the token and the cause.

        Args:
          logits: What the call returned, [B, P, V], with finite values at padding.
        """
        wrong = np.argwhere(~np.isfinite(logits).all(-1))
        places = [(int(self.call.logit_positions[r, p]), int(r)) for r, p in wrong]
        token, row = min(places)
        after: State = {}
        try:
            token, row = self._first(token) or (token, row)
            after = self._state_after(row, token)
        except Exception:  # whatever happens in the search, the call's own failure is what counts
            _log.debug("the search for the first token that is not finite failed", exc_info=True)
        before = _not_finite(self.runner.read(self.past, [row]))
        tensor = before or _not_finite(after) or LOGITS
        in_call = token + self.done[row]
        position = self.positions[row] + in_call
        token_id = int(self.call.input_ids[row, token])
        norm = learned(self.specs, after or self.runner.read(self.past, [row])).norms[0]
        cause = _cause(tensor, bool(before), norm)
        message = (
            f"the model's output is not finite at row {row}, position {in_call} of this call "
            f"(token id {token_id}, position {position} of the row's text): "
            f"{cause}. No row has moved: "
            f"{self._way_out(bool(before))}"
        )
        return NotFiniteError(message, row, in_call, position, tensor, cause)

    def _first(self, known: int) -> tuple[int, int] | None:
        """Return the first token after which logits are not finite, and its row; None if none is.

        Args:
          known: A token after which they are not.
        """
        batch, size = self.call.input_ids.shape
        vocabulary = self._run(self.call, [known]).shape[-1]
        step = max(min(_LOGITS_AT_ONCE // (batch * vocabulary), size), 1)
        for start in range(0, known + 1, step):
            places = np.arange(start, min(start + step, known + 1))
            real = places < self.call.lengths[:, None]
            wrong = real & ~np.isfinite(self._run(self.call, places.tolist())).all(-1)
            if wrong.any():
                token, row = np.argwhere(wrong.T)[0]
                return int(places[token]), int(row)
        return None

    def _state_after(self, row: int, token: int) -> State:
        """Return the state of a row after one of its tokens, [1, ...] by name."""
        lengths = np.minimum(self.call.lengths, token + 1)
        self._run(replace(self.call, lengths=lengths), [token])
        return self.runner.read(self.present, [row])

    def _run(self, call: Call, places: Sequence[int]) -> Array:
        """Make the call; returns the logits after some tokens of every row, [B, P, V]."""
        positions = np.tile(np.array(places, np.int64), (len(call.lengths), 1))
        return self.runner.run(replace(call, logit_positions=positions), self.past, self.present)

    def _way_out(self, was_wrong: bool) -> str:
        if was_wrong:
            return "reset this row, or put back an earlier state of it with write_rows"
        if self.precision in HALF_PRECISIONS:
            return (
                "read on without this text, read it with smaller label_weights or with "
                "clip_update_norm, or reset the row. The bundle computes in "
                f"{self.precision}, in which no float16 number is larger than {_LARGEST_HALF}; one "
                "in fp32 has room for it"
            )
        return (
            "reset the row, or feed it with smaller label_weights; clip_update_norm limits what a "
            "row learns"
        )


def _cause(tensor: str, was_wrong: bool, norm: float) -> str:
    if was_wrong:
        return f"state '{tensor}' of the row was not finite before this call"
    size = f"what the row has learned by then has the norm {norm:.4g}"
    if tensor == LOGITS:
        return f"the state is finite, but the logits are not; {size}"
    return f"state '{tensor}' is not finite after it; {size}"


def _not_finite(state: State) -> str:
    """Return the name of the first tensor that is not finite, or ""."""
    wrong = (n for n, a in state.items() if a.dtype.kind == "f" and not np.isfinite(a).all())
    return next(wrong, "")
