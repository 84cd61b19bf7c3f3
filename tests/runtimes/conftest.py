"""A machine with a GPU, on doubles of CUDA and TensorRT."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.tensorrt_double import Machine, doubled_machine


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    """One GPU of SM89 with TensorRT-RTX; fails at the end on what a real one would reject."""
    with doubled_machine(tmp_path) as machine:
        yield machine
