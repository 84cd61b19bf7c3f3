"""Headers are taken from the pinned wheel and from no other."""

from __future__ import annotations

import dataclasses
import hashlib
import zipfile
from pathlib import Path

import pytest

from tools.fetch_headers import SOURCES, FetchError, Source, extract


def _wheel(folder: Path) -> tuple[Path, Source]:
    wheel = folder / "some-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("a/b/header.h", "int x;")
        archive.writestr("a/code.py", "")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    return wheel, Source("some==1.0", digest, ("a/b/header.h",))


def test_headers_alone_are_extracted(tmp_path: Path) -> None:
    wheel, source = _wheel(tmp_path)
    extract(wheel, source, tmp_path / "to")
    assert [p.name for p in (tmp_path / "to").iterdir()] == ["header.h"]
    assert (tmp_path / "to" / "header.h").read_text(encoding="utf-8") == "int x;"


def test_another_wheel_is_refused(tmp_path: Path) -> None:
    wheel, source = _wheel(tmp_path)
    other = dataclasses.replace(source, sha256="0" * 64)
    with pytest.raises(FetchError, match=r"has sha256 .*; expected 0000"):
        extract(wheel, other, tmp_path / "to")
    assert not (tmp_path / "to").exists()


@pytest.mark.parametrize("name", SOURCES)
def test_every_source_is_pinned(name: str) -> None:
    assert "==" in SOURCES[name].requirement
    assert len(SOURCES[name].sha256) == 64
    assert SOURCES[name].headers or SOURCES[name].folder
