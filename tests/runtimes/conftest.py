"""A machine with a GPU, on fakes of CUDA and TensorRT."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.tensorrt_fake import Machine, fake_machine


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    """One GPU of SM89 with TensorRT-RTX; fails at the end on what a real one would reject."""
    with fake_machine(tmp_path) as machine:
        yield machine
