"""`fwl-export bench session`: it measures every implementation and ends with a line of JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("onnxruntime")

from fwl_export.bench import session as bench
from tests.cli.run import run
from tests.libfwl.conftest import libfwl  # noqa: F401 - fixture
from tests.plugins.conftest import builds, libraries, ort_library  # noqa: F401 - fixtures


@pytest.mark.slow
def test_bench(
    tiny_bundle: Path,
    libfwl: Path,  # noqa: F811 - the fixture
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(bench, "REST_SECONDS", 0.0)
    arguments = ("--tokens", "1,8", "--batch", "2", "--rounds", "2", "--threads", "1")
    library = ("--libfwl", libfwl / "libfwl.so", "--plugin", "none")
    result = run(capsys, "bench", "session", tiny_bundle, *arguments, *library)
    assert result.code == 0, result.err
    *shown, last = result.out.splitlines()
    assert max(map(len, shown)) <= 80
    found = json.loads(last)
    assert [r["tokens"] for r in found["results"]] == [1, 8]
    for each in found["results"]:
        assert set(each["p50"]) == set(each["ratio"]) == {"raw", "session", "libfwl"}
        assert all(0 < each["p50"][name] <= each["p99"][name] for name in each["p50"])
        assert each["ratio"]["raw"] == 1
    assert found["memory"]["state"] > 0


def test_wrong_arguments(tiny_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = run(capsys, "bench", "session", tiny_bundle, "--tokens", "3")
    assert result.code == 2
    assert "expected divisors of 16" in " ".join(result.err.split())
    arguments = ("--tokens", "1", "--batch", "1", "--libfwl", tiny_bundle / "manifest.json")
    result = run(capsys, "bench", "session", tiny_bundle, *arguments)
    assert (result.code, "cannot be loaded" in result.err) == (1, True)
