"""`--json`: one document on standard output and nothing else there, from every verb."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from fwl_export.cli import demo
from fwl_export.runtimes.text import Score
from tests.bundles import MAX_TOKENS, write_checkpoint
from tests.cli.run import run
from tests.cli.test_help import COMMANDS, RUNNABLE
from tests.importers.test_paper import jax_tree


@pytest.mark.parametrize("path", RUNNABLE)
def test_every_verb_accepts_json(path: str) -> None:
    assert "json" in {parameter.name for parameter in COMMANDS[path].params}


def test_export(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint")
    options = ("-o", tmp_path / "out", "--max-tokens", MAX_TOKENS, "--json")
    result = run(capfd, "export", checkpoint, *options)  # capfd: what libraries print, too
    assert result.code == 0, result.err
    data = json.loads(result.out)
    assert data["bundle"] == str(tmp_path / "out")
    assert data["manifest"]["opset"] == 20
    assert data["bytes"] > data["state_bytes_per_session"] > 0
    assert "export: tracing" in result.err


def test_generate(tiny_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ("generate", tiny_bundle, "--prompt", "THE", "--max-new", 12, "--seed", 1)
    data = json.loads(run(capsys, *command, "--json").out)
    assert len(data["tokens"]) == 12
    assert run(capsys, *command).out.rstrip("\n") == (data["prompt"] + data["text"]).rstrip("\n")


def test_import(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(tmp_path / "a.npz", **jax_tree())
    options = ("--loss-normalizer", 40, "-o", tmp_path / "out", "--json")
    result = run(capsys, "import", "jax", tmp_path / "a.npz", *options)
    assert result.code == 0, result.err
    data = json.loads(result.out)
    assert data["checkpoint"] == str(tmp_path / "out")
    assert data["backbone"] is None
    assert (data["vocab_size"], data["fast_weights"]["loss_normalizer"]) == (64, 40)


def test_demo(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def steps(*_: object) -> tuple[Score, Score]:
        print("what the steps print")
        return Score(10, 0.0, 2.0), Score(10, math.log(7), 1.0)

    report = {"passed": True, "candidates": [{"use": 0.25}, {"use": 0.5}]}
    monkeypatch.setattr(demo, "_run_steps", steps)
    monkeypatch.setattr(demo, "_read_report", lambda output: report)
    result = run(capsys, "demo", "-o", tiny_bundle, "--json")
    assert result.code == 0, result.err
    data = json.loads(result.out)
    assert data["parity"] == {"passed": True, "use": 0.5}
    assert data["score"]["perplexity"] == {
        "adapting": 1.0,
        "adaptation_off": pytest.approx(7.0),
    }
    assert data["engines"] == []
    assert "what the steps print" in result.err


def test_an_error_leaves_standard_output_empty(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = run(capsys, "inspect", tmp_path, "--json")
    assert (result.code, result.out) == (1, "")
    assert result.err.startswith("error: ")
