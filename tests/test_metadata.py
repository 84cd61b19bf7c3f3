"""What the project says of itself agrees: versions of Python, its own version, make's targets."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path

import pytest

from fwl_export import __version__

REPOSITORY = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))


def read(name: str) -> str:
    return (REPOSITORY / name).read_text(encoding="utf-8")


def pythons_of_classifiers() -> list[str]:
    """Return the Pythons of the classifiers."""
    classifiers = "\n".join(PYPROJECT["project"]["classifiers"])
    return re.findall(r"^Programming Language :: Python :: (3\.\d+)$", classifiers, re.MULTILINE)


def test_the_oldest_python_is_the_same_everywhere() -> None:
    oldest = pythons_of_classifiers()[0]
    assert PYPROJECT["project"]["requires-python"] == f">={oldest}"
    assert PYPROJECT["tool"]["ruff"]["target-version"] == f"py{oldest.replace('.', '')}"
    assert f"OLDEST = ({oldest.replace('.', ', ')})" in read("tools/install.py")


def test_workflows_test_the_pythons_of_the_classifiers() -> None:
    (ci,) = re.findall(r"python: \[(.*)\]", read(".github/workflows/ci.yml"))
    (release,) = re.findall(r"python: \[(.*)\]", read(".github/workflows/release.yml"))
    assert re.findall(r"3\.\d+", release) == pythons_of_classifiers()
    assert re.findall(r"3\.\d+", ci) == [*pythons_of_classifiers(), "3.14"]  # that one may fail
    images = re.findall(r"python:(3\.\d+)-", read("docker/cpu.Dockerfile"))
    assert set(images) <= {*pythons_of_classifiers()}


def test_the_platforms_page_has_a_row_for_every_python() -> None:
    rows = dict(re.findall(r"^\| (3\.\d+) \| (.*?) \|", read("docs/platforms.md"), re.MULTILINE))
    assert [
        version for version, state in rows.items() if "tested" in state
    ] == pythons_of_classifiers()


def test_the_version_is_written_once() -> None:
    assert "version" not in PYPROJECT["project"]
    assert PYPROJECT["project"]["dynamic"] == ["version"]
    provider = PYPROJECT["tool"]["scikit-build"]["metadata"]["version"]
    assert provider["input"] == "fwl_export/__init__.py"
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.dev\d+|rc\d+)?", __version__)


def test_headers_of_fwl_say_what_the_versions_page_says() -> None:
    page = read("docs/versioning.md")
    (abi,) = re.findall(r"#define FWL_ABI_VERSION (\d+)", read("plugins/libfwl/include/fwl/fwl.h"))
    assert f"`FWL_ABI_VERSION` in `fwl/fwl.h`, now {abi}," in page


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("bundle, `manifest.json`", "fwl_export/bundle/manifest.py"),
        ("checkpoint, `config.json`", "fwl_export/bundle/config.py"),
        ("parity report", "fwl_export/parity/report/data.py"),
        ("precision policy", "fwl_export/precision/policy.py"),
        ("engine metadata, `engines/*.json`", "fwl_export/engines/metadata.py"),
    ],
)
def test_schema_versions_are_those_of_the_versions_page(file: str, source: str) -> None:
    (version,) = re.findall(r"^SCHEMA_VERSION = (\d+)", read(source), re.MULTILINE)
    assert f"| {file} | `schema_version` | {version} |" in read("docs/versioning.md")


def test_help_lists_every_target_in_80_columns() -> None:
    makefile = read("Makefile")
    (phony,) = re.findall(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    shown = subprocess.run(
        ["make", "-s", "help"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    ).stdout
    assert sorted(re.findall(r"^  make ([\w-]+)", shown, re.MULTILINE)) == sorted(phony.split())
    assert max(map(len, shown.splitlines())) <= 80
