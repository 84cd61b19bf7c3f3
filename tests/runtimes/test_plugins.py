"""Which plugin library a session loads; a required one is never silently left out."""

from __future__ import annotations

from pathlib import Path

import pytest

from fwl_export import open_session, plugins
from fwl_export.errors import ConfigError, PluginError
from fwl_export.plugins import ONNXRUNTIME, find_plugin


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(plugins, "FOLDER", tmp_path)
    return tmp_path


def test_auto_takes_the_packages_own_library_if_there_is_one(folder: Path) -> None:
    assert find_plugin(ONNXRUNTIME) is None
    (folder / ONNXRUNTIME).touch()
    assert find_plugin(ONNXRUNTIME) == folder / ONNXRUNTIME
    assert find_plugin(ONNXRUNTIME, "required") == folder / ONNXRUNTIME
    assert find_plugin(ONNXRUNTIME, "none") is None


def test_required_and_missing_is_an_error(folder: Path) -> None:
    with pytest.raises(PluginError, match=r"is required and not in .* `make plugins`"):
        find_plugin(ONNXRUNTIME, "required")


def test_a_path_must_exist(folder: Path) -> None:
    with pytest.raises(PluginError, match=r"plugin '.*lib\.so' does not exist; expected a library"):
        find_plugin(ONNXRUNTIME, folder / "lib.so")
    (folder / "lib.so").touch()
    assert find_plugin(ONNXRUNTIME, str(folder / "lib.so")) == (folder / "lib.so").resolve()


def test_no_other_place_is_searched(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / ONNXRUNTIME).touch()
    monkeypatch.chdir(elsewhere)
    for variable in ("LD_LIBRARY_PATH", "PATH", "FWL_PLUGINS"):
        monkeypatch.setenv(variable, str(elsewhere))
    assert find_plugin(ONNXRUNTIME) is None


def test_sessions(tiny_bundle: Path, folder: Path) -> None:
    open_session(tiny_bundle)
    open_session(tiny_bundle, "torch", plugin="none")
    with pytest.raises(PluginError, match="is required"):
        open_session(tiny_bundle, plugin="required")
    with pytest.raises(ConfigError, match="plugin can be chosen for runtimes 'onnxruntime' and"):
        open_session(tiny_bundle, "torch", plugin="required")


def test_a_file_that_is_not_a_library_is_an_error_even_with_auto(
    tiny_bundle: Path, folder: Path
) -> None:
    (folder / ONNXRUNTIME).write_text("not a library", encoding="utf-8")
    with pytest.raises(PluginError, match=r"cannot load plugin .* leave it out with plugin='none'"):
        open_session(tiny_bundle)
    open_session(tiny_bundle, plugin="none")
