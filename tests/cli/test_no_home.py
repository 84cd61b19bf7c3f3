"""A user without HOME and without an account, as in a container that runs as a number."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fwl_export.errors import missing_account
from fwl_export.files import check_output, replaced_folder

# What the system answers such a user, before the command line runs.
ACCOUNTLESS = """
import pwd, sys

def unknown(uid):
    raise KeyError(f"getpwuid(): uid not found: {uid}")

pwd.getpwuid = unknown
from fwl_export.cli.main import main

sys.argv[0] = "fwl-export"
main()
"""


def without_an_account(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a command as such a user, in a folder."""
    hidden = ("HOME", "USER", "LOGNAME", "USERNAME", "LNAME")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    return subprocess.run(
        [sys.executable, "-c", ACCOUNTLESS, *map(str, arguments)],
        cwd=folder,
        env=environment | {"PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        check=False,
    )


def test_commands_need_no_account(tiny_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("ABCDEFGH" * 8)
    for command in (
        ("inspect", tiny_bundle),
        ("score", tiny_bundle, "text"),
        ("read", tiny_bundle, "text", "-o", "text.state"),
        ("generate", tiny_bundle, "--prompt", "AB", "--max-new", 2),
    ):
        done = without_an_account(tmp_path, *command)
        assert done.returncode == 0, done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"text", "text.state"}, "no folder '~'"


def test_what_needs_a_home_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Without the look for the shell above this process, which need not be one.
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")
    done = without_an_account(tmp_path, "--install-completion", "bash")
    assert done.returncode == 1
    assert done.stderr.startswith("error: this user has no home folder, because HOME is not set")
    assert len(done.stderr.splitlines()) == 1


def test_outputs_are_replaced_without_a_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", unknown)
    target = tmp_path / "target"
    target.mkdir()
    check_output(target, "a bundle", lambda _: True, force=True)
    with replaced_folder(target) as beside:
        (beside / "new").touch()
    assert (target / "new").is_file()


def test_only_errors_about_the_account_are_taken_for_it() -> None:
    for error in (
        RuntimeError("Could not determine home directory."),
        KeyError("getpwuid(): uid not found: 12345"),
        OSError("No username set in the environment"),
    ):
        assert "set HOME to a folder" in str(missing_account(error))
    assert missing_account(KeyError("position")) is None
    assert missing_account(RuntimeError("CUDA error")) is None
