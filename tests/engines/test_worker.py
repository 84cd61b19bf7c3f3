"""The worker process: its answers, its errors, and a crash."""

from __future__ import annotations

import errno
import re
from pathlib import Path

import pytest

from fwl_export.bundle.manifest import MODEL_FILE
from fwl_export.engines import worker
from fwl_export.engines.request import BuildRequest, Range
from fwl_export.engines.worker import build_in_worker, describe_variant, probe_variant
from fwl_export.errors import EngineError, MissingDependencyError
from tests.engines.conftest import PlantModule

# As much of the module as a worker needs to describe it, and some output that must not disturb.
DESCRIBABLE = """
print("noise on standard output")
__version__ = "9.8.7"
class ComputeCapability:
    __members__ = {"NONE": 0, "SM86": 1}
"""


def plant(plant_module: PlantModule, source: str) -> None:
    plant_module("tensorrt_rtx", source)
    plant_module("polygraphy.__init__", "__version__ = '0.1'")
    plant_module("polygraphy.config", "")


def test_describe(plant_module: PlantModule) -> None:
    plant(plant_module, DESCRIBABLE)
    probe = describe_variant("rtx")
    assert (probe.version, probe.sms, probe.available) == ("9.8.7", [86], True)
    assert probe.versions == {"tensorrt_rtx": "9.8.7", "polygraphy": "0.1"}


def test_libraries_that_cannot_be_loaded(plant_module: PlantModule) -> None:
    plant(plant_module, "raise ImportError('libx.so.10: cannot open shared object file')")
    expected = (
        "TensorRT-RTX is installed, but its libraries cannot be loaded (libx.so.10: cannot open "
        "shared object file); pip install 'fwl-export[rtx]'"
    )
    with pytest.raises(MissingDependencyError, match=re.escape(expected)):
        describe_variant("rtx")
    probe = probe_variant("rtx")
    assert (probe.available, probe.reason) == (False, expected)


def test_a_process_that_dies_is_an_error_with_its_last_words(plant_module: PlantModule) -> None:
    source = "import os, sys; print('assertion failed', file=sys.stderr, flush=True); os.abort()"
    plant(plant_module, source)
    expected = "TensorRT-RTX ended its process with SIGABRT; its last words: assertion failed"
    with pytest.raises(EngineError, match=expected):
        describe_variant("rtx")


def test_a_bug_shows_the_workers_traceback(plant_module: PlantModule) -> None:
    plant(plant_module, "raise ZeroDivisionError('a bug')")
    with pytest.raises(RuntimeError, match=r"(?s)Traceback.*ZeroDivisionError: a bug"):
        describe_variant("rtx")


def test_a_disk_that_is_full(rtx: None, tiny_bundle: Path) -> None:
    full = Path("/dev/full")  # writing to this device fails as a full disk does
    sizes = Range("decode", (1, 1, 1), (1, 1, 1))
    request = BuildRequest("rtx", tiny_bundle / MODEL_FILE, 80, [sizes], full)
    with pytest.raises(OSError, match="No space left on device") as caught:
        build_in_worker(request, print)
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(full))


def test_a_module_in_the_working_directory_is_not_imported(
    plant_module: PlantModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(plant_module, DESCRIBABLE)
    (tmp_path / "json.py").write_text("raise SystemExit('imported from the working directory')")
    monkeypatch.setattr(worker.sys, "path", [p for p in worker.sys.path if p])
    monkeypatch.chdir(tmp_path)
    assert describe_variant("rtx").version == "9.8.7"
