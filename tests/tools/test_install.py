"""The installer: what it says while pip works, when it does nothing, and what a failure shows."""

from __future__ import annotations

import hashlib
import re
import sys
import threading
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest

from tools import install
from tools.install import REPOSITORY, expected, explain, fingerprint, heartbeat, progress, run_pip


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
    monkeypatch.setattr(install, "install_locked", lambda *arguments: 0)
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

    def fake(venv: Path, extras: str, pip_options: list[str], package: Path) -> int:
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


def test_every_pin_has_hashes() -> None:
    for lock in install.read_locks():
        assert lock
        assert [name for name, pin in lock.items() if not pin.hashes] == []
        assert all(len({*pin.hashes}) == len(pin.hashes) for pin in lock.values())
    main, _ = install.read_locks()
    assert {*install.BUILD, "torch", "numpy", "msgspec", "allpairspy", "triton"} <= {*main}


def test_every_requirement_of_the_project_is_pinned() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    installed = ("export", "tensorboard", "hf", "cpu", "rtx", "import", "plots", "docs", "dev")
    wanted = [*project["dependencies"], *(line for extra in installed for line in extras[extra])]
    names = {install.normalized(re.split(r"[^\w.-]", line)[0]) for line in wanted}
    assert names - {*install.read_locks()[0]} == {"fwl-export"}


def item(name: str, version: str, sha256: str = "") -> dict[str, Any]:
    info: dict[str, Any] = {"archive_info": {"hashes": {"sha256": sha256}}} if sha256 else {}
    return {"metadata": {"name": name, "version": version}, "download_info": info}


def test_what_pip_chose_is_installed_by_the_hashes_of_the_constraints() -> None:
    a, b, c, d = ("a" * 64, "b" * 64, "c" * 64, "d" * 64)
    main = install.read_lock(
        f"# pins\ntorch==2.13.0 \\\n    --hash=sha256:{a} \\\n    --hash=sha256:{b}\n"
        f"triton==3.8.0 --hash=sha256:{c}\n"
    )
    cuda = install.read_lock(f"triton==3.7.1 --hash=sha256:{d}\n")
    locked = (main, cuda)
    assert [pin.name for pin in install.free(locked)] == ["torch"]
    found = [item("torch", "2.13.0+cpu"), item("Triton", "3.7.1"), item("fwl_export", "0.2.0")]
    lines, loose = install.chosen(found, locked)
    assert lines == [
        f"torch==2.13.0+cpu --hash=sha256:{a} --hash=sha256:{b}\n",
        f"triton==3.7.1 --hash=sha256:{d}\n",
    ]
    assert loose == []
    lines, loose = install.chosen([item("tensorrt", "10.14", a)], locked)
    assert lines == [f"tensorrt==10.14 --hash=sha256:{a}\n"]
    assert loose == ["tensorrt 10.14"]
    # Without any hash pip refuses the line, in its hash-checking mode.
    assert install.chosen([item("tensorrt", "10.14")], locked)[0] == ["tensorrt==10.14\n"]


def test_pip_refuses_a_file_with_another_hash(tmp_path: Path) -> None:
    """The hashes decide: pip, as it is called here, takes no file that is not listed."""
    wheel = tmp_path / "planted-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("planted.py", "")
        archive.writestr("planted-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(
            "planted-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: planted\nVersion: 1.0\n"
        )
        archive.writestr("planted-1.0.dist-info/RECORD", "")
    right = hashlib.sha256(wheel.read_bytes()).hexdigest()
    log = tmp_path / "log"
    for digest, code in ((right, 0), ("0" * 64, 1)):
        file = tmp_path / "requirements.txt"
        file.write_text(install.wanted_line(install.Pin("planted", "1.0", ()), [digest]))
        command = [sys.executable, "-m", "pip", "install", "--target", str(tmp_path / digest[:4])]
        command += ["--no-index", "--find-links", str(tmp_path), "--no-deps", "--require-hashes"]
        found = install.run_pip([*command, "-r", str(file)], log, lambda line: None)
        assert (found != 0) == bool(code), log.read_text()
    assert "DO NOT MATCH THE HASHES" in log.read_text()
