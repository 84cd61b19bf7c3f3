"""What an application does with a session: steps, and how far their results are from PyTorch's."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from fwl_export.bundle import state as states
from fwl_export.bundle.state import Array
from fwl_export.errors import NotFiniteError
from fwl_export.runtimes import Session

# A step acts on a session, draws from the generator, and appends the logits to the list.
Step = Callable[[Session, np.random.Generator, list[Array]], None]

_ROUNDING = 2.0**-23


@dataclass(frozen=True)
class Usage:
    """Steps of an application.

    Attributes:
      about: What it does, in words.
      batch: Number of rows.
      steps: Steps in order.
    """

    about: str
    batch: int
    steps: Sequence[Step]

    def results(self, session: Session) -> dict[str, Array]:
        """Return all logits in the order in which they were returned, and the final state."""
        fresh = session.another(self.batch)
        rng, logits = np.random.default_rng(0), list[Array]()
        for step in self.steps:
            step(fresh, rng, logits)
        return {f"logits {n}": array for n, array in enumerate(logits)} | fresh.state

    def shown(self, faulty: Session, right: Session, exact: Session) -> float:
        """Return the error of a faulty session as a multiple of the error of one without faults.

        Args:
          faulty: Session with a fault.
          right: The same without the fault.
          exact: PyTorch in float64.
        """
        usual, expected = self.results(right), self.results(exact)
        try:
            found = self.results(faulty)
        except NotFiniteError:  # as wrong as a result can be
            return math.inf
        ratios = [
            _distance(found[name], expected[name])
            / max(_distance(usual[name], expected[name]), _ROUNDING)
            for name in expected
        ]
        return max(ratios)


def _distance(found: Array, expected: Array) -> float:
    """Return the relative RMS in the row where it is largest."""
    difference = (found.astype(np.float64) - expected).reshape(len(expected), -1)
    right = expected.astype(np.float64).reshape(len(expected), -1)
    squares, of_right = (np.square(x).sum(1) for x in (difference, right))
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(squares == 0, 0, np.sqrt(squares / of_right))
    return float(ratio.max())


def reads(
    *sizes: int,
    weight: float = 1,
    last_only: bool = False,
    lengths: Sequence[int] | None = None,
    ids: Sequence[int] | None = None,
) -> Step:
    """Read calls of these sizes, in all rows.

    Args:
      sizes: T of each call.
      weight: Label weight of every token.
      last_only: Whether only the last logits are wanted.
      lengths: Tokens of each row; None means all.
      ids: Ids to choose from; None means all that the model knows.
    """

    def step(session: Session, rng: np.random.Generator, logits: list[Array]) -> None:
        for size in sizes:
            shape = (session.batch, size)
            known = np.arange(session.vocab_size) if ids is None else np.array(ids)
            tokens = known[rng.integers(0, len(known), shape)]
            weights = np.full(shape, weight, np.float32)
            logits.append(session.feed(tokens, weights, lengths, last_only))

    return step


def scales(*factors: float) -> Step:
    """Set the scale of the step sizes: one number, or one for each row."""

    def step(session: Session, rng: np.random.Generator, logits: list[Array]) -> None:
        session.learning_rate_scale = np.array(factors if len(factors) > 1 else factors[0], "f")

    return step


def resets(*rows: int) -> Step:
    """Reset rows; all if none is named."""
    return lambda session, rng, logits: session.reset(rows or None)


def forks(source: int, *targets: int) -> Step:
    return lambda session, rng, logits: session.fork(source, targets)


def rotates(session: Session, rng: np.random.Generator, logits: list[Array]) -> None:
    """Give each row the state of the row after it, two rows at a time."""
    session.write_rows([0, 1], session.read_rows([1, 2]))


def jumps(position: int) -> Step:
    """Set the position of all rows, as if they had read that far; the caches start anew."""

    def step(session: Session, rng: np.random.Generator, logits: list[Array]) -> None:
        state = states.zeros(session.specs, session.batch)
        state["position"][:] = position
        session.state = state

    return step


def others(session: Session, rng: np.random.Generator, logits: list[Array]) -> None:
    """Read in another session of the same loaded model, between calls of this one."""
    other = session.another(session.batch)
    for _ in range(6):
        ids = rng.integers(0, session.vocab_size, (2, session.batch, 3))
        other.feed(ids[0])
        logits.append(session.feed(ids[1]))
