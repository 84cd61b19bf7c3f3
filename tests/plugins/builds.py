"""Builds of `plugins/` for tests. Tests are skipped, with the reason, if it cannot be built."""

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
    """Return a build folder that all test processes share; the first process builds it.

    Args:
      base: Folder of all builds.
      name: Name of this build.
      options: Options for CMake, such as "-DFWL_TESTS=ON".
      headers: Whether the build needs ONNX Runtime's headers. If they cannot be found or
        downloaded, the test is skipped.
      targets: Targets to build; none means all.
    """
    for program in ("cmake", "c++"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")
    folder = base / f"plugins-{name}"
    with FileLock(base / f"plugins-{name}.lock"):
        if not (folder / "built").exists():
            done = _run("cmake", "-S", PLUGINS, "-B", folder, _python(), *options)
            if done.returncode and headers and "headers are missing" in done.stderr:
                pytest.skip(f"ONNX Runtime's headers are missing: {done.stdout.strip()}")
            assert done.returncode == 0, done.stdout + done.stderr
            # Two jobs, because the other test process often waits for the same build.
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
