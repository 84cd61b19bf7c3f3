"""Faults of a runtime: wrappers of its runner that do something wrong in some uses only."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from fwl_export.bisect.runners import ForwardingRunner
from fwl_export.bundle.manifest import Bundle
from fwl_export.bundle.state import State
from fwl_export.plugins import ONNXRUNTIME, find_plugin
from fwl_export.runtimes import onnxruntime
from fwl_export.runtimes.base import Array, Call, Loaded, Runner
from fwl_export.runtimes.registry import Options


@dataclass
class Made:
    """One call that a runner has made; a fault changes `logits` and `after`.

    Attributes:
      call: Inputs of the call.
      before: State before it.
      logits: Logits that it returned, [B, P, V].
      after: State after it.
      number: Number of the call in its session, from 1.
      memory: What a fault remembers from call to call of a session.
    """

    call: Call
    before: State
    logits: Array
    after: State
    number: int
    memory: dict[str, Any]

    @property
    def tokens(self) -> int:
        return self.call.input_ids.shape[1]

    @property
    def rows(self) -> int:
        return len(self.call.lengths)


Change = Callable[[Made], None]
Before = Callable[[Call, dict[str, Any]], Call]
Write = Callable[[list[int], State, State], tuple[list[int], State]]


@dataclass(frozen=True)
class SessionFault:
    """What a runtime does wrong.

    Attributes:
      after: Changes what a call returned.
      before: Returns the call to make in place of another; takes what the fault remembers, too.
      write: Returns rows and state to write in place of others; takes the state of all rows, too.
      applies: Whether a session that was opened with some options has the fault.
      shared: Whether all sessions of a loaded model remember the same.
    """

    after: Change | None = None
    before: Before | None = None
    write: Write | None = None
    applies: Callable[[Options], bool] = lambda options: True
    shared: bool = False

    @contextlib.contextmanager
    def planted(self) -> Iterator[None]:
        """Give the fault to every session that runtime "onnxruntime" opens in this block."""
        load = onnxruntime.load

        def faulty(bundle: Bundle, options: Options) -> Loaded:
            loaded = load(bundle, options)
            if not self.applies(options):
                return loaded
            return replace(loaded, runner=FaultyRunner(loaded.runner, self))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(onnxruntime, "load", faulty)
            yield


class FaultyRunner(ForwardingRunner):
    """Runs calls with a fault."""

    def __init__(
        self, runner: Runner, fault: SessionFault, memory: dict[str, Any] | None = None
    ) -> None:
        super().__init__(runner)
        self._fault = fault
        self._memory: dict[str, Any] = {} if memory is None else memory
        self._calls = 0
        self._current: Any = None  # the buffers that hold the session's state
        self._batch = 0

    def another(self) -> Runner:
        memory = self._memory if self._fault.shared else None
        return FaultyRunner(self._runner.another(), self._fault, memory)

    def new_buffers(self, batch: int) -> Any:
        buffers = self._runner.new_buffers(batch)
        self._batch = batch
        self._current = buffers if self._current is None else self._current
        return buffers

    def run(self, call: Call, past: Any, present: Any) -> Array:
        self._calls += 1
        self._current = present
        made = call if self._fault.before is None else self._fault.before(call, self._memory)
        if self._fault.after is None:
            return self._runner.run(made, past, present)
        rows = range(len(call.lengths))
        before = self._runner.read(past, rows)
        logits = self._runner.run(made, past, present)
        after = self._runner.read(present, rows)
        result = Made(call, before, logits, after, self._calls, self._memory)
        self._fault.after(result)
        self._runner.write(present, result.after, rows)
        return result.logits

    def write(self, buffers: Any, state: Mapping[str, Array], rows: Sequence[int]) -> None:
        chosen, values = list(rows), dict(state)
        if self._fault.write is not None:
            old = self._runner.read(self._current, range(self._batch))
            chosen, values = self._fault.write(chosen, values, old)
        self._current = buffers
        self._runner.write(buffers, values, chosen)


def is_reset(state: State) -> bool:
    """Whether a state that is written is that of fresh rows."""
    return not any(array.any() for array in state.values())


def keeps(*prefixes: str, fresh: bool = True) -> Write:
    """Leave tensors as they are when rows are written.

    Args:
      prefixes: Beginnings of the tensors' names.
      fresh: Whether that happens when rows are reset; if not, when they take another state.
    """

    def write(rows: list[int], state: State, old: State) -> tuple[list[int], State]:
        if is_reset(state) != fresh:
            return rows, state
        return rows, {n: old[n][rows] if n.startswith(prefixes) else a for n, a in state.items()}

    return write


def resets_another_row(rows: list[int], state: State, old: State) -> tuple[list[int], State]:
    batch = len(old["position"])
    if not is_reset(state) or len(rows) == batch:
        return rows, state
    return [(row + 1) % batch for row in rows], state


def writes_in_reverse(rows: list[int], state: State, old: State) -> tuple[list[int], State]:
    """Rows that are written together change places."""
    return rows[::-1] if not is_reset(state) else rows, state


def adds(tensor: str, condition: Callable[[Made], Any], share: float = 0.02) -> Change:
    """Scale a tensor of the state, or the logits, where a condition of the call or a row holds."""

    def change(made: Made) -> None:
        rows = np.broadcast_to(np.asarray(condition(made)), (made.rows,))
        array = made.logits if tensor == "logits" else made.after[tensor]
        array[rows] = array[rows] * (1 + share)

    return change


def takes_back(prefix: str, condition: Callable[[Made], Any]) -> Change:
    """Leave tensors of the state as they were before the call where a condition holds."""

    def change(made: Made) -> None:
        rows = np.broadcast_to(np.asarray(condition(made)), (made.rows,))
        for name in made.after:
            if name.startswith(prefix):
                made.after[name][rows] = made.before[name][rows]

    return change


def last_position(shift: int) -> Before:
    """In calls that want one logit per row, return that `shift` places before the right one."""

    def change(call: Call, memory: dict[str, Any]) -> Call:
        if call.logit_positions.shape[1] == call.input_ids.shape[1]:
            return call
        return replace(call, logit_positions=np.maximum(call.logit_positions - shift, 0))

    return change


def last_of_the_longest(call: Call, memory: dict[str, Any]) -> Call:
    """Where one logit per row is wanted, take that of the last column, in padded rows too."""
    if call.logit_positions.shape[1] == call.input_ids.shape[1]:
        return call
    last = np.full_like(call.logit_positions, call.input_ids.shape[1] - 1)
    return replace(call, logit_positions=last)


def of_the_last_call(name: str, when: str = "input_ids") -> Before:
    """Read an input of the previous call again as long as the shape of `when` stays."""

    def change(call: Call, memory: dict[str, Any]) -> Call:
        kept = memory.get(name)
        if kept is None or getattr(call, when).shape != memory["shape"]:
            memory[name], memory["shape"] = getattr(call, name).copy(), getattr(call, when).shape
            return call
        return replace(call, **{name: kept})

    return change


def changed_input(name: str, change: Callable[[Array, Call], Array]) -> Before:
    """Change an input of every call."""
    return lambda call, memory: replace(call, **{name: change(getattr(call, name), call)})


def stale_logits(made: Made) -> None:
    """When T shrinks, the last logits of the last row are those of the call before."""
    last = made.memory.get("logits")
    if last is not None and last.shape[1] > made.logits.shape[1] and len(last) == made.rows:
        made.logits[-1, -1] = last[-1, made.logits.shape[1] - 1]
    made.memory["logits"] = made.logits.copy()


def one_array_of_logits(made: Made) -> None:
    """Return logits of one shape in one array, which the next such call overwrites."""
    kept = made.memory.setdefault(made.logits.shape, made.logits)
    kept[:] = made.logits
    made.logits = kept


def noise(every: int) -> Change:
    """Every so many calls, add noise that differs from run to run."""

    def change(made: Made) -> None:
        if made.number % every == 0:
            scale = 1e-3 * float(np.abs(made.logits).max())
            made.logits += np.random.default_rng().normal(0, scale, made.logits.shape).astype("f")

    return change


def spare_rows_of_length_0(made: Made) -> None:
    """Rows of length 0 keep what the buffer held two calls ago."""
    still = made.call.lengths == 0
    older = made.memory.get("older")
    made.memory["older"] = made.memory.get("old")
    made.memory["old"] = {name: array.copy() for name, array in made.after.items()}
    if older is not None and len(older["position"]) == made.rows:
        for name in ("fast.up.bias", "pending.hidden"):
            made.after[name][still] = older[name][still]


def leaks(tensor: str, least_rows: int, share: float) -> Change:
    """Add a share of each row's state to the next row, in batches of `least_rows` and more.

    Args:
      tensor: Name of the tensor, or the beginning of the names of several.
      least_rows: Smallest batch in which that happens.
      share: Share of the row before that is added.
    """

    def change(made: Made) -> None:
        if made.rows < least_rows:
            return
        for name, array in made.after.items():
            if name.startswith(tensor) and array.dtype.kind == "f":
                array[1:] += share * array[:-1].copy()

    return change


def rounds(prefix: str, dtype: str, after: int) -> Change:
    """Round tensors of the state to another dtype in rows that have read `after` tokens."""

    def change(made: Made) -> None:
        late = made.after["position"] > after
        for name, array in made.after.items():
            if name.startswith(prefix):
                array[late] = array[late].astype(dtype)

    return change


def of_another_session(made: Made) -> None:
    """Mix the last tokens' hidden state of all sessions of a loaded model."""
    last = made.memory.get("hidden")
    made.memory["hidden"] = made.after["pending.hidden"][:1].copy()
    if last is not None and made.number > 3:
        made.after["pending.hidden"][:1] = last


def has_plugin(options: Options) -> bool:
    return find_plugin(ONNXRUNTIME, options.plugin) is not None
