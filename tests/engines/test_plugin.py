"""Loading the plugin library: what is loaded, what is refused, and what is loaded already."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fwl_export.engines.plugin import load_plugin
from fwl_export.errors import PluginError


class Registry:
    """Stands for TensorRT's plugin registry with one library.

    Attributes:
      handle: What `load_library` returns; None means that it cannot be loaded.
      creates: Whether the library has our plugin.
      loaded: The paths that were loaded.
      asked: The plugins that were looked up.
    """

    def __init__(self, handle: object, creates: bool) -> None:
        self.handle, self.creates = handle, creates
        self.loaded: list[str] = []
        self.asked: list[tuple[str, ...]] = []

    def load_library(self, path: str) -> object:
        self.loaded.append(path)
        return self.handle

    def get_creator(self, *names: str) -> object:
        self.asked.append(names)
        return object() if self.creates and self.loaded else None


def load(registry: Registry, errors: list[str]) -> None:
    module: Any = SimpleNamespace(get_plugin_registry=lambda: registry)
    load_plugin(module, "TensorRT 9", Path("lib.so"), errors)


@pytest.mark.parametrize(
    ("handle", "errors", "message"),
    [
        (None, [], "^TensorRT 9 cannot load plugin 'lib.so'; build it with"),
        (None, ["bad ELF."], r"^TensorRT 9 cannot load plugin 'lib.so' \(bad ELF\); build it with"),
        (object(), [], "'lib.so' has no plugin fwl::LinearAttentionUpdate of version 2; build"),
    ],
)
def test_a_library_that_is_not_ours_is_refused(
    handle: object, errors: list[str], message: str
) -> None:
    with pytest.raises(PluginError, match=message):
        load(Registry(handle, creates=False), errors)


def test_the_library_is_loaded_once_for_each_process() -> None:
    registry = Registry(object(), creates=True)
    for _ in range(2):
        load(registry, [])
    assert registry.loaded == ["lib.so"]
    assert set(registry.asked) == {("LinearAttentionUpdate", "2", "fwl")}
