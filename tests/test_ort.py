"""ONNX Runtime is imported without telemetry unless the user wants it; plugins fail clearly."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fwl_export.errors import PluginError
from fwl_export.ort import import_onnxruntime, register_plugin

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
    if not wanted:  # with telemetry, only some builds make this folder
        assert not (tmp_path / ".cache").exists()


def test_a_file_that_is_not_a_plugin(tmp_path: Path) -> None:
    (tmp_path / "text.so").write_text("not a library", encoding="utf-8")
    options = import_onnxruntime().SessionOptions()
    with pytest.raises(PluginError, match=r"cannot load plugin '.*text\.so': .*plugin='none'"):
        register_plugin(options, tmp_path / "text.so")
