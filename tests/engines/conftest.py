"""What tests of engines share: a real variant or a skip, planted ones, and a quick builder."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fwl_export import plugins
from fwl_export.engines.compile import PluginUse


@pytest.fixture(autouse=True)
def no_plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package carries no plugins, though `make plugins` may have run in this checkout."""
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
      content: of the engines it writes.
      plugin_layers: that it reports.
      error: to raise at the build number `fail_at`, counted from 0, after writing half.
      fail_at: see `error`.
      outputs: the paths it was given.
      plugins: what it was told of the plugin library.
    """

    def __init__(self) -> None:
        self.content = b"engine"
        self.plugin_layers = 0
        self.error: BaseException | None = None
        self.fail_at = 0
        self.outputs: list[Path] = []
        self.plugins: list[PluginUse | None] = []

    def __call__(
        self,
        variant: str,
        model: Path,
        sm: int,
        ranges: Any,
        output: Path,
        plugin: PluginUse | None,
        tick: Any,
    ) -> dict[str, Any]:
        self.outputs.append(output)
        self.plugins.append(plugin)
        tick(1.0)
        if self.error is not None and len(self.outputs) - 1 == self.fail_at:
            output.write_bytes(self.content[:3])
            raise self.error
        output.write_bytes(self.content)
        return {
            "inputs": [{"name": "input_ids", "shape": [-1, -1], "dtype": "int64"}],
            "outputs": [{"name": "logits", "shape": [-1, -1, 64], "dtype": "float32"}],
            "profiles": [{"name": "decode", "inputs": {}}, {"name": "prefill", "inputs": {}}],
            "layers": 5,
            "plugin_layers": self.plugin_layers,
            "tf32": False,
            "build_seconds": 0.5,
        }


@pytest.fixture
def quick_worker(monkeypatch: pytest.MonkeyPatch) -> QuickWorker:
    """Engines without a builder: for what happens around it."""
    from fwl_export.engines import build
    from fwl_export.engines.worker import Probe

    worker = QuickWorker()
    probe = Probe("1.2.3", (80, 86, 89, 120), {"polygraphy": "0.1"}, "")
    monkeypatch.setattr(build, "describe_variant", lambda name: probe)
    monkeypatch.setattr(build, "build_in_worker", worker)
    return worker
