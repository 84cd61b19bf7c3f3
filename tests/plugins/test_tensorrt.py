"""libfwl_trt in the registry, parser and builder of TensorRT-RTX, which need no GPU."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from fwl_export import plugins
from fwl_export.bundle.manifest import read_bundle
from fwl_export.engines import EngineMetadata, build_engines
from fwl_export.errors import EngineError, FwlError, PluginError
from tests.cli.run import run
from tests.engines.conftest import rtx  # noqa: F401

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300), pytest.mark.usefixtures("rtx")]

Build = Callable[..., list[EngineMetadata]]


@pytest.fixture
def build(tmp_path: Path, trt_library: Path) -> Build:
    """Return a function that builds engines in a copy of a bundle, by default with the plugin."""

    def build(bundle: Path, sms: Sequence[int] = (89,), **options: Any) -> list[EngineMetadata]:
        folder = tmp_path / "bundle"
        if not folder.exists():
            shutil.copytree(bundle, folder)
        engines = build_engines(
            read_bundle(folder), "rtx", sms, **{"plugin": trt_library, **options}
        )
        read_bundle(folder).verify()
        return engines

    return build


def check(engines: Sequence[EngineMetadata]) -> None:
    for metadata in engines:
        assert (metadata.plugin_layers, metadata.update_path) == (2, "plugin"), metadata.name
        assert len(metadata.plugin_sha256) == 64


def test_two_plugin_layers_in_engines_for_every_sm(build: Build, tiny_bundle: Path) -> None:
    engines = build(tiny_bundle, (80, 86, 89, 120))
    check(engines)
    assert [metadata.sm for metadata in engines] == [80, 86, 89, 120]
    assert not any(metadata.in_place_state or metadata.plugin_embedded for metadata in engines)


@pytest.mark.parametrize("sm", [80, 120])
def test_float16(build: Build, tiny_bundle_fp16: Path, sm: int) -> None:
    check(build(tiny_bundle_fp16, (sm,)))


def test_anchors(build: Build, anchored_bundle: Path) -> None:
    check(build(anchored_bundle))


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_state_in_place_is_another_engine_and_embedding_makes_it_larger(
    build: Build, precision: str, tiny_bundle: Path, tiny_bundle_fp16: Path, trt_library: Path
) -> None:
    bundle = {"fp32": tiny_bundle, "fp16": tiny_bundle_fp16}[precision]
    (plain,) = build(bundle)
    (in_place,) = build(bundle, in_place_state=True)
    check([plain, in_place])
    assert in_place.name == f"{plain.name}-inplace"
    assert (plain.in_place_state, in_place.in_place_state) == (False, True)
    (embedded,) = build(bundle, in_place_state=True, embed_plugin=True)
    check([embedded])
    assert embedded.plugin_embedded
    assert embedded.engine_bytes - in_place.engine_bytes > 0.9 * trt_library.stat().st_size


def test_auto_takes_the_packages_own_library(
    build: Build, tiny_bundle: Path, trt_library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plugins, "FOLDER", trt_library.parent)
    check(build(tiny_bundle, plugin="auto"))
    (body,) = build(tiny_bundle, plugin="none")
    assert (body.plugin_layers, body.update_path, body.plugin_sha256) == (0, "function body", "")


def test_auto_without_a_library_takes_the_function_body(
    build: Build, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plugins, "FOLDER", tmp_path / "empty")
    (body,) = build(tiny_bundle, plugin="auto")
    assert body.update_path == "function body"
    with pytest.raises(PluginError, match=r"libfwl_trt.so' is required and not in .*make plugins"):
        build(tiny_bundle, plugin="required")
    for option in ("in_place_state", "embed_plugin"):
        with pytest.raises(EngineError, match="needs the plugin"):
            build(tiny_bundle, plugin="auto", **{option: True})


def _text(folder: Path) -> Path:
    path = folder / "libtext.so"
    path.write_text("not a library\n")
    return path


def _library(folder: Path, source: str) -> Path:
    (folder / "other.cpp").write_text(source)
    path = folder / "libother.so"
    subprocess.run(["c++", "-shared", "-fPIC", folder / "other.cpp", "-o", path], check=True)
    return path


def _without_entry_points(folder: Path) -> Path:
    return _library(folder, "int nothing;\n")


def _without_creators(folder: Path) -> Path:
    source = """
extern "C" void setLoggerFinder(void*) {}
extern "C" void* const* getCreators(int& count) { count = 0; return nullptr; }
"""
    return _library(folder, source)


@pytest.mark.parametrize(
    ("library", "message"),
    [
        (_text, "cannot load plugin '.*libtext.so'.*make plugins"),
        (_without_entry_points, "cannot load plugin '.*libother.so'.*make plugins"),
        (_without_creators, "cannot load plugin '.*libother.so'.*make plugins"),
        (lambda folder: folder / "missing.so", "missing.so' does not exist"),
    ],
)
def test_a_library_that_is_not_the_plugin(
    build: Build,
    tiny_bundle: Path,
    tmp_path: Path,
    library: Callable[[Path], Path],
    message: str,
) -> None:
    with pytest.raises(FwlError, match=message) as caught:
        build(tiny_bundle, plugin=library(tmp_path))
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "bundle").glob("engines/*"))


def test_a_state_with_a_second_reader_is_not_built_in_place(
    build: Build, anchored_bundle: Path, tmp_path: Path
) -> None:
    with pytest.raises(EngineError, match=r"'past.fast.up.kernel' cannot be updated in place"):
        build(anchored_bundle, in_place_state=True)
    assert not list((tmp_path / "bundle").glob("engines/*"))


def test_the_verb(
    tiny_bundle: Path, trt_library: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, folder)
    command = ("build", str(folder), "--sm", "89", "--plugin", str(trt_library))
    result = run(capsys, *command)
    assert result.code == 0, result.err
    assert "the plugin library libfwl_trt.so must be loaded" in result.out
    result = run(capsys, *command, "--in-place-state", "--embed-plugin", "--json")
    (metadata,) = json.loads(result.out)
    assert metadata["in_place_state"]
    assert metadata["plugin_embedded"]
    assert "libfwl_trt" not in run(capsys, *command, "--embed-plugin").out
    result = run(capsys, *command[:-1], "none", "--embed-plugin")
    assert result.code == 1
    assert result.err.splitlines()[-1].startswith("error: --embed-plugin needs the plugin")
