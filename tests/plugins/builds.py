"""Builds of `plugins/` for tests; they skip with the reason where it cannot be built."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from filelock import FileLock

PLUGINS = Path(__file__).parents[2] / "plugins"


def built(
    base: Path, name: str, *options: str, headers: bool = False, targets: Sequence[str] = ()
) -> Path:
    """Return a build folder in `base`, which test processes share; the first one builds it.

    Args:
      base: folder of all builds.
      name: of this one.
      options: of CMake.
      headers: it needs ONNX Runtime's headers, which may be out of reach.
      targets: what is built; default: everything.
    """
    for program in ("cmake", "c++"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")
    folder = base / f"plugins-{name}"
    with FileLock(base / f"plugins-{name}.lock"):
        if not (folder / "built").exists():
            done = _run("cmake", "-S", PLUGINS, "-B", folder, _python(), *options)
            if done.returncode and headers and "headers are missing" in done.stderr:
                pytest.skip(f"ONNX Runtime's headers cannot be had: {done.stdout.strip()}")
            assert done.returncode == 0, done.stdout + done.stderr
            # Two jobs: the other test process is often waiting for the same build.
            wanted = (f"--target={target}" for target in targets)
            run("cmake", "--build", folder, "--parallel", "2", *wanted)
            (folder / "built").touch()
    return folder


def run_tests(folder: Path) -> None:
    """Run the C++ tests of a build."""
    run("ctest", "--test-dir", folder, "--output-on-failure", "--no-tests=error")


def run(*command: object) -> None:
    """Run a program that must succeed."""
    done = _run(*command)
    assert done.returncode == 0, done.stdout + done.stderr


def _python() -> str:
    return f"-DPython3_EXECUTABLE={sys.executable}"


def _run(*command: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False)
