"""Help pages: complete, at most 80 columns wide, and in words that a newcomer knows."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import typer

from fwl_export.bisect import DEFAULT_TOKENS as BISECT_TOKENS
from fwl_export.bisect.run import DEFAULT_CASES as BISECT_CASES
from fwl_export.bundle.state_file import COMPRESSIONS
from fwl_export.cli import bisect, check, options, precision, read
from fwl_export.cli.commands import EXIT_CODES
from fwl_export.cli.main import app
from fwl_export.engines import VARIANTS
from fwl_export.parity.cases import CASES
from fwl_export.parity.check import check_bundle
from fwl_export.precision.policy import TARGETS
from tests.cli.run import run


def commands(command: Any = None, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Yield every command of the application, with the words that one types for it."""
    command = command or typer.main.get_command(app())
    yield " ".join(path), command
    for name, sub in getattr(command, "commands", {}).items():
        yield from commands(sub, (*path, name))


COMMANDS = dict(commands())
RUNNABLE = [path for path, command in COMMANDS.items() if not hasattr(command, "commands")]


@pytest.mark.parametrize("path", COMMANDS)
def test_a_page_fits_a_terminal_and_cuts_nothing(
    path: str, capsys: pytest.CaptureFixture[str]
) -> None:
    result = run(capsys, *path.split(), "--help")
    assert result.code == 0
    assert max(map(len, result.out.splitlines())) <= 80
    assert "…" not in result.out
    assert "..." not in re.sub(r"\[ARGS\]\.\.\.|TEXTS(\])?\.\.\.|\[TEXTS\]\.\.\.", "", result.out)
    assert "\b" not in result.out
    assert "\\b" not in result.out


@pytest.mark.parametrize("path", RUNNABLE)
def test_a_verb_has_an_example_and_every_option_says_what_it_is(
    path: str, capsys: pytest.CaptureFixture[str]
) -> None:
    page = run(capsys, *path.split(), "--help").out
    assert re.search(rf"Examples?:\n    fwl-export {path}\b", page)
    for parameter in COMMANDS[path].params:
        if not parameter.hidden:
            assert len((parameter.help or "").split()) >= 2, parameter.name
            assert re.search(r"[A-Z(]|^\w+[:;]|^fp", parameter.help), parameter.name


def test_summaries_of_verbs_take_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    page = run(capsys, "--help").out
    for path, command in COMMANDS.items():
        if path and " " not in path:
            summary = command.get_short_help_str()
            assert re.search(rf"^  {path} +{re.escape(summary)}$", page, re.MULTILINE), path
            assert summary.endswith(".")


def test_exit_codes_are_documented(capsys: pytest.CaptureFixture[str]) -> None:
    page = run(capsys, "--help").out
    for code, meaning in EXIT_CODES:
        assert re.search(rf"^  {code} +{re.escape(meaning)}$", page, re.MULTILINE)


def test_no_page_shows_the_old_names(capsys: pytest.CaptureFixture[str]) -> None:
    for path in COMMANDS:
        page = run(capsys, *path.split(), "--help").out
        assert "backend" not in page
        assert "flavour" not in page


def test_python_m_is_the_same_program() -> None:
    command = [sys.executable, "-m", "fwl_export", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Usage: fwl-export [OPTIONS] COMMAND")


def test_a_command_line_without_a_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert "Usage: fwl-export" in "".join((run(capsys)).out + run(capsys).err)
    result = run(capsys, "--quiet")
    assert result.code == 2
    assert "Missing command" in result.err


def test_values_that_are_repeated_are_those_of_the_library() -> None:
    assert set(options.CASES) == {case.name for case in CASES}
    assert set(precision.TARGETS) == set(TARGETS)
    assert read.COMPRESSIONS == COMPRESSIONS
    assert (bisect.DEFAULT_TOKENS, bisect.DEFAULT_CASES) == (BISECT_TOKENS, BISECT_CASES)
    assert inspect.signature(check_bundle).parameters["tokens"].default == check.DEFAULT_TOKENS
    assert set(VARIANTS) == {"rtx", "tensorrt"}
