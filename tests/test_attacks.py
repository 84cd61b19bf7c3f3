"""Malicious files are refused in one sentence, without a traceback, a hang or a file elsewhere."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from attacks.common import Place, outcome
from fwl_export.errors import BundleError

REPOSITORY = Path(__file__).parents[1]
FOLDER = REPOSITORY / "attacks"
NAMES = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "common")

_ROW = re.compile(r"^\| `(\w+)\.py` \|[^|]*\| (.*?) \|$", re.MULTILINE)


def listed() -> dict[str, str]:
    """Return the outcomes that README.md promises, by the attack's name."""
    return dict(_ROW.findall((FOLDER / "README.md").read_text(encoding="utf-8")))


# A process for each: it limits its own memory and time, and the limits are part of the test.
@pytest.mark.parametrize("name", NAMES)
def test_attack(name: str, tiny_bundle: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", f"attacks.{name}", str(tiny_bundle)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    promised = listed()[name]
    if promised.startswith("**open**: "):
        assert done.stdout.startswith(f"open, {promised.removeprefix('**open**: ')}")
    else:
        assert re.match(r"(refused: \w+Error|harmless): \w*", done.stdout)
        assert done.stderr == ""
    assert "Traceback" not in done.stderr


def test_readme_lists_every_attack() -> None:
    assert sorted(listed()) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_an_open_attack_says_so(name: str) -> None:
    text = (FOLDER / f"{name}.py").read_text(encoding="utf-8")
    is_open = listed()[name].startswith("**open**")
    assert ("Open. To do: " in text) == is_open
    assert ("open_today=" in text) == is_open


@pytest.fixture
def place(tmp_path: Path) -> Place:
    for name in ("bundle", "outside"):
        (tmp_path / name).mkdir()
    (tmp_path / "outside" / "secret.txt").write_text("a secret\n", encoding="utf-8")
    return Place(tmp_path / "bundle", tmp_path / "outside")


def test_outcomes_are_told_apart(place: Place) -> None:
    def refused(_: Place) -> None:
        raise BundleError("no")

    def changed(place: Place) -> None:
        (place.outside / "secret.txt").write_text("changed", encoding="utf-8")
        raise BundleError("too late")

    def endless(_: Place) -> None:
        while True:
            pass

    assert outcome(refused, place) == "refused: BundleError: no"
    assert outcome(lambda _: 1, place) == "accepted"
    assert outcome(lambda _: "harmless: nothing", place) == "harmless: nothing"
    assert outcome(lambda _: {}["x"], place) == "traceback: KeyError: 'x'"
    assert outcome(lambda _: bytearray(8 << 30), place).startswith("traceback: MemoryError")
    assert outcome(changed, place) == "escaped: secret.txt"
    assert outcome(endless, place, seconds=1) == "hang"
