"""What tests of engines share: a real variant or a skip, planted modules, and a quick builder."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest

from fwl_export import plugins
from fwl_export.engines.metadata import NetworkMetadata, ProfileMetadata, TensorMetadata
from fwl_export.engines.request import BuildRequest


@pytest.fixture(autouse=True)
def no_plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide the package's plugin libraries, which `make plugins` may have built in this checkout."""
    monkeypatch.setattr(plugins, "FOLDER", tmp_path / "no-plugins")


PlantModule = Callable[[str, str], None]


@pytest.fixture(scope="session")
def rtx() -> None:
    """Skip where TensorRT-RTX is not installed."""
    for module in ("tensorrt_rtx", "polygraphy"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed; pip install 'fwl-export[rtx]'")


@pytest.fixture
def plant_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PlantModule:
    """Return a function that puts a module before all others, for worker processes too."""
    folder = tmp_path / "planted"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)

    def plant(name: str, source: str) -> None:
        path = folder / f"{name.replace('.', '/')}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(source, encoding="utf-8")

    return plant


class QuickWorker:
    """Stands for `build_in_worker`: writes a few bytes, and fails where it is told to.

    Attributes:
      content: The bytes of the engines that it writes.
      plugin_layers: The number of plugin layers that it reports.
      error: Raised by the build `fail_at`, after it wrote half of its bytes.
      fail_at: Number of the build that fails, counted from 0.
      requests: The builds that were asked for.
    """

    def __init__(self) -> None:
        self.content = b"engine"
        self.plugin_layers = 0
        self.error: BaseException | None = None
        self.fail_at = 0
        self.requests: list[BuildRequest] = []

    def __call__(self, request: BuildRequest, tick: Callable[[float], None]) -> NetworkMetadata:
        self.requests.append(request)
        tick(1.0)
        if self.error is not None and len(self.requests) - 1 == self.fail_at:
            request.output.write_bytes(self.content[:3])
            raise self.error
        request.output.write_bytes(self.content)
        return NetworkMetadata(
            inputs=[TensorMetadata("input_ids", [-1, -1], "int64")],
            outputs=[TensorMetadata("logits", [-1, -1, 64], "float32")],
            profiles=[ProfileMetadata("decode", {}), ProfileMetadata("prefill", {})],
            layers=5,
            plugin_layers=self.plugin_layers,
            tf32=False,
            build_seconds=0.5,
        )


@pytest.fixture
def quick_worker(monkeypatch: pytest.MonkeyPatch) -> QuickWorker:
    """Replace the builder: for tests of what happens around it."""
    from fwl_export.engines import build
    from fwl_export.engines.worker import Probe

    worker = QuickWorker()
    probe = Probe("1.2.3", (80, 86, 89, 120), {"polygraphy": "0.1"}, "")
    monkeypatch.setattr(build, "describe_variant", lambda name: probe)
    monkeypatch.setattr(build, "build_in_worker", worker)
    return worker
