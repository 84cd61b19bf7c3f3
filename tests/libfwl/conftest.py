"""Fixtures: libfwl and its examples, built once for all test processes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.libfwl.library import Library, Model
from tests.plugins.conftest import builds, libraries, ort_library  # noqa: F401 - fixtures


@pytest.fixture(scope="session")
def libfwl(libraries: Path) -> Path:  # noqa: F811 - the fixture
    """The folder with libfwl and its examples."""
    return libraries / "libfwl"


@pytest.fixture(scope="session")
def runtime() -> Path:
    """Path of ONNX Runtime's library, which its Python package contains."""
    import onnxruntime

    folder = Path(onnxruntime.__file__).parent / "capi"
    return next(folder.glob("libonnxruntime.so.*"))


@pytest.fixture(scope="session")
def library(libfwl: Path) -> Library:
    return Library(libfwl / "libfwl.so")


@pytest.fixture(scope="session")
def model(library: Library, runtime: Path, tiny_bundle: Path) -> Model:
    return library.open(tiny_bundle, runtime)


@pytest.fixture(scope="session")
def anchored(library: Library, runtime: Path, anchored_bundle: Path) -> Model:
    return library.open(anchored_bundle, runtime)
