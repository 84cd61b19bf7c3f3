"""The release build: compilers for another machine, and wheels that a release must not have."""

from __future__ import annotations

import platform
import stat
import sys
import zipfile
from pathlib import Path

import pytest

from tools import build_wheel
from tools.build_wheel import LIBRARIES, Library, WheelError, check, compilers

OTHER = "aarch64" if platform.machine() == "x86_64" else "x86_64"


def test_compilers_are_programs_for_the_machine(tmp_path: Path) -> None:
    found = compilers(tmp_path, platform.machine(), "2.28")
    assert set(found) == {"CC", "CXX"}
    program = Path(found["CXX"])
    assert program.stat().st_mode & stat.S_IXUSR
    assert f"-target {platform.machine()}-linux-gnu.2.28" in program.read_text(encoding="utf-8")


def test_another_machine_is_told_to_cmake(tmp_path: Path) -> None:
    found = compilers(tmp_path, OTHER, "2.17")
    assert f"-DCMAKE_SYSTEM_PROCESSOR={OTHER}" in found["SKBUILD_CMAKE_ARGS"]


def wheel_of(folder: Path, *names: str) -> Path:
    path = folder / "fwl_export-1-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, "")
    return path


def test_a_wheel_without_libraries_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WheelError, match=r"has no .*libfwl_ort\.so: CMake could not build it"):
        check(wheel_of(tmp_path, "fwl_export/__init__.py"))


def test_libraries_that_a_release_must_not_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = wheel_of(tmp_path, *LIBRARIES)

    def read(exports: set[str] | None = None, stays_loaded: bool = True) -> None:
        monkeypatch.setattr(
            build_wheel,
            "read_library",
            lambda archive, name: Library(exports or LIBRARIES[name], stays_loaded),
        )
        check(wheel)

    read()
    with pytest.raises(WheelError, match=r"libfwl_ort\.so exports \['_ZdlPv'\]; expected"):
        read({"_ZdlPv"})
    with pytest.raises(WheelError, match="is not linked with -z nodelete"):
        read(stays_loaded=False)


def test_missing_tools_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["build_wheel", "-o", str(tmp_path / "dist")])
    monkeypatch.setattr(build_wheel.importlib.util, "find_spec", lambda name: None)
    assert build_wheel.main() == 1
    assert capsys.readouterr().err == (
        "error: building a release needs auditwheel, build, elftools, wheel, ziglang; "
        "pip install -e '.[release]'\n"
    )
    assert not (tmp_path / "dist").exists()
