"""Every test starts from the same seeds on one thread. Tests marked gpu skip without a device."""

from __future__ import annotations

import ctypes
import functools
import os
import random
import shutil
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch

from fwl_export.bundle.config import ModelConfig
from tests.bundles import ANCHORED, TINY, shared_bundle

# The same examples in every run; `pytest --hypothesis-profile=explore` looks for new ones.
hypothesis.settings.register_profile("fixed", deadline=None, derandomize=True)
hypothesis.settings.register_profile("explore", deadline=None, print_blob=True)
hypothesis.settings.load_profile("fixed")


def pytest_configure() -> None:
    # More threads would change the order of sums and compete with the other workers for cores.
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeds() -> None:
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - for libraries that draw from the global generator
    torch.manual_seed(0)


def _shared(factory: pytest.TempPathFactory, precision: str, config: ModelConfig = TINY) -> Path:
    base = factory.getbasetemp()
    if os.environ.get("PYTEST_XDIST_WORKER"):
        base = base.parent  # `base` belongs to this worker; all workers share the folder above it
    return shared_bundle(base, precision, config)


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of a tiny random float32 model. Tests that change a bundle use `own_bundle`."""
    return _shared(tmp_path_factory, "fp32")


@pytest.fixture(scope="session")
def tiny_bundle_fp16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model with float16 activations."""
    return _shared(tmp_path_factory, "fp16")


@pytest.fixture(scope="session")
def anchored_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model in float32, with its gradients taken at anchors."""
    return _shared(tmp_path_factory, "fp32", ANCHORED)


@pytest.fixture
def own_bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A copy of `tiny_bundle` that the test may change."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if any(item.get_closest_marker("gpu") for item in items) and (reason := _no_gpu()):
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason=reason))


@functools.cache
def _no_gpu() -> str:
    """Return why there is no CUDA device, or "" if there is one.

    The driver is asked, because torch may be a CPU build.
    """
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        return f"no CUDA device: the driver's library is not installed ({error})"
    count = ctypes.c_int(0)
    status = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count))
    if status:
        return f"no CUDA device: the driver returned error {status}"
    return "" if count.value else "no CUDA device: the driver finds none"
