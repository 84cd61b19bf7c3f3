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
def libraries(builds: Path) -> Path:
    """The build folder of all libraries, and of the examples."""
    return built(builds, "libraries", "-DFWL_EXAMPLES=ON", headers=True)


@pytest.fixture(scope="session")
def ort_library(libraries: Path) -> Path:
    """libfwl_ort, built from the sources."""
    return libraries / "onnxruntime" / "libfwl_ort.so"


@pytest.fixture(scope="session")
def trt_library(libraries: Path) -> Path:
    """libfwl_trt, built from the sources."""
    library = libraries / "tensorrt" / "libfwl_trt.so"
    if not library.is_file():
        pytest.skip("libfwl_trt is not built: Triton cannot be had")
    return library


@pytest.fixture(scope="session")
def compiled_kernels(trt_library: Path) -> Path:
    """The folder of the GPU kernels that the libraries embed."""
    return trt_library.parents[1] / "kernels" / "gpu" / "launcher" / "compiled"
