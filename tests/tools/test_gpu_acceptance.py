"""The acceptance refuses to run without a GPU, and its report fails if one step fails."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from fwl_export.bundle.manifest import read_bundle
from fwl_export.engines.device import Device, Driver
from fwl_export.errors import EngineError
from tests.tensorrt_fake import Machine, fake_machine
from tools import gpu_acceptance
from tools.gpu_acceptance import Step, assemble, bench, parity, run_step, steps_of

GPU = Device("Fake One", 89)


def test_without_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    none = Driver("", (), "libcuda.so.1 is not here")
    monkeypatch.setattr(gpu_acceptance, "query_driver", lambda: none)
    monkeypatch.setattr(sys, "argv", ["gpu_acceptance", "-o", str(tmp_path / "report.json")])
    assert gpu_acceptance.main() == 1
    assert capsys.readouterr().err == (
        "error: the acceptance needs an NVIDIA GPU, but there is no CUDA device: libcuda.so.1 is "
        "not here; run it on a machine that has one\n"
    )
    assert not list(tmp_path.iterdir())


def failing(error: Exception) -> Any:
    raise error


def test_a_step_that_fails_is_an_outcome() -> None:
    step = run_step("build", lambda: failing(EngineError("no engine")))
    assert (step.passed, step.text) == (False, "EngineError: no engine")
    assert "ZeroDivisionError" in run_step("bench", lambda: (1 // 0, "", None)).text
    assert run_step("good", lambda: (True, "fine", {"n": 1})).data == {"n": 1}


def test_the_report() -> None:
    good, bad = (Step(str(ok), ok, "one\ntwo", None, 1.0) for ok in (True, False))
    assert assemble(GPU, [good])["passed"]
    assert not assemble(GPU, [good, bad])["passed"]
    assert not assemble(GPU, [])["passed"]
    report = json.loads(json.dumps(assemble(GPU, [good, bad])))
    assert report["text"].splitlines()[0].startswith("Fake One, SM89")
    assert "FAILED  False" in report["text"]
    assert report["text"].endswith("not accepted")


def test_all_steps_with_stand_ins(
    own_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stand_in(*arguments: Any) -> tuple[bool, str, Any]:
        return True, "done", None

    for name in ("build", "child", "command"):
        monkeypatch.setattr(gpu_acceptance, name, stand_in)
    monkeypatch.setattr(gpu_acceptance, "query_driver", lambda: Driver("13.0", (GPU,), ""))
    monkeypatch.setattr(gpu_acceptance, "export", lambda folder: read_bundle(own_bundle))
    monkeypatch.setattr(gpu_acceptance, "usable_variants", lambda sm: ["rtx"])
    output = tmp_path / "report.json"
    assert gpu_acceptance.accept(output) == 0
    names = [step["name"] for step in json.loads(output.read_text())["steps"]]
    expected = ["build", "parity", "bench-graph", "bench"]
    assert names == [*(f"{name} rtx" for name in expected), "bench op", "gpu tests"]
    monkeypatch.setattr(gpu_acceptance, "usable_variants", lambda sm: [])
    assert gpu_acceptance.accept(output) == 1
    assert "no installed variant builds for SM89" in json.loads(output.read_text())["text"]
    assert list(steps_of(read_bundle(own_bundle), GPU, []))[-1] == "build"


def test_the_parity_check_on_fakes(
    own_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_acceptance, "TOKENS", 40)
    play = tmp_path / "play.txt"
    play.write_text("ONCE MORE UNTO THE BREACH, DEAR FRIENDS. " * 4, encoding="utf-8")
    monkeypatch.setattr(gpu_acceptance, "HELD_OUT_PLAY", play)
    machine: Machine
    with fake_machine(tmp_path) as machine:
        machine.build(own_bundle)
        passed, text, data = parity(read_bundle(own_bundle), "rtx")
        assert passed, text
        assert "within budget" in text
        assert data["passed"]


def test_the_bench_on_fakes(
    own_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_acceptance, "DECODE_STEPS", 3)
    monkeypatch.setattr(gpu_acceptance, "PREFILL_CALLS", 2)
    machine: Machine
    with fake_machine(tmp_path) as machine:
        machine.build(own_bundle)
        passed, _, data = bench(read_bundle(own_bundle), "rtx", True)
        assert passed
        assert (data["decode"]["tokens"], data["prefill"]["tokens"]) == (1, 16)
        assert machine.cuda.launches > 3
