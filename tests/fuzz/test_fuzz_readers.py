"""No changed file ends in a traceback, a hang, or a gigabyte: every reader refuses or accepts it.

`python -m tests.fuzz` does the same for as long as one likes.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest

from fwl_export.errors import BundleError
from tests.fuzz import mutators
from tests.fuzz.run import ACCEPTED, HANG, OVER, REFUSED, TRACEBACK, fuzz, outcome, table
from tests.fuzz.targets import Target, targets

SEED = 1
INPUTS = 10_100  # of which rounding takes a few


@pytest.mark.slow
def test_readers_refuse_or_accept(tiny_bundle: Path, tmp_path: Path) -> None:
    found = list(targets(tiny_bundle, tmp_path))
    whole = sum(target.share for target in found)
    results = []
    for target in found:
        assert outcome(target) == (ACCEPTED, ""), f"{target.name}: the good file"
        results.append(fuzz(target, SEED, range(round(INPUTS * target.share / whole))))
    print(table(results))
    assert sum(result.counts.total() for result in results) >= 10_000
    assert not [line for result in results for line in result.bad]
    for result in results:  # a fuzz that never gets past the first check finds nothing
        assert result.counts[REFUSED], result.target
        assert result.counts[ACCEPTED], result.target


def target(path: Path, read: Callable[[], object]) -> Target:
    path.write_bytes(b"{}")
    return Target("a target", path, [b"{}"], mutators.JSON, read, 1)


def test_outcomes_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(message: str) -> Callable[[], None]:
        def read() -> None:
            raise BundleError(message)

        return read

    def endless() -> None:
        while True:
            pass

    def ends_as(read: Callable[[], object]) -> str:
        return outcome(target(tmp_path / "a.json", read))[0]

    monkeypatch.setattr("tests.fuzz.run.SECONDS", 0.2)
    assert ends_as(lambda: 1) == ACCEPTED
    assert ends_as(refused("no")) == REFUSED
    assert ends_as(refused("no \x1b[31m")) == TRACEBACK
    assert ends_as(refused("cannot allocate 4 GB")) == OVER
    assert ends_as(lambda: {}["x"]) == TRACEBACK
    assert ends_as(lambda: bytearray(2 << 30)) == OVER
    assert ends_as(endless) == HANG


def test_an_input_can_be_made_again(tmp_path: Path) -> None:
    from tests.fuzz.run import content

    one = target(tmp_path / "a.json", lambda: None)
    one.path.write_bytes(b'{"a": [1, 2]}')
    one = Target("a target", one.path, [one.path.read_bytes()], mutators.JSON, one.read, 1)
    made = [content(one, 1, number) for number in range(50)]
    assert made == [content(one, 1, number) for number in range(50)]
    assert len(set(made)) > 20


@pytest.mark.parametrize("mutator", dict.fromkeys((*mutators.PROTOBUF, *mutators.JSON)))
def test_mutators_change_files_of_any_size(mutator: mutators.Mutator) -> None:
    rng = Random(0)
    for data in (b"[1, 2]", b'{"a": {"b": [1.5, null]}}'):
        assert {mutator(data, rng) for _ in range(40)} - {data}
    for data in (b"[]", b"{}"):
        mutator(data, rng)
