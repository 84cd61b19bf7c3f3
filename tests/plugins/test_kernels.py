"""Run the C++ tests, plain and under sanitizers, and compare the launch plans of C++ and Python."""

from __future__ import annotations

import subprocess
from pathlib import Path
from random import Random

import pytest

from fwl_export.op.spec import ACTIVATION_TYPES
from plugins.kernels.gpu.plan import MULTIPROCESSORS, SIGNATURES, Plan, plan
from tests.plugins.builds import built, run, run_tests

_TESTS = "-DFWL_TESTS=ON"
# For sanitized code, which is slow to compile. The tiles have flags of their own.
_FEWER_OPTIMIZATIONS = "-DCMAKE_CXX_FLAGS_RELEASE=-O1"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_kernels(builds: Path) -> None:
    run_tests(built(builds, "kernels", _TESTS, "-DFWL_ONNXRUNTIME=OFF", "-DFWL_GPU=OFF"))


@pytest.fixture(scope="session")
def threads(builds: Path, compiled_kernels: Path) -> Path:
    """The build folder of the tests with threads, with the thread sanitizer."""
    return built(
        builds,
        "threads",
        _TESTS,
        "-DFWL_SANITIZE=thread",
        "-DFWL_TENSORRT=OFF",
        f"-DFWL_COMPILED_KERNELS={compiled_kernels}",
        _FEWER_OPTIMIZATIONS,
        headers=True,
        targets=("kernel_test", "launcher_test", "libfwl_test"),
    )


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "command", [("kernel_test", "[threads]"), ("launcher_test", "[threads]"), ("libfwl_test",)]
)
def test_threads_under_their_sanitizer(threads: Path, command: tuple[str, ...]) -> None:
    run(threads / "tests" / command[0], *command[1:])


@pytest.fixture(scope="session")
def sanitized(builds: Path, compiled_kernels: Path) -> Path:
    """The build folder of everything, with the address and undefined-behaviour sanitizers."""
    return built(
        builds,
        "sanitized",
        _TESTS,
        "-DFWL_SANITIZE=address,undefined",
        f"-DFWL_COMPILED_KERNELS={compiled_kernels}",
        _FEWER_OPTIMIZATIONS,
        headers=True,
    )


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_kernels_launcher_and_plugin_under_sanitizers(sanitized: Path) -> None:
    run_tests(sanitized)


# Sizes around the limits of tiles, chunks, segments and splits.
_EDGES = [
    (rows, tokens, size_k, size_v)
    for rows in (1, 5, 600)
    for tokens in (1, 2, 64, 65, 3000)
    for size_k, size_v in ((1, 1), (768, 3072), (64, 4096), (129, 33))
]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_launcher_plans_as_python_does(sanitized: Path) -> None:
    random = Random(3)
    sizes = _EDGES + [
        (random.randint(1, 300), *(random.randint(1, 4000) for _ in range(3))) for _ in range(100)
    ]
    calls = [
        (*size, dtype, sm, aligned)
        for size in sizes
        for dtype in ACTIVATION_TYPES
        for sm in MULTIPROCESSORS
        for aligned in (True, False)
    ]
    lines = [
        " ".join(map(str, (*size, ACTIVATION_TYPES.index(dtype), sm, int(aligned))))
        for *size, dtype, sm, aligned in calls
    ]
    done = subprocess.run(
        [sanitized / "tests" / "print_plans"],
        input="\n".join(lines),
        capture_output=True,
        text=True,
        check=True,
    )
    for line, found, call in zip(lines, done.stdout.splitlines(), calls, strict=True):
        assert found == _text(plan(*call)), line


def _text(steps: Plan) -> str:
    """Return the line that `print_plans` prints for a plan."""
    parts = [str(4 * steps.workspace)]
    for step in steps.launches:
        chosen = step.variant
        scalars = [
            step.scalars[name] for name, kind in SIGNATURES[chosen.kernel].items() if kind == "i32"
        ]
        flags = (chosen.aligned, chosen.block.get("split", 0))
        values = (*map(int, flags), step.grid, int(step.first_segment), *scalars)
        parts.append(" ".join([chosen.kernel, *map(str, values)]))
    return " | ".join(parts)
