"""The SBOM: our version, no entry for ourselves, and every component that is compiled in."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from fwl_export import __version__
from tools import write_sbom
from tools.fetch_headers import SOURCES
from tools.write_sbom import COMPILED_IN, REPOSITORY, completed

SBOM = {
    "bomFormat": "CycloneDX",
    "metadata": {"component": {"name": "fwl-export", "type": "library"}},
    "components": [{"name": "numpy", "version": "2"}, {"name": "fwl-export", "version": "0"}],
}


def test_what_is_compiled_in_is_added() -> None:
    found = completed(SBOM)
    names = [component["name"] for component in found["components"]]
    assert names == ["numpy", *(name for name, _, _ in COMPILED_IN)]
    assert found["metadata"]["component"]["version"] == __version__
    assert len({c["bom-ref"] for c in found["components"][1:]}) == len(COMPILED_IN)


def test_versions_are_those_of_the_notices() -> None:
    notices = (REPOSITORY / "THIRD_PARTY_NOTICES.md").read_text(encoding="utf-8")
    for name, version, _ in COMPILED_IN:
        short = name.partition(" ")[0]
        assert re.search(rf"{re.escape(short)}", notices), name
        assert version.rpartition(".")[0] in notices
    versions = {name: version for name, version, _ in COMPILED_IN}
    assert SOURCES["json"].requirement == f"nlohmann-json=={versions['nlohmann/json']}"


def test_without_cyclonedx_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["write_sbom", "-o", str(tmp_path / "sbom.json")])
    monkeypatch.setattr(write_sbom.importlib.util, "find_spec", lambda name: None)
    assert write_sbom.main() == 1
    assert "pip install -e '.[release]'" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
