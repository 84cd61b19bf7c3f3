"""`fwl-export bench op` on a tiny size: it measures every peer and ends with a line of JSON."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnxruntime")

from fwl_export.bench import op as bench
from fwl_export.op import reference
from tests.cli.run import run
from tests.plugins.conftest import builds, libraries, ort_library  # noqa: F401 - fixtures
from tests.tolerances import assert_close

PEERS = {"ours, one", "ours, two", "microsoft linear, one", "microsoft gated, two"}
PEERS |= {"body", "torch", "numpy", "limit"}
QUICK = ("--sizes", "8x16", "--threads", "1", "--rounds", "3", "--budget", "0", "--no-compiled")


def test_bench(
    ort_library: Path,  # noqa: F811 - the fixture
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(bench, "REST_SECONDS", 0.0)
    result = run(capsys, "bench", "op", *QUICK, "--tokens", "1,3", "--plugin", ort_library)
    assert result.code == 0, result.err
    *shown, last = result.out.splitlines()
    assert max(map(len, shown)) <= 80
    results = json.loads(last)["results"]
    assert [r["size"]["tokens"] for r in results] == [1, 3]
    for entry in results:
        times, fastest = entry["median"], entry["fastest"]
        assert set(times) >= PEERS
        assert set(times) | set(entry["missing"]) >= {"onnx linear", "onnx gated"}
        assert all(0 <= fastest[name] <= times[name] for name in times)
        assert set(entry["ratios"]) == set(bench.OURS)
        assert all(set(ratios) == set(times) for ratios in entry["ratios"].values())
        assert all(ratios[name] == 1 for name, ratios in entry["ratios"].items())


def test_without_our_kernel_the_others_are_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "REST_SECONDS", 0.0)
    result = run(capsys, "bench", "op", *QUICK, "--tokens", "2", "--plugin", "none", "--json")
    assert result.code == 0, result.err
    (entry,) = json.loads(result.out)["results"]
    assert not any(name.startswith("ours") for name in entry["median"])


@pytest.mark.parametrize(
    "option", [("--sizes", "8"), ("--sizes", "0x4"), ("--tokens", "1,two"), ("--threads", "0")]
)
def test_a_wrong_list_is_named(option: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    result = run(capsys, "bench", "op", *option)
    assert result.code == 2
    assert f"{option[0]} is '{option[1]}'; expected" in " ".join(result.err.split())


def test_ratios_are_of_the_same_rounds() -> None:
    # The second of three rounds was slow for all. One peer is so slow that it is timed only once.
    seconds = {"ours, one": [1.0, 10.0, 2.0], "peer": [3.0, 20.0, 2.0], "slow": [8.0]}
    assert bench._ratios(seconds, "ours, one") == {"ours, one": 1.0, "peer": 2.0, "slow": 4.0}


def test_the_numpy_peer_computes_the_op() -> None:
    rng = np.random.default_rng(0)
    arrays = {
        "query": rng.standard_normal((2, 5, 3)),
        "key": rng.standard_normal((2, 5, 3)),
        "value": rng.standard_normal((2, 5, 4)),
        "decay": rng.random((2, 5)),
        "past_state": rng.standard_normal((2, 3, 4)),
    }
    output, state = bench._numpy_loop(arrays)
    expected, present = reference.linear_attention_update(**arrays)
    assert_close("op.output.float64", output, expected)
    assert_close("op.state.float64", state, present)
