"""`fwl-export check` as a user meets it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import fwl_export.demo
from tests.cli.run import run
from tests.parity import faults
from tests.parity.faults import broken_bundle

TEXT = "EXIT, PURSUED BY A BEAR. THOU MET'ST WITH THINGS DYING, I WITH THINGS NEW-BORN. "


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "play.txt"
    path.write_text(TEXT * 3)
    return path


def test_a_good_bundle_passes_and_leaves_a_report(
    own_bundle: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = run(capsys, "check", own_bundle, "--text", text, "--tokens", 60)
    assert result.code == 0, result.err
    lines = result.out.splitlines()
    assert lines[0].startswith("onnxruntime against PyTorch fp64")
    assert lines[1].startswith("play.txt: 60 tokens in ")
    assert lines[-2].startswith("within budget: ")
    target = own_bundle / "reports" / "parity.json"
    assert lines[-1].endswith(f"report: {target}")
    report = json.loads(target.read_text())
    assert report["passed"] is True
    assert (report["text"], report["tokens"], report["seed"]) == ("play.txt", 60, 0)
    assert [path.name for path in target.parent.iterdir()] == ["parity.json"]
    assert run(capsys, "inspect", own_bundle).code == 0, "the bundle is as it was"


def test_json_goes_to_standard_output_and_the_report_where_it_is_asked_for(
    own_bundle: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "new" / "report.json"
    arguments = ("--text", text, "--tokens", 30, "--seed", 3, "--report", target, "--json")
    result = run(capsys, "check", own_bundle, *arguments)
    assert result.code == 0, result.err
    assert json.loads(result.out) == json.loads(target.read_text())
    assert json.loads(result.out)["seed"] == 3
    assert not (own_bundle / "reports").exists()


def test_the_default_text_is_the_held_out_play(
    own_bundle: Path,
    text: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(fwl_export.demo, "HELD_OUT_PLAY", text)
    result = run(capsys, "check", own_bundle, "--tokens", 20)
    assert result.code == 0, result.err
    assert "play.txt: 20 tokens" in result.out


@pytest.mark.parametrize(
    ("fault", "tensor"),
    [
        (faults.weight("fast_weights.up_kernel", (2, 3), factor=1.01), "pending.up"),
        (faults.stale("cache.0.key"), "cache.0.key"),
    ],
    ids=["one weight", "stale cache"],
)
def test_a_broken_bundle_exits_with_1_and_says_where_and_what_next(
    fault: faults.Fault,
    tensor: str,
    tiny_bundle: Path,
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    broken = broken_bundle(tiny_bundle, tmp_path / "broken", fault).folder
    result = run(capsys, "check", broken, "--text", text, "--tokens", 40)
    assert result.code == 1
    assert "OUTSIDE BUDGET: " in result.out
    assert f"error: onnxruntime is outside its budget first in '{tensor}" in result.err
    assert "Export the bundle again and repeat the check" in result.err
    assert str(broken / "reports" / "parity.json") in result.err
    assert "Traceback" not in result.err
    assert json.loads((broken / "reports" / "parity.json").read_text())["passed"] is False


def test_nan_exits_with_1_and_names_the_first_step(
    tiny_bundle: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fault = faults.not_a_number("fast.down.bias", 20)
    broken = broken_bundle(tiny_bundle, tmp_path / "broken", fault).folder
    result = run(capsys, "check", broken, "--text", text, "--tokens", 40, "--json")
    assert result.code == 1
    assert "could not go on at call" in result.err
    assert "state 'fast.down.bias' is nan in row " in result.err
    assert json.loads(result.out)["candidates"][0]["failure"]["runtime"] == "onnxruntime"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"TOO SHORT", "the text has 9 tokens; reading 60 and predicting the next takes 61"),
        (b"\xff\xfe\xff", "as text"),
        (b"", "has 0 tokens"),
    ],
)
def test_texts_that_cannot_be_used(
    content: bytes,
    message: str,
    own_bundle: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "bad.txt"
    path.write_bytes(content)
    result = run(capsys, "check", own_bundle, "--text", path, "--tokens", 60)
    assert result.code == 1
    assert message in result.err
    assert not (own_bundle / "reports").exists()
