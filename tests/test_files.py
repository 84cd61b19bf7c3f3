"""Atomic output: complete or absent, whatever goes wrong."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fwl_export.files import replaced_file, replaced_folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_appears_whole_and_replaces_the_old_one(tmp_path: Path) -> None:
    for text in ("one", "two"):
        with replaced_folder(tmp_path / "out") as beside:
            (beside / "a").write_text(text)
            assert (tmp_path / "out").exists() == (text == "two")
    assert (tmp_path / "out" / "a").read_text() == "two"
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_an_error_leaves_what_was_there(tmp_path: Path, error: BaseException) -> None:
    with replaced_folder(tmp_path / "out") as beside:
        (beside / "a").write_text("old")

    def fail(path: Path) -> None:
        path.write_text("half")
        raise error

    with pytest.raises(type(error)), replaced_folder(tmp_path / "out") as beside:
        fail(beside / "a")
    with pytest.raises(type(error)), replaced_file(tmp_path / "file") as path:
        fail(path)
    assert names(tmp_path) == ["out"]
    assert (tmp_path / "out" / "a").read_text() == "old"


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path\n"
        "from fwl_export.files import replaced_file, replaced_folder\n"
        "with replaced_folder(Path('out')) as a, replaced_file(Path('file')) as b:\n"
        "    (a / 'half').write_text('x'); b.write_text('x')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=False)
    left = names(tmp_path)
    assert len(left) == 2
    assert all(name.startswith((".out.", ".file.")) for name in left)
    with replaced_folder(tmp_path / "out") as beside, replaced_file(tmp_path / "file") as path:
        assert len(names(tmp_path)) == 2, "the folder of a running process must stay"
        (beside / "a").write_text("x")
        path.write_text("x")
    assert names(tmp_path) == ["file", "out"]


def test_files_get_ordinary_permissions(tmp_path: Path) -> None:
    with replaced_folder(tmp_path / "out") as beside:
        (beside / "a").write_text("x")
        (beside / "a").chmod(0o600)
    (tmp_path / "plain").write_text("x")
    assert (tmp_path / "out" / "a").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_links_stay_and_only_regular_files_are_replaced(tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "file")
    for text in ("new", "newer"):
        with replaced_file(link) as beside:
            beside.write_text(text)
        assert link.is_symlink()
        assert (tmp_path / "file").read_text() == text
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for other in (pipe, tmp_path):
        with (
            pytest.raises(FileExistsError, match="not a regular file, so it was not replaced"),
            replaced_file(other),
        ):
            pass
    assert pipe.is_fifo()
