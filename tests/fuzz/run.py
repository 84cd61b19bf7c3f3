"""Runs the fuzz: changes good files, reads them, and counts what happens."""

from __future__ import annotations

import re
import resource
import signal
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from fwl_export.errors import FwlError
from tests.fuzz.targets import Target

REFUSED, ACCEPTED, TRACEBACK, HANG, OVER = "refused", "accepted", "traceback", "hang", "over 1 GB"
OUTCOMES = (REFUSED, ACCEPTED, TRACEBACK, HANG, OVER)

SECONDS = 10
MEMORY_BYTES = 1 << 30

_LONGEST_MESSAGE = 2000
_NO_MEMORY = re.compile("MemoryError|bad_alloc|allocate|out of memory", re.IGNORECASE)


class _Hang(BaseException):
    """The reader still runs after `SECONDS`."""


@dataclass
class Result:
    """What happened to the inputs of one target.

    Attributes:
      target: Name of the target.
      counts: Number of inputs by outcome.
      bad: Seed and number of each input that is neither refused nor accepted, and what happened.
      seconds: CPU time that it took, in seconds.
    """

    target: str
    counts: Counter[str] = field(default_factory=Counter)
    bad: list[str] = field(default_factory=list)
    seconds: float = 0.0


def fuzz(target: Target, seed: int, inputs: Sequence[int]) -> Result:
    """Read changed files of one target.

    Args:
      target: What to read.
      seed: Seed of the changes.
      inputs: Numbers of the inputs; seed and number determine an input.
    """
    result = Result(target.name)
    began = time.process_time()
    for number in inputs:
        target.path.write_bytes(content(target, seed, number))
        found, detail = outcome(target)
        result.counts[found] += 1
        if found not in (REFUSED, ACCEPTED):
            result.bad.append(f"{target.name}, seed {seed}, input {number}: {found}\n{detail}")
    target.path.write_bytes(target.good[0])
    result.seconds = time.process_time() - began
    return result


def content(target: Target, seed: int, number: int) -> bytes:
    """Return the content of one input."""
    rng = Random(f"{seed} {target.name} {number}")
    data = rng.choice(target.good)
    mutators = rng.choices(target.mutators, k=rng.choice((1, 1, 1, 2)))
    for mutator in mutators:
        try:
            data = mutator(data, rng)
        except (
            ValueError,
            RecursionError,
        ):  # the first change has broken the format that the second one knows
            break
    return data


def outcome(target: Target) -> tuple[str, str]:
    """Read the target's file once; returns the outcome, and what went wrong."""
    try:
        with _limits():
            target.read()
    except (FwlError, OSError) as error:
        message = str(error)
        if isinstance(error, OSError) and error.errno is None:
            return TRACEBACK, traceback.format_exc()
        if _NO_MEMORY.search(message):
            return OVER, message
        if len(message) > _LONGEST_MESSAGE or re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", message):
            return TRACEBACK, f"a message that no terminal should get: {message[:500]!r}"
        return REFUSED, ""
    except _Hang:
        return HANG, traceback.format_exc()
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        return (OVER if _NO_MEMORY.search(repr(error)) else TRACEBACK), traceback.format_exc()
    return ACCEPTED, ""


@contextmanager
def _limits() -> Iterator[None]:
    """Limit time, and memory beyond what the process has reserved already."""

    def stop(*_: object) -> None:
        raise _Hang

    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (_reserved() + MEMORY_BYTES, hard))
    # Time of the processor, for a busy machine; and time by the clock, for a reader that waits.
    timers = {signal.ITIMER_PROF: signal.SIGPROF, signal.ITIMER_REAL: signal.SIGALRM}
    before = {number: signal.signal(number, stop) for number in timers.values()}
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    signal.setitimer(signal.ITIMER_REAL, 6 * SECONDS)
    try:
        yield
    finally:
        for timer in timers:
            signal.setitimer(timer, 0)
        for number, handler in before.items():
            signal.signal(number, handler)
        resource.setrlimit(resource.RLIMIT_DATA, (hard, hard))


def _reserved() -> int:
    """Return the bytes of private writable memory that the process has, as RLIMIT_DATA counts."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    (kilobytes,) = re.findall(r"^VmData:\s+(\d+) kB$", status, re.MULTILINE)
    return int(kilobytes) << 10


def table(results: Sequence[Result]) -> str:
    """Return the results as a Markdown table, with a row for their sum."""
    lines = ["| target | inputs | " + " | ".join(OUTCOMES) + " | CPU s |"]
    lines.append("|---|" + "---:|" * (len(OUTCOMES) + 2))
    total = Result("all", sum((r.counts for r in results), Counter()))
    total.seconds = sum(r.seconds for r in results)
    for result in (*results, total):
        cells = [result.counts.total(), *(result.counts[name] for name in OUTCOMES)]
        row = " | ".join(map(str, cells))
        lines.append(f"| {result.target} | {row} | {result.seconds:.1f} |")
    return "\n".join(lines)
