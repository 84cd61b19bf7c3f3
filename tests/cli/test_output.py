"""Standard output and error that are full, closed, or of an encoding that lacks characters."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FULL = Path("/dev/full")
needs_full = pytest.mark.skipif(not FULL.exists(), reason="there is no /dev/full")


def shell(command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    program = f"{sys.executable} -m fwl_export"
    return subprocess.run(
        ["bash", "-c", command.replace("FWL", program)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )


@needs_full
@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("options", ["", "--json"])
def test_a_full_disk_is_an_error_like_any_other(
    tiny_bundle: Path, options: str, unbuffered: str
) -> None:
    command = f"FWL inspect {tiny_bundle} {options} > {FULL}"
    done = shell(command, PYTHONUNBUFFERED=unbuffered)
    assert done.returncode == 1
    assert done.stderr == "error: No space left on device: standard output\n"


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_has_seen_enough_is_no_error(tiny_bundle: Path, unbuffered: str) -> None:
    command = f"{{ FWL inspect {tiny_bundle}; echo $? >&2; }} | true"
    done = shell(command, PYTHONUNBUFFERED=unbuffered)
    assert done.stderr == "141\n"


def test_streams_may_be_closed(tiny_bundle: Path) -> None:
    done = shell(f"FWL inspect {tiny_bundle} >&-")
    assert (done.returncode, done.stderr) == (0, "")
    assert shell("FWL inspect nothing 2>&-").returncode == 1
    assert shell("FWL inspect nothing >&- 2>&-").returncode == 1


@needs_full
def test_standard_error_may_be_full(tiny_bundle: Path) -> None:
    assert shell(f"FWL -v inspect {tiny_bundle} 2> {FULL}").returncode == 0
    assert shell(f"FWL inspect nothing 2> {FULL}").returncode == 1


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_characters_that_an_encoding_lacks_are_escaped(encoding: str) -> None:
    done = shell("FWL inspect 'nöwhere→'", PYTHONIOENCODING=encoding)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert r"\u2192" in done.stderr or encoding == "utf-8"
