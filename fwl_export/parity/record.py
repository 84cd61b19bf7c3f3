"""Record a trace: make the calls of a check in PyTorch in float64, and keep part of the results."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any, cast

import numpy as np

from fwl_export.bundle.manifest import Bundle
from fwl_export.bundle.state import Array
from fwl_export.errors import CheckError
from fwl_export.machine import installed_versions
from fwl_export.parity.candidates import REFERENCE
from fwl_export.parity.cases import (
    AGAIN,
    CASES,
    Case,
    ModelLimits,
    cases_with_rows,
    choose_cases,
    plan_calls,
)
from fwl_export.parity.check import DEFAULT_TOKENS, model_horizon, torch_threads
from fwl_export.parity.drift import (
    FREE_RUNNING,
    Output,
    RunKey,
    measure_drift,
)
from fwl_export.parity.plan import STATES, free_memory
from fwl_export.parity.schedule import ROWS, ScheduledCall
from fwl_export.parity.trace import Norms, Trace, TracedCase, sampled, without_places
from fwl_export.runtimes import Session, open_session

# The same calls made twice say nothing about another runtime's results.
RECORDED_CASES = ",".join(case.name for case in CASES if case.name != AGAIN)

# Bytes of logits in a trace, for all cases together, and places of which every case has some.
_LOGIT_BYTES = 4 << 20
_FEWEST_PLACES = 2

_OWN = "PyTorch"
_PACKAGES = ("fwl-export", "numpy", "torch")


def record_trace(
    bundle: Bundle,
    ids: Array,
    tokens: int = DEFAULT_TOKENS,
    seed: int = 0,
    *,
    cases: str | Sequence[str | Case] = RECORDED_CASES,
    all_ids: bool = False,
    text: str = "",
    threads: int = 1,
    advance: Callable[[int], None] = lambda tokens: None,
) -> Trace:
    """Return a trace of a bundle's model, for `check_against`.

    Args:
      bundle: Bundle with its checkpoint, or one from `with_trusted_weights`.
      ids: Token ids of the text, [N] int64, with N of at least `tokens + 1`.
      tokens: Tokens of the text that the first row reads.
      seed: Seed of the calls.
      cases: Names of cases, or what `choose_cases` returned for this bundle.
      all_ids: Whether every token id is read, however many there are.
      text: Name of the text.
      threads: Threads of PyTorch.
      advance: Called with the number of tokens that the first row has moved on, in each case.

    Raises:
      BundleError, CheckpointError: The bundle or its checkpoint cannot be read.
      CheckError: PyTorch fails in the bundle's precision, so that there is no budget.
      ConfigError, TokenError: A name is unknown, or the text is too short.
    """
    manifest = bundle.manifest
    limits = ModelLimits.of_bundle(bundle)
    chosen = choose_cases(cases, tokens, limits, seed, all_ids)
    ids = ids[: ROWS * max(case.tokens for case in chosen) + 1]
    plan_calls(chosen, ids, limits, seed)  # refuses a text that is too short, before PyTorch loads
    with torch_threads(threads):
        precision = cast(Any, manifest.precision)
        right = open_session(bundle, "torch", precision="fp64")
        own = open_session(bundle, "torch", precision=precision)
        fitting = cases_with_rows(chosen, _most_rows(right), limits, seed)
        plans = plan_calls(fitting, ids, limits, seed)
        share = _LOGIT_BYTES // (8 * right.vocab_size * max(len(fitting), 1))
        traced = [
            _traced(case, list(plans[case.name]), right, own, share, advance) for case in fitting
        ]
    return Trace(
        model_id=manifest.model_id,
        config=manifest.config,
        precision=manifest.precision,
        max_tokens=manifest.max_tokens,
        state=manifest.state,
        horizon_tokens=model_horizon(bundle),
        text=text,
        tokens=tokens,
        seed=seed,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        versions=installed_versions(_PACKAGES),
        cases=traced,
    )


def _most_rows(session: Session) -> int:
    """Return how many rows of state fit into memory, of all copies that a recording needs."""
    free = free_memory()
    if free == math.inf:
        return max(case.rows for case in CASES)
    row = sum(spec.bytes_per_row for spec in session.specs)
    return max(int(free) // (STATES * row), 1)


def _traced(
    case: Case,
    calls: list[ScheduledCall],
    right: Session,
    own: Session,
    places: int,
    advance: Callable[[int], None],
) -> TracedCase:
    recorder = _Recorder(calls, max(places, _FEWEST_PLACES))
    drift = measure_drift(
        (REFERENCE, right.another(case.rows)),
        {_OWN: own.another(case.rows)},
        calls,
        modes=(FREE_RUNNING,),
        advance=advance,
        keep=recorder.add,
    )
    run = drift.runs[RunKey(_OWN, FREE_RUNNING)]
    if failure := drift.failure or run.failure:
        raise CheckError(
            f"nothing was recorded: {failure.runtime} failed in case '{case.name}', at call "
            f"{failure.step} (up to token {failure.tokens_read}): {failure.sentence}"
        )
    return recorder.finished(case, without_places(run))


class _Recorder:
    """Keeps what a trace holds of the reference's outputs in one case."""

    def __init__(self, calls: Sequence[ScheduledCall], places: int) -> None:
        """Choose the places whose logits are kept.

        Args:
          calls: Calls of the case.
          places: Number of places, spread evenly over all that are returned.
        """
        self._calls = calls
        found = [
            (number, row, int(place))
            for number, call in enumerate(calls)
            for row, (length, wanted) in enumerate(zip(call.lengths, call.wanted, strict=True))
            for place in np.flatnonzero(wanted < length)
        ]
        count = min(places, len(found))
        self._picks = [found[(2 * n + 1) * len(found) // (2 * count)] for n in range(count)]
        self._logits: list[Array] = []
        self._labels: list[int] = []
        self._norms: dict[str, list[Array]] = {}
        self._samples: dict[str, list[Array]] = {}
        self._since = Norms()

    def add(self, call: ScheduledCall, output: Output) -> None:
        """Keep what belongs into the trace of one call's output."""
        for number, row, place in self._picks:
            if number == call.step:
                self._logits.append(output.logits[row, place].astype(np.float64))
                self._labels.append(int(call.labels[row, call.wanted[row, place]]))
        self._since.add(call, output.logits, output.state)
        if not call.compare_state:
            return
        for name, norm in self._since.take().items():
            self._norms.setdefault(name, []).append(norm)
        is_last = call.step == len(self._calls) - 1
        for name, array in output.state.items():
            self._samples.setdefault(name, []).append(sampled(array, is_last))

    def finished(self, case: Case, own: Any) -> TracedCase:
        """Return the traced case.

        Args:
          case: The case.
          own: Measurements of PyTorch in the bundle's precision.
        """
        return TracedCase(
            case,
            self._calls,
            np.array(self._picks, np.int64).reshape(-1, 3),
            np.array(self._labels, np.int64),
            np.array(self._logits),
            {name: np.array(norms) for name, norms in self._norms.items()},
            self._samples,
            own,
        )
