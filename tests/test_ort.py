"""ONNX Runtime is imported without its telemetry, unless that is wanted."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("onnxruntime")

_SCRIPT = """
import os
from fwl_export.ort import import_onnxruntime
import_onnxruntime()
print(os.environ["ORT_DISABLE_TELEMETRY"])
"""


@pytest.mark.parametrize("wanted", [False, True])
def test_telemetry_is_off_unless_it_is_wanted(wanted: bool, tmp_path: Path) -> None:
    environment = {**os.environ, "HOME": str(tmp_path)}
    environment.pop("ORT_DISABLE_TELEMETRY", None)
    environment |= {"ORT_DISABLE_TELEMETRY": "0"} if wanted else {}
    command = [sys.executable, "-c", _SCRIPT]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ("0" if wanted else "1")
    if not wanted:  # not all builds have it
        assert not (tmp_path / ".cache").exists()
