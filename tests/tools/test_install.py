"""The installer: what it says while pip works, when it does nothing, and what a failure shows."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import pytest

from tools import install
from tools.install import expected, explain, fingerprint, heartbeat, progress, run_pip


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (
            "  Downloading torch-2.13.0+cpu-cp311-cp311-manylinux_2_28_x86_64.whl (190.4 MB)\n",
            "downloading torch-2.13.0+cpu, 190 MB",
        ),
        (
            "Using cached big-1.0-py3-none-any.whl (1.5 GB)",
            "taking from pip's cache big-1.0, 1500 MB",
        ),
        ("Downloading small-1.0-py3-none-any.whl (64 kB)", ""),
        ("Downloading middle-1.0-py3-none-any.whl.metadata (9.9 MB)", ""),
        ("Installing collected packages: mpmath, sympy, torch", "unpacking 3 packages"),
        ("Collecting torch", ""),
    ],
)
def test_lines_of_pip_that_a_user_sees(line: str, text: str) -> None:
    assert progress(line) == text


def test_large_packages_are_named() -> None:
    assert expected("import,plots") == ""
    assert expected("cpu") == "Large: ONNX Runtime. Usually 1 to 3 minutes."
    text = expected("export, rtx,dev")
    assert text.startswith("Large: torch, TensorRT-RTX, Triton. About 400 MB")


def test_the_fingerprint_depends_on_the_options() -> None:
    found = {fingerprint(*options) for options in [("cpu", []), ("gpu", []), ("cpu", ["-v"])]}
    assert len(found) == 3
    assert fingerprint("cpu", []) in found


def test_output_goes_to_the_log_and_the_exit_code_comes_back(tmp_path: Path) -> None:
    said: list[str] = []
    program = "print('Installing collected packages: a, b'); raise SystemExit('no such package')"
    code = run_pip([sys.executable, "-c", program], tmp_path / "log", said.append)
    assert code == 1
    assert said == ["unpacking 2 packages"]
    assert (tmp_path / "log").read_text().splitlines()[1:] == ["no such package"]


def test_a_long_step_is_repeated_while_it_lasts() -> None:
    said: list[str] = []
    repeated = threading.Event()

    def say(line: str) -> None:
        said.append(line)
        if line.startswith("still"):
            repeated.set()

    with heartbeat(say, seconds=0.01) as doing:
        doing("unpacking 2 packages")
        assert repeated.wait(60)
    assert "unpacking 2 packages" in said
    assert said[-1] in {"still unpacking 2 packages", "unpacking 2 packages"}


def test_lines_fit_80_columns(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").touch()
    monkeypatch.setattr(install, "run_pip", lambda command, log, say: 0)
    assert install.install(tmp_path, "export,cpu,rtx,hf,dev", []) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "[   0 s] installing fwl-export[export,cpu,rtx,hf,dev]" in lines[0]
    assert max(map(len, lines[:-1])) < 80


def test_a_failure_shows_the_end_of_the_log_and_what_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "install.log"
    log.write_text("".join(f"line {i}\n" for i in range(40)))
    explain(log)
    shown = capsys.readouterr().err.splitlines()
    assert shown[0] == "  line 25"
    assert shown[14] == "  line 39"
    assert shown[15].startswith("error: pip failed")
    assert any("PIP_ARGS" in line for line in shown[16:])


def run(monkeypatch: pytest.MonkeyPatch, venv: Path, *options: str) -> int:
    monkeypatch.setattr(sys, "argv", ["install.py", "--venv", str(venv), *options])
    return install.main()


def test_nothing_is_installed_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, list[str]]] = []

    def fake(venv: Path, extras: str, pip_options: list[str]) -> int:
        calls.append((extras, pip_options))
        return 1 if extras == "broken" else 0

    monkeypatch.setattr(install, "install", fake)
    assert run(monkeypatch, tmp_path, "--extras", "cpu", "--", "-v") == 0
    assert run(monkeypatch, tmp_path, "--extras", "cpu", "--", "-v") == 0
    assert calls == [("cpu", ["-v"])]
    assert run(monkeypatch, tmp_path, "--extras", "broken") == 1
    assert run(monkeypatch, tmp_path, "--extras", "cpu") == 0
    assert len(calls) == 3


def test_an_old_python_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(install, "OLDEST", (99, 0))
    assert run(monkeypatch, tmp_path) == 1
    assert "fwl-export needs Python 99.0 or newer" in capsys.readouterr().err
