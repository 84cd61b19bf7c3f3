"""A fake machine with a GPU, CUDA and TensorRT."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.tensorrt_fake import Machine, fake_machine


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    """A machine with one GPU (SM89) and TensorRT-RTX; the test fails if it misused either."""
    with fake_machine(tmp_path) as machine:
        yield machine
