"""`-v`, `-q` and `--log-file`, and old names of options, which warn."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest

from tests.cli.run import run


def test_quiet_shows_the_result_and_nothing_else(
    tiny_bundle: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loud = run(capsys, "score", tiny_bundle, text)
    assert loud.err
    quiet = run(capsys, "score", tiny_bundle, text, "-q")
    assert (quiet.code, quiet.err) == (0, "")
    assert "perplexity" in quiet.out
    before = run(capsys, "--quiet", "score", tiny_bundle, text)
    assert (before.code, before.err) == (0, "")


def test_quiet_still_shows_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = run(capsys, "-q", "inspect", tmp_path)
    assert result.code == 1
    assert result.err.startswith("error: ")
    assert result.err.count("\n") == 1


def test_verbose_says_what_is_opened(
    tiny_bundle: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = run(capsys, "score", tiny_bundle, text, "--tokens", 30)
    assert "info: " not in plain.err
    once = run(capsys, "score", tiny_bundle, text, "--tokens", 30, "-v")
    assert "info: " in once.err
    assert "debug: " not in once.err
    assert "model.onnx" in once.err
    for arguments in (("-vv", "score"), ("-v", "score", "-v")):
        twice = run(capsys, *arguments, tiny_bundle, text, "--tokens", 30)
        assert "debug: fwl-export" in twice.err
    assert plain.out.split("perplexity")[0] == once.out.split("perplexity")[0]


@pytest.mark.parametrize("place", ["before", "after"])
def test_a_log_file_is_complete(
    tiny_bundle: Path,
    text: Path,
    tmp_path: Path,
    place: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    log = tmp_path / "run.log"
    option = ("--log-file", log)
    command = ("score", tiny_bundle, text, "--tokens", 30)
    result = run(capsys, *option, *command) if place == "before" else run(capsys, *command, *option)
    assert result.code == 0, result.err
    assert "info: " not in result.err, "the terminal shows no more than without the option"
    lines = log.read_text().splitlines()
    stamp = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3} (DEBUG|INFO) +fwl_export[\w.]*: "
    assert all(re.match(stamp, line) for line in lines)
    assert "fwl-export " in lines[0]
    assert "score" in lines[0]
    assert any("model.onnx" in line for line in lines)
    assert re.search(r"adapting: done in \d+\.\d s", "\n".join(lines))
    assert lines[-1].endswith(" s")
    assert "exit code 0 after" in lines[-1]


def test_a_log_file_tells_how_a_command_failed(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    log = tmp_path / "run.log"
    result = run(capsys, "inspect", tmp_path / "none", "--log-file", log)
    assert result.code == 1
    message = result.err.removeprefix("error: ").strip()
    assert f"ERROR   fwl_export: {message}" in log.read_text()
    assert "exit code 1 after" in log.read_text()

    def bug(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("fwl_export.bundle.manifest.read_bundle", bug)
    with pytest.raises(ZeroDivisionError):
        run(capsys, "inspect", tmp_path, "--log-file", log)
    assert "Traceback (most recent call last)" in log.read_text()
    assert log.read_text().count("exit code 1 after") == 2, "logs are appended"


def test_a_log_file_that_cannot_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments in (("--log-file", tmp_path, "doctor"), ("doctor", "--log-file", tmp_path)):
        result = run(capsys, *arguments)
        assert result.code == 2
        assert "cannot write --log-file" in result.err
        assert "Traceback" not in result.err


def test_a_command_leaves_no_handler_behind(capsys: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger("fwl_export")
    before = list(logger.handlers), logger.level
    run(capsys, "doctor", "-vv")
    assert (list(logger.handlers), logger.level) == before
    assert any(isinstance(handler, logging.NullHandler) for handler in logger.handlers)


def test_the_old_name_of_runtime_works_and_warns(
    tiny_bundle: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ("score", tiny_bundle, text, "--tokens", 30, "--backend", "torch")
    result = run(capsys, *command)
    assert result.code == 0, result.err
    assert "29 tokens scored, torch" in result.out
    warning = "warning: --backend is now --runtime; the old name goes away in 0.3\n"
    assert warning in result.err
    assert run(capsys, *command, "-q").err == ""


def test_the_old_name_of_variant_works_and_warns(
    tiny_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = run(capsys, "build", tiny_bundle, "--flavour", "none")
    assert result.code == 1
    assert "warning: --flavour is now --variant" in result.err
    assert "'none'" in result.err


def test_no_text_forges_a_line_of_the_log(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "b\nerror: forged\x1b[2J\ninfo: forged"
    log = tmp_path / "log"
    result = run(capsys, "-v", "--log-file", log, "inspect", folder)
    assert result.code == 1
    for text in (result.err, log.read_text(encoding="utf-8")):
        assert "\x1b" not in text
        assert r"\x1b[2J" in text
        assert not re.search("^(error|info): forged", text, re.MULTILINE)
    assert all(line[:2] in ("  ", "20") for line in log.read_text(encoding="utf-8").splitlines())
