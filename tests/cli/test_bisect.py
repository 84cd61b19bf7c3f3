"""`fwl-export bisect` as a user meets it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.run import run
from tests.parity import faults
from tests.parity.faults import broken_bundle


def test_a_good_bundle_exits_with_0(
    own_bundle: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = run(capsys, "bisect", own_bundle, "--text", text, "--tokens", 20)
    assert result.code == 0, result.err
    assert "nothing found: every call is within its budget" in result.out
    assert not (own_bundle / "reports").exists()


def test_a_fault_exits_with_1_and_leaves_a_reproducer(
    tiny_bundle: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = broken_bundle(tiny_bundle, tmp_path / "broken", faults.plain_relu()).folder
    arguments = ("bisect", bundle, "--candidate", "onnxruntime:no-plugin", "--text", text)
    result = run(capsys, *arguments, "--tokens", 40)
    assert result.code == 1, result.err
    assert "FOUND      backbone.blocks.0.rest / Identity" in result.out
    assert (bundle / "reports" / "bisect" / "repro.py").is_file()
    again = run(capsys, *arguments, "--tokens", 40, "--json")
    assert again.code == 1, again.err
    data = json.loads(again.out)
    assert data["finding"]["op_type"] == "Identity"
    assert data["finding"]["fault"] == "file"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--candidate", "tensorrt:rtx"), "'tensorrt:rtx' cannot run here"),
        (
            ("--candidate", "torch", "--plugin", "x.so"),
            "--plugin works only with candidate onnxruntime",
        ),
        (("--plugin", "nowhere.so", "--tokens", 20), "plugin 'nowhere.so' does not exist"),
        (("--tokens", 500), "the text has"),
    ],
)
def test_a_search_that_cannot_run_exits_with_2(
    options: tuple[object, ...],
    message: str,
    own_bundle: Path,
    text: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    result = run(capsys, "bisect", own_bundle, "--text", text, *options)
    assert result.code == 2
    assert message in result.err
    assert "Traceback" not in result.err


def test_a_folder_of_something_else_is_not_replaced(
    own_bundle: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    arguments = ("--text", text, "--reproducer", tmp_path / "mine")
    result = run(capsys, "bisect", own_bundle, *arguments)
    assert result.code == 2
    assert "contains files that are not a reproducer" in result.err
    assert (tmp_path / "mine" / "thesis.txt").is_file()
