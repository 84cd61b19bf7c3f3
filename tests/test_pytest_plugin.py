"""The fixture `fwl_parity` in a test suite outside this project."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.parity import faults
from tests.parity.faults import broken_bundle

TESTS = """
import pytest

@pytest.mark.parametrize("bundle", {bundles!r})
def test_parity(fwl_parity, bundle):
    report = fwl_parity(bundle, ["onnxruntime:no-plugin"], tokens=20, text={text!r}, cases="text")
    assert report.passed
"""


def test_it_fails_where_a_bundle_is_outside_and_shows_the_summary(
    tiny_bundle: Path, tmp_path: Path
) -> None:
    broken = broken_bundle(tiny_bundle, tmp_path / "broken", faults.stale("cache.0.key")).folder
    text = tmp_path / "play.txt"
    text.write_text("EXIT, PURSUED BY A BEAR. " * 4)
    bundles = [str(tiny_bundle), str(broken)]
    (tmp_path / "test_it.py").write_text(TESTS.format(bundles=bundles, text=str(text)))
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "fwl_export.pytest_plugin", "--junitxml=j.xml", "."],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "1 failed, 1 passed" in done.stdout, done.stdout + done.stderr
    assert "is outside its budget, first in 'cache.0.key'" in done.stdout
    assert "fwl_parity" in done.stdout
    assert "drift: rel RMS of logits at token" in done.stdout
    assert 'value="within budget: ' in (tmp_path / "j.xml").read_text()


def test_the_plugin_imports_nothing_heavy() -> None:
    script = (
        "import sys, fwl_export.pytest_plugin\n"
        "print([m for m in ('numpy', 'torch', 'onnx', 'onnxruntime') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_pytest_finds_it_where_the_package_is_installed() -> None:
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    assert '"fwl_export.pytest_plugin" = "fwl_export.pytest_plugin"' in text
    assert pytest.importorskip("fwl_export.pytest_plugin").fwl_parity
