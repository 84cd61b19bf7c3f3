"""On a full disk a command ends with one sentence that names the file, and leaves nothing."""

from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fwl_export.model.training_files import TrainingLog
from tests.bundles import write_checkpoint
from tests.cli.run import run


@contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """Let no file grow beyond a size, as if the disk were full then."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("TO BE OR NOT TO BE")
    return path


def test_saving_a_state(
    tiny_bundle: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = tmp_path / "a.state"
    assert run(capsys, "read", tiny_bundle, text, "-o", state).code == 0
    before = state.read_bytes()
    with files_up_to(2000):
        result = run(capsys, "read", tiny_bundle, text, "-o", state)
    assert result.code == 1
    assert result.err.splitlines()[-1] == f"error: File too large: '{state}'"
    assert state.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.state", "text.txt"]


# The limits are met by the weights, and by the copy of the checkpoint.
@pytest.mark.parametrize("size", [20_000, 40_000])
def test_exporting(tmp_path: Path, capsys: pytest.CaptureFixture[str], size: int) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint")
    with files_up_to(size):
        result = run(capsys, "export", checkpoint, "-o", tmp_path / "bundle")
    assert result.code == 1
    last = result.err.splitlines()[-1]
    assert last.startswith(f"error: File too large: '{tmp_path / 'bundle'}")
    assert "Traceback" not in result.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint"]


def test_standard_output_and_the_log(tiny_bundle: Path) -> None:
    command = [sys.executable, "-m", "fwl_export", "inspect", str(tiny_bundle)]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "error: No space left on device: standard output\n"
    command += ["--log-file", "/dev/full"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "error: No space left on device: '/dev/full'\n"


def test_the_log_of_a_training_run(tmp_path: Path) -> None:
    log = TrainingLog(tmp_path / "log.csv")
    log.add({"step": 1, "loss": 2.0})
    size = (tmp_path / "log.csv").stat().st_size
    with files_up_to(size), pytest.raises(OSError, match="File too large") as found:
        log.add({"step": 2, "loss": 2.0})
    assert found.value.filename == str(tmp_path / "log.csv")
