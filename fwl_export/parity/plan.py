"""What a check of a large model tries within a time and a memory, decided before anything runs.

A check of a small model opens all runtimes side by side and makes every call. Where that takes more
memory than a check may use, runtimes *take turns*: the reference reads the calls once for each of
them, and no two are loaded at the same time. Where it takes longer than a check may take, cases end
earlier. Both follow from sizes alone, so the same bundle and options give the same calls on every
machine; what was left out is said in the report.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from fwl_export.bundle.manifest import CHECKPOINT_FOLDER, WEIGHTS_FILE, Bundle, Manifest
from fwl_export.bundle.state import Array
from fwl_export.machine import available_memory
from fwl_export.parity import cases as kinds
from fwl_export.parity.candidates import REFERENCE, Candidate, parse_candidate, parse_candidates
from fwl_export.parity.cases import Case, ModelLimits, cases_with_rows
from fwl_export.parity.schedule import FIRST_POINT, ScheduledCall
from fwl_export.runtimes import Session

DEFAULT_BUDGET = 110.0
"""Seconds that the calls of a check take, by the estimate below; opening runtimes comes on top."""

DEFAULT_MEMORY = 4e9
"""Bytes that a check uses at most, if the machine has them free."""

_SHARE_OF_MEMORY = 0.8  # of what is free

# Bytes, measured with a model of 135 M parameters and a vocabulary of 49 152, and rounded up.
_PROGRAMS = 0.5e9  # Python with PyTorch, transformers and ONNX Runtime
_REFERENCE, _OWN, _CANDIDATE = 8.0, 4.0, 6.5  # per parameter, of a loaded model
_PER_LOGIT = 44  # per token and entry of the vocabulary, during a call
# Copies of the state in float32 side by side: buffers and copies of the reference, in float64, and
# of PyTorch's own precision; then those of each candidate, in both modes.
STATES, _STATES_PER_CANDIDATE = 24, 8
# In turns the reference holds only the slots that are in use, except in case "far".
_STATES_IN_TURNS, _STATES_FAR = 4.6, 15.0

# Seconds on two cores of 2023: of a call and of a token, per parameter, in every turn; and of a
# call, per byte of a candidate's state.
_CALL, _TOKEN, _STATE = 1.5e-9, 0.8e-10, 1.2e-9

_SMALLEST_CALL = 16  # tokens: calls of all sizes up to this are made with any number of rows
_FEWEST_TOKENS = 2 * FIRST_POINT  # that a case is cut to

# Shares of the time; those of cases that need less go to the others.
_SHARES = {
    kinds.TEXT: 5.0,
    **{f"{kinds.MIXED}{rows}": 4.0 for rows in (1, 2, 5, 8)},
    kinds.REPEAT: 1.0,
    kinds.ENDLESS: 3.0,
    kinds.LONG: 2.0,
    kinds.DECODE: 2.0,
    kinds.FAR: 3.0,
    kinds.AGAIN: 3.0,
}


@dataclass(frozen=True)
class ModelSize:
    """What the memory and the time of a check depend on.

    Attributes:
      parameters: Number of parameters.
      state: Bytes of a row's state, in the bundle's types.
      vocab_size: Number of token ids.
    """

    parameters: int
    state: int
    vocab_size: int

    @classmethod
    def of(cls, manifest: Manifest) -> ModelSize:
        """Return the size of a bundle's model; without a checkpoint it counts as small."""
        weights = manifest.files.get(f"{CHECKPOINT_FOLDER}/{WEIGHTS_FILE}", {"bytes": 0})
        state = sum(spec.bytes_per_row for spec in manifest.state)
        return cls(int(weights["bytes"]) // 4, state, manifest.config.vocab_size)


@dataclass(frozen=True)
class Plan:
    """What a check tries.

    Attributes:
      cases: The cases, each with its rows and tokens.
      limits: Limits of the model.
      sizes: Largest T of a call by case, where that is less than the model's.
      in_turns: Whether runtimes take turns.
      turns: How often the calls are made.
      left_out: A sentence for everything that is left out of what was asked for.
    """

    cases: Sequence[Case]
    limits: ModelLimits
    sizes: Mapping[str, int] = field(default_factory=dict)
    in_turns: bool = False
    turns: int = 1
    left_out: Sequence[str] = ()

    @property
    def tokens(self) -> int:
        """Tokens that the first rows read in all cases and turns."""
        return self.turns * sum(case.tokens for case in self.cases)

    def calls(self, ids: Array, seed: int) -> dict[str, Iterable[ScheduledCall]]:
        """Return the calls of each case by its name; for arguments and errors see `Case.calls`."""
        return {
            case.name: case.calls(ids, _limited(self.limits, self.sizes, case), seed)
            for case in self.cases
        }


def plan_check(
    bundle: Bundle,
    chosen: Sequence[Case],
    limits: ModelLimits,
    seed: int,
    candidates: str | Sequence[str | Candidate] | Mapping[str, Session],
    reference: str = REFERENCE,
    budget: float | None = DEFAULT_BUDGET,
    memory: float | None = None,
) -> Plan:
    """Return the plan of a check.

    Args:
      bundle: Bundle to check.
      chosen: Cases that are asked for, as `choose_cases` returns them.
      limits: Limits of its model.
      seed: Seed of the calls.
      candidates: Candidates, see `check_bundle`.
      reference: Name of the reference.
      budget: Seconds that the calls may take; None means any time.
      memory: Bytes that the check may use. None means `DEFAULT_MEMORY`, or without a budget all
        that is free; less where less is free.
    """
    size = ModelSize.of(bundle.manifest)
    free = _memory(memory, budget)
    is_open = isinstance(candidates, Mapping)
    count = len(candidates if isinstance(candidates, Mapping) else parse_candidates(candidates))
    can_take_turns = not is_open and parse_candidate(reference).name == REFERENCE
    if can_take_turns and _together(size, chosen, count) > free:
        plan = replace(_in_turns(size, chosen, limits, seed, free), turns=count + 1)
    else:
        rows = _rows_together(size, free, count)
        plan = Plan(cases_with_rows(chosen, rows, limits, seed), limits)
    plan = replace(plan, left_out=_memory_notes(plan, chosen, free))
    return plan if budget is None else _in_time(plan, size, seed, count, budget)


def slots_in_use(calls: Iterable[ScheduledCall], rows: int) -> int:
    """Return the largest number of tokens that a row's state has read after any of the calls.

    Args:
      calls: The calls of a case.
      rows: Number of rows in the batch.
    """
    at, most = np.zeros(rows, np.int64), 0
    for call in calls:
        at = _positions_before(at, call) + call.lengths
        most = max(most, int(at.max()))
    return most


def _positions_before(at: Array, call: ScheduledCall) -> Array:
    before = at.copy()
    before[list(call.reset)] = 0
    for source, target in call.forks:
        before[target] = before[source]
    for row, position in call.moves:
        before[row] = position
    return before


def free_memory() -> float:
    """Return the bytes that a check may take of this machine's memory; infinite if not known."""
    available = available_memory()
    return math.inf if available is None else _SHARE_OF_MEMORY * available


def _memory(memory: float | None, budget: float | None) -> float:
    wanted = memory or (math.inf if budget is None else DEFAULT_MEMORY)
    return min(wanted, free_memory())


def _together(size: ModelSize, chosen: Sequence[Case], candidates: int) -> float:
    """Return the bytes that a check takes with all runtimes side by side."""
    rows = max(case.rows for case in chosen)
    return _models_together(size, candidates) + rows * _row_together(size, candidates)


def _models_together(size: ModelSize, candidates: int) -> float:
    models = _REFERENCE + _OWN + _CANDIDATE * (candidates + 1)  # one more in case "again"
    return _PROGRAMS + models * size.parameters


def _row_together(size: ModelSize, candidates: int) -> float:
    return (STATES + _STATES_PER_CANDIDATE * candidates) * size.state


def _rows_together(size: ModelSize, free: float, candidates: int) -> int:
    """Return how many rows fit into memory with all runtimes side by side; 1 or more."""
    if free == math.inf:
        return max(case.rows for case in kinds.CASES)
    left = free - _models_together(size, candidates)
    return max(int(left // max(_row_together(size, candidates), 1)), 1)


def _in_turns(
    size: ModelSize, chosen: Sequence[Case], limits: ModelLimits, seed: int, memory: float
) -> Plan:
    left = memory - _PROGRAMS - (_REFERENCE + _CANDIDATE) * size.parameters
    row, token = _STATES_IN_TURNS * size.state, _PER_LOGIT * size.vocab_size
    smallest = min(_SMALLEST_CALL, limits.max_tokens)
    rows = max(int(left // (row + smallest * token)), 1)
    cases, sizes = [], {}
    fitting = cases_with_rows(chosen, rows, limits, seed)
    for case in [_far_in_one_row(case, limits, seed) for case in fitting]:
        room = int((left - case.rows * row) // (case.rows * token))
        if room < limits.max_tokens:
            sizes[case.name] = max(1 << max(room.bit_length() - 1, 0), 1)
        cases.append(_cut(case, _limited(limits, sizes, case), seed))
    # Nothing may run after "again", which closes the runtime to open it with its own threads.
    cases.sort(key=lambda case: case.name == kinds.AGAIN)
    fits_far = left > _STATES_FAR * size.state
    cases = [case for case in cases if fits_far or case.name != kinds.FAR]
    return Plan(cases, limits, sizes, in_turns=True)


def _far_in_one_row(case: Case, limits: ModelLimits, seed: int) -> Case:
    return cases_with_rows([case], 1, limits, seed)[0] if case.name == kinds.FAR else case


def _cut(case: Case, limits: ModelLimits, seed: int) -> Case:
    """Return the case without tokens beyond those that its calls have with these limits."""
    if not case.name.startswith(kinds.MIXED):
        return case
    return replace(case, tokens=min(case.tokens, kinds.usual_tokens(case, limits, seed)))


def _limited(limits: ModelLimits, sizes: Mapping[str, int], case: Case) -> ModelLimits:
    return replace(limits, max_tokens=sizes.get(case.name, limits.max_tokens))


def _memory_notes(plan: Plan, chosen: Sequence[Case], memory: float) -> list[str]:
    """Return what the memory leaves out."""
    notes = []
    rows = max((case.rows for case in plan.cases), default=0)
    if any(case.rows > rows for case in chosen):
        notes.append(
            f"more than {rows} rows, whose states {memory / 1e9:.1f} GB of memory do not hold"
        )
    if any(case.name == kinds.FAR for case in chosen) and all(
        case.name != kinds.FAR for case in plan.cases
    ):
        notes.append("far positions, whose states the memory does not hold")
    if plan.sizes:
        notes.append(
            f"calls of more than {min(plan.sizes.values())} tokens in cases "
            f"{', '.join(plan.sizes)}, for memory"
        )
    return notes


def _in_time(plan: Plan, size: ModelSize, seed: int, candidates: int, budget: float) -> Plan:
    """Return the plan with cases that end earlier, if all together take longer than the budget."""
    costs = {case.name: _seconds(case, plan, size, seed, candidates) for case in plan.cases}
    if sum(costs.values()) <= budget:
        return plan
    shares = _shared(costs, budget)
    cases = []
    for case in plan.cases:
        shorter = case
        while shorter.tokens > _FEWEST_TOKENS and (
            _seconds(shorter, plan, size, seed, candidates) > shares[case.name]
        ):
            shorter = replace(case, tokens=max(int(0.8 * shorter.tokens), _FEWEST_TOKENS))
        cases.append(shorter)
    ended = [
        f"{after.name} after {after.tokens} of {before.tokens}"
        for before, after in zip(plan.cases, cases, strict=True)
        if after.tokens < before.tokens
    ]
    note = (
        f"the rest of {len(ended)} cases, for the time of {budget:.0f} s (tokens: "
        f"{', '.join(ended)}); --full reads all"
    )
    return replace(plan, cases=cases, left_out=[*plan.left_out, note])


def _shared(costs: Mapping[str, float], budget: float) -> dict[str, float]:
    """Return the seconds of each case: what it costs, or its share of what the others leave."""
    shares: dict[str, float] = {}
    left = dict(costs)
    while left:
        total = sum(_SHARES[name] for name in left)
        each = {name: budget * _SHARES[name] / total for name in left}
        cheap = [name for name in left if left[name] <= each[name]]
        if not cheap:
            return shares | each
        for name in cheap:
            shares[name] = left.pop(name)
            budget -= shares[name]
    return shares


def _seconds(case: Case, plan: Plan, size: ModelSize, seed: int, candidates: int) -> float:
    """Return the estimated time of a case."""
    limits = _limited(plan.limits, plan.sizes, case)
    total = 0.0
    for call in case.calls(np.zeros(case.tokens + 1, np.int64), limits, seed):
        per_turn = size.parameters * (_CALL + _TOKEN * call.ids.size)
        total += (candidates + 1) * per_turn + candidates * _STATE * size.state * case.rows
    # Case "again" makes its calls three times more, and opens every runtime once more.
    return 4 * total if case.name == kinds.AGAIN else total
