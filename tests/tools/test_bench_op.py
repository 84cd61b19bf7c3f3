"""The bench runs on a tiny size and ends with one line of JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("onnxruntime")

from tests.plugins.conftest import builds, ort_library  # noqa: F401 - fixtures
from tools import bench_op


def test_bench(
    ort_library: Path,  # noqa: F811 - the fixture
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = "--sizes 8x16 --tokens 1,3 --threads 1 --rounds 3 --budget 0"
    monkeypatch.setattr(bench_op, "_REST_SECONDS", 0.0)
    monkeypatch.setattr(sys, "argv", ["bench_op", *arguments.split(), "--plugin", str(ort_library)])
    assert bench_op.main() == 0
    *_, last = capsys.readouterr().out.splitlines()
    results = json.loads(last)["results"]
    assert [r["tokens"] for r in results] == [1, 3]
    for result in results:
        times, fastest = result["milliseconds"], result["fastest_milliseconds"]
        assert {"ours, one", "ours, two", "body", "torch", "limit"} <= set(times)
        assert all(0 <= fastest[name] <= times[name] for name in times)
