"""The kernels' own tests, which are C++, plain and under sanitizers."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.plugins.builds import built, run_tests

_OPTIONS = ("-DFWL_TESTS=ON", "-DFWL_ONNXRUNTIME=OFF")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("sanitizer", ["", "address,undefined", "thread"])
def test_kernels(builds: Path, sanitizer: str) -> None:
    name = sanitizer.replace(",", "-") or "plain"
    folder = built(builds, f"kernels-{name}", *_OPTIONS, f"-DFWL_SANITIZE={sanitizer}")
    run_tests(folder)
