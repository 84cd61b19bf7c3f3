"""Runners that wrap another runner."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fwl_export.bundle.state import Array, State
from fwl_export.runtimes.base import Call, Rows, Runner


class ForwardingRunner:
    """Forwards everything to another runner. Subclasses override what they change or record.

    A subclass whose `__init__` takes more than the runner also overrides `another`.
    """

    def __init__(self, runner: Runner) -> None:
        self._runner = runner

    def another(self) -> Runner:
        """Wrap another runner of the same loaded model."""
        return type(self)(self._runner.another())

    def new_buffers(self, batch: int) -> Any:
        """See `Runner.new_buffers`."""
        return self._runner.new_buffers(batch)

    def run(self, call: Call, past: Any, present: Any) -> Array:
        """See `Runner.run`."""
        return self._runner.run(call, past, present)

    def read(self, buffers: Any, rows: Rows) -> State:
        """See `Runner.read`."""
        return self._runner.read(buffers, rows)

    def write(self, buffers: Any, state: Mapping[str, Array], rows: Sequence[int]) -> None:
        """See `Runner.write`."""
        self._runner.write(buffers, state, rows)

    def release(self, buffers: Any) -> None:
        """See `Runner.release`."""
        self._runner.release(buffers)


class Recorder(ForwardingRunner):
    """Keeps what each call took and returned.

    Attributes:
      calls: One entry per call: the call, the state before it, its logits, the state after it.
    """

    def __init__(self, runner: Runner) -> None:
        """Start with no calls recorded."""
        super().__init__(runner)
        self.calls: list[tuple[Call, State, Array, State]] = []

    def run(self, call: Call, past: Any, present: Any) -> Array:
        """Run the call and record it."""
        rows = range(len(call.lengths))
        before = self.read(past, rows)
        logits = super().run(call, past, present)
        self.calls.append((call, before, logits, self.read(present, rows)))
        return logits
