"""Shell completion: what is offered, for bash, zsh and fish, and that it stays quick to load."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.cli.run import run

SHELLS = ("bash", "zsh", "fish")


def complete(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, line: str
) -> list[str]:
    """Return what bash would offer for the last word of a line."""
    words = line.split(" ")
    monkeypatch.setenv("_FWL_EXPORT_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", line)
    monkeypatch.setenv("COMP_CWORD", str(len(words) - 1))
    return run(capsys).out.split()


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("fwl-export ex", ["export"]),
        ("fwl-export bench ", ["op", "session"]),
        ("fwl-export import t", ["tf"]),
        ("fwl-export score b --runt", ["--runtime"]),
        ("fwl-export score b --runtime o", ["onnxruntime", "onnx-reference"]),
        ("fwl-export generate b --runtime tor", ["torch"]),
        ("fwl-export build b --variant ", ["rtx", "tensorrt"]),
        ("fwl-export build b --plugin re", ["required"]),
        ("fwl-export build b --sm 80,8", ["80,86", "80,89"]),
        ("fwl-export export demo --precision ", ["fp32", "fp16"]),
        ("fwl-export export de", ["demo"]),
        ("fwl-export precision demo --target i", ["int8w"]),
        ("fwl-export read b f --compress l", ["lowrank"]),
        (
            "fwl-export check b --cases text,m",
            ["text,mixed1", "text,mixed2", "text,mixed5", "text,mixed8"],
        ),
        ("fwl-export check b --candidates torch,onnx-", ["torch,onnx-reference"]),
        ("fwl-export bisect b --candidate onnx-", ["onnx-reference"]),
        # Nothing offered: the shell completes paths.
        ("fwl-export score ", []),
        ("fwl-export score b fi", []),
        ("fwl-export train ", []),
        ("fwl-export check b --text ", []),
        ("fwl-export export ", []),
    ],
)
def test_what_is_offered(
    line: str,
    offered: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert complete(capsys, monkeypatch, line) == offered


def test_old_names_of_options_are_not_offered(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "--backend" not in complete(capsys, monkeypatch, "fwl-export score b --")
    assert "--flavour" not in complete(capsys, monkeypatch, "fwl-export build b --")


@pytest.mark.parametrize("shell", SHELLS)
def test_the_script_of_a_shell(
    shell: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shellingham.detect_shell", lambda: (shell, f"/bin/{shell}"))
    result = run(capsys, "--show-completion")
    assert result.code == 0, result.err
    assert f"_FWL_EXPORT_COMPLETE=complete_{shell}" in result.out


@pytest.mark.parametrize("shell", SHELLS)
def test_every_shell_completes_verbs_and_loads_nothing_heavy(shell: str) -> None:
    environment = {
        "_FWL_EXPORT_COMPLETE": f"complete_{shell}",
        "COMP_WORDS": "fwl-export ins",
        "COMP_CWORD": "1",
        "_TYPER_COMPLETE_ARGS": "fwl-export ins",
        "_TYPER_COMPLETE_FISH_ACTION": "get-args",
    }
    code = """
import sys
from fwl_export.cli.main import main
sys.argv = ["fwl-export"]
try:
    main()
except SystemExit as end:
    assert not end.code
print({"torch", "onnx", "numpy", "tokenizers", "onnxruntime"} & set(sys.modules))
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    *offered, heavy = done.stdout.splitlines()
    assert "inspect" in "\n".join(offered)
    assert heavy == "set()"
