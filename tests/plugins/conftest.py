from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.plugins.builds import built


@pytest.fixture(scope="session")
def builds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of builds that test processes share."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base


@pytest.fixture(scope="session")
def ort_library(builds: Path) -> Path:
    """libfwl_ort, built from the sources."""
    return built(builds, "ort", headers=True) / "onnxruntime" / "libfwl_ort.so"
