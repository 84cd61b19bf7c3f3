"""The installer: what it says while pip works, when it does nothing, and what a failure shows."""

from __future__ import annotations

import hashlib
import re
import sys
import threading
import tomllib
import zipfile
from pathlib import Path

import pytest

from tools import install
from tools.install import (
    REPOSITORY,
    Pin,
    Source,
    expected,
    explain,
    fingerprint,
    heartbeat,
    progress,
    read_lock,
    run_pip,
)


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

    def fake(venv: Path, extras: str, pip_options: list[str], source: object) -> int:
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


def locks() -> list[dict[str, Pin]]:
    return [read_lock((REPOSITORY / name).read_text(encoding="utf-8")) for name in install.LOCKS]


def test_every_pin_has_hashes() -> None:
    for lock in locks():
        assert lock
        assert [name for name, pin in lock.items() if not pin.hashes] == []
        assert all(len({*pin.hashes}) == len(pin.hashes) for pin in lock.values())
    main, _ = locks()
    assert {*install.BUILD, "torch", "numpy", "msgspec", "allpairspy", "triton"} <= {*main}


def test_every_requirement_of_the_project_is_pinned() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    installed = ("export", "tensorboard", "hf", "cpu", "rtx", "import", "plots", "docs", "dev")
    wanted = [*project["dependencies"], *(line for extra in installed for line in extras[extra])]
    names = {install.normalized(re.split(r"[^\w.-]", line)[0]) for line in wanted}
    assert names - {*locks()[0]} == {"fwl-export"}


def fake_wheel(folder: Path, torch: str) -> None:
    (folder / "wheels").mkdir()
    with zipfile.ZipFile(folder / "wheels" / "torch-1-py3-none-any.whl", "w") as archive:
        archive.writestr("torch-1.dist-info/METADATA", f"Name: torch\n{torch}")


def test_torch_is_not_downloaded_again(tmp_path: Path) -> None:
    folder = tmp_path / "lib" / "python3.11" / "site-packages" / "torch-2.13.0+cpu.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text("Name: torch\n")
    assert install.torch_metadata(tmp_path, "2.13.0")
    assert install.torch_metadata(tmp_path)
    assert not install.torch_metadata(tmp_path, "2.14.0")


@pytest.mark.parametrize(
    ("torch", "triton"),
    [
        ("Requires-Dist: filelock\n", "3.8.0"),
        ('Requires-Dist: nvidia-cublas==13; platform_system == "Linux"\n', "3.7.1"),
        ("Requires-Dist: cuda-toolkit[cublas]==13.0.3\n", "3.7.1"),
    ],
)
def test_only_what_the_extras_need_is_installed_by_its_hash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, torch: str, triton: str
) -> None:
    runs: list[tuple[list[str], dict[str, Pin]]] = []

    def fake(command: list[str], log: Path, say: object) -> int:
        file = tmp_path / "requirements.txt"
        runs.append((command, read_lock(file.read_text(encoding="utf-8"))))
        if "download" in command:
            fake_wheel(tmp_path, torch)
        return 0

    monkeypatch.setattr(install, "run_pip", fake)
    pip = ["python", "-m", "pip", "install", "-v"]
    assert install.install_locked(pip, tmp_path, "export,dev", Source(), print) == 0
    build, download, locked, last = runs
    assert download[0][-2:] == [str(tmp_path / "wheels"), f"torch=={locks()[0]['torch'].version}"]
    assert {*build[1]} == {*install.BUILD}
    for command, _ in (build, locked):
        assert "--require-hashes" in command
        assert "--no-build-isolation" in command
        assert "-v" in command
    assert locked[1]["triton"].version == triton
    assert ("nvidia-cublas" in locked[1]) == (triton == "3.7.1")
    assert {"numpy", "pytest", "allpairspy"} <= {*locked[1]}
    text = (tmp_path / "requirements.txt").read_text(encoding="utf-8")
    assert re.search(r"^/.*/wheels/torch-1-py3-none-any.whl \\\n    --hash", text, re.MULTILINE)
    assert "onnxruntime" not in locked[1]
    assert all(pin.hashes for pin in locked[1].values())
    assert last[0][-4:] == ["--no-deps", "--no-build-isolation", "-e", str(REPOSITORY)]
    assert not (tmp_path / "wheels").exists()


def test_extras_that_are_not_pinned_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []
    said: list[str] = []
    monkeypatch.setattr(install, "run_pip", lambda command, log, say: commands.append(command))
    wheel = tmp_path / "fwl_export-1-py3-none-any.whl"
    wheel.touch()
    pip = ["python", "-m", "pip", "install"]
    source = Source(wheel, frozenset({"numpy", "torch"}))
    install.install_locked(pip, tmp_path, "cpu,gpu", source, said.append)
    numpy = f"numpy=={locks()[0]['numpy'].version}"
    assert said == [
        f"without hashes, as asked: {numpy}",
        "without hashes, because nothing pins them: extras gpu",
    ]
    assert [*pip, "--no-deps", numpy] in commands
    assert "numpy" not in read_lock((tmp_path / "requirements.txt").read_text(encoding="utf-8"))
    assert commands[-1][-2:] == ["--no-build-isolation", f"{wheel}[gpu]"]
    assert not any("download" in command for command in commands)


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
        file.write_text(Pin("planted", "1.0", (digest,)).line())
        command = [sys.executable, "-m", "pip", "install", "--target", str(tmp_path / digest[:4])]
        command += ["--no-index", "--find-links", str(tmp_path), "--no-deps", "--require-hashes"]
        found = install.run_pip([*command, "-r", str(file)], log, lambda line: None)
        assert (found != 0) == bool(code), log.read_text()
    assert "DO NOT MATCH THE HASHES" in log.read_text()
