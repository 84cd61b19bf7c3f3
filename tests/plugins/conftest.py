from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.plugins.builds import built


@pytest.fixture(scope="session")
def builds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the builds that all test processes share."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base


@pytest.fixture(scope="session")
def libraries(builds: Path) -> Path:
    """The build folder with all libraries and the examples."""
    return built(builds, "libraries", "-DFWL_EXAMPLES=ON", headers=True)


@pytest.fixture(scope="session")
def ort_library(libraries: Path) -> Path:
    """Path of libfwl_ort, built from the sources."""
    return libraries / "onnxruntime" / "libfwl_ort.so"


@pytest.fixture(scope="session")
def trt_library(libraries: Path) -> Path:
    """Path of libfwl_trt, built from the sources."""
    library = libraries / "tensorrt" / "libfwl_trt.so"
    if not library.is_file():
        pytest.skip("libfwl_trt is not built, because Triton is missing")
    return library


@pytest.fixture(scope="session")
def compiled_kernels(trt_library: Path) -> Path:
    """The folder of the compiled GPU kernels that are part of the libraries."""
    return trt_library.parents[1] / "kernels" / "gpu" / "launcher" / "compiled"
