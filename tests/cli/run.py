"""Run the command line inside the test's process."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from unittest import mock

import pytest

from fwl_export.cli.main import main


@dataclass(frozen=True)
class Result:
    """What a command left: exit code, standard output, standard error."""

    code: int
    out: str
    err: str


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> Result:
    """Run `fwl-export ARGUMENTS`."""
    code = 0
    with mock.patch.object(sys, "argv", ["fwl-export", *map(str, arguments)]):
        try:
            main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
    captured = capsys.readouterr()
    return Result(code, captured.out, captured.err)
