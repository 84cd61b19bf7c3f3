"""`fwl-export doctor`: what is here, what is missing and what that costs, on one screen."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fwl_export import engines, plugins
from fwl_export.engines.device import Device, Driver
from fwl_export.engines.worker import Probe
from tests.cli.run import run

Doctor = Callable[..., tuple[int, str]]


@pytest.fixture
def doctor(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Doctor:
    """Run the verb with TensorRT-RTX, no GPU and no plugins; returns exit code and output."""
    probes = {
        "rtx": Probe("1.2.3", (80, 120), {"polygraphy": "0.5"}, ""),
        "tensorrt": Probe("", (), {}, "TensorRT is not installed"),
    }
    monkeypatch.setattr(engines, "probe_variant", probes.__getitem__)
    monkeypatch.setattr(engines, "query_driver", lambda: Driver("", (), "libcuda is not here"))
    monkeypatch.setattr(plugins, "FOLDER", tmp_path)

    def doctor(*arguments: str) -> tuple[int, str]:
        result = run(capsys, "doctor", *arguments)
        return result.code, result.out

    return doctor


def hide(monkeypatch: pytest.MonkeyPatch, *hidden: str) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in hidden else find(name)
    )
    for name in hidden:
        monkeypatch.setitem(sys.modules, name, None)


def pieces(output: str) -> dict[str, dict[str, object]]:
    return {piece["name"]: piece for piece in json.loads(output)["pieces"]}


def test_a_machine_that_can_export(doctor: Doctor) -> None:
    code, output = doctor()
    text = " ".join(output.split())
    assert code == 0
    for part in (
        "ok torch 2",
        "ok ONNX Runtime",
        "providers",
        "ok TensorRT-RTX 1.2.3: builds engines for SM 80, 120, without a GPU; Polygraphy 0.5",
        "no TensorRT: for engines for data-center GPUs such as SM90; TensorRT is not installed",
        "no CUDA driver: libcuda is not here: engines can be built here, but not run",
        "no libfwl_ort.so: ONNX Runtime runs the fast-weight update in standard operators",
        "no libfwl_trt.so: TensorRT runs the fast-weight update in standard operators",
        "This machine can export models and run them.",
    ):
        assert part in text


def test_a_machine_with_everything(doctor: Doctor, monkeypatch: pytest.MonkeyPatch) -> None:
    probe = Probe("10.9", (90,), {"polygraphy": "0.5"}, "")
    monkeypatch.setattr(engines, "probe_variant", lambda name: probe)
    driver = Driver("13.0", (Device("Fast One", 90),), "")
    monkeypatch.setattr(engines, "query_driver", lambda: driver)
    code, output = doctor()
    assert code == 0
    assert "ok       CUDA driver 13.0: Fast One (SM 90)" in output
    assert "TensorRT 10.9: builds engines for the GPU that is here, SM 90" in output


def test_a_missing_onnxruntime_costs_exit_code_1(
    doctor: Doctor, monkeypatch: pytest.MonkeyPatch
) -> None:
    hide(monkeypatch, "onnxruntime")
    code, output = doctor()
    assert code == 1
    assert "MISSING  ONNX Runtime: for export and runtime 'onnxruntime'; pip install" in output
    assert "'fwl-export[cpu]'" in output
    assert output.endswith("This machine cannot run models.\n")


def test_a_machine_without_torch_runs_models(
    doctor: Doctor, monkeypatch: pytest.MonkeyPatch
) -> None:
    hide(monkeypatch, "torch")
    code, output = doctor()
    assert code == 0
    assert "no       torch: for export, check and train; pip install" in output
    assert "'fwl-export[export]'" in output
    assert output.endswith("This machine can run models, not export.\n")


def test_one_screen_even_if_everything_is_missing(
    doctor: Doctor, monkeypatch: pytest.MonkeyPatch
) -> None:
    hide(monkeypatch, "torch", "onnx", "onnxscript", "safetensors", "tokenizers", "onnxruntime")
    # The longest reason that is known.
    reason = (
        "TensorRT is installed, but its libraries cannot be loaded (libnvinfer.so.10: cannot open "
        "shared object file: No such file or directory); pip install 'fwl-export[gpu]'"
    )
    monkeypatch.setattr(engines, "probe_variant", lambda name: Probe("", (), {}, reason))
    code, output = doctor()
    assert code == 1
    assert output.count("MISSING") == 3
    lines = output.splitlines()
    assert len(lines) <= 25
    assert max(map(len, lines)) <= 80


def test_json(doctor: Doctor, monkeypatch: pytest.MonkeyPatch) -> None:
    code, output = doctor("--json")
    assert (code, json.loads(output)["can_run"]) == (0, True)
    assert pieces(output)["TensorRT-RTX"]["version"] == "1.2.3"
    assert all(piece["version"] for piece in pieces(output).values() if piece["found"])
    hide(monkeypatch, "tokenizers")
    code, output = doctor("--json")
    assert (code, json.loads(output)["can_run"]) == (1, False)
    assert pieces(output)["tokenizers"]["found"] is False
