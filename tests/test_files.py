"""Atomic output: complete or absent, whatever goes wrong, and nothing else is touched."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fwl_export import files, filesystem
from fwl_export.errors import BundleError, OutputBusyError, OutputExistsError
from fwl_export.files import (
    check_output,
    finish_replacement,
    named_errors,
    replaced_file,
    replaced_folder,
)
from fwl_export.filesystem import open_regular


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(params=["exchange", "renames"])
def exchanging(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run a test with folders exchanged in one step, and with two renames instead."""
    if request.param == "renames":
        monkeypatch.setattr(filesystem, "_exchange_call", lambda: None)
    return str(request.param)


def test_a_folder_appears_whole_and_replaces_the_old_one(tmp_path: Path, exchanging: str) -> None:
    for text in ("one", "two"):
        with replaced_folder(tmp_path / "out") as beside:
            (beside / "a").write_text(text)
            assert (tmp_path / "out").exists() == (text == "two")
    assert (tmp_path / "out" / "a").read_text() == "two"
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_an_error_leaves_what_was_there(
    tmp_path: Path, error: BaseException, exchanging: str
) -> None:
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


def test_an_error_between_the_two_renames_puts_the_old_folder_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(filesystem, "_exchange_call", lambda: None)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a").write_text("old")
    original = os.rename

    def rename(source: Path, target: Path) -> None:
        if "new" in Path(source).parts and target == tmp_path / "out":
            raise OSError(errno.EIO, "Input/output error", str(source))
        original(source, target)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(OSError, match="Input/output error"), replaced_folder(tmp_path / "out"):
        pass
    assert (tmp_path / "out" / "a").read_text() == "old"
    assert names(tmp_path) == ["out"]


# A child process is killed before its first, second, third, ... system call that touches files.
# Whatever it leaves, the folder must be whole after what a reader does, and writable afterwards.
KILLS = """
import fcntl, os, sys
from pathlib import Path
from fwl_export import files, filesystem

mode, what = sys.argv[1:]
if mode == "renames":
    filesystem._exchange_call = lambda: None
target = Path("out")


def write(text):
    if what == "file":
        with files.replaced_file(target) as beside:
            beside.write_text(text)
        return
    with files.replaced_folder(target) as beside:
        (beside / "sub").mkdir()
        (beside / "sub" / "a").write_text(text)
        (beside / "b").write_text(text)


def content():
    if target.is_file():
        return [target.read_text()]
    return [p.read_text() for p in (target / "sub" / "a", target / "b")] if target.exists() else []


def killed_before(step):
    left = step

    def counted(original):
        def call(*arguments, **options):
            nonlocal left
            left -= 1
            if not left:
                os._exit(9)
            return original(*arguments, **options)

        return call

    for name in ("mkdir", "rename", "replace", "unlink", "rmdir", "open", "write", "fsync"):
        setattr(os, name, counted(getattr(os, name)))
    fcntl.flock = counted(fcntl.flock)
    files.exchange = counted(files.exchange)
    write("new")
    os._exit(0)


step = missing = news = 0
while True:
    step += 1
    if what != "fresh":
        write("old")
    child = os.fork() or killed_before(step)
    ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    missing += what != "fresh" and not content()
    files.finish_replacement(target)
    count = 1 if what == "file" else 2
    whole = [["old"] * count if what != "fresh" else [], ["new"] * count]
    assert content() in whole, (step, content())
    news += "new" in content()
    write("third")
    assert content() == ["third"] * count
    assert os.listdir() == ["out"], os.listdir()
    os.rename("out", "../gone")
    os.system("rm -r ../gone")
    if ended == 0:
        break
print(step, missing, news)
"""


@pytest.mark.parametrize(
    ("mode", "what"),
    [("exchange", "folder"), ("renames", "folder"), ("exchange", "fresh"), ("exchange", "file")],
)
def test_a_process_killed_at_any_moment_loses_nothing(tmp_path: Path, mode: str, what: str) -> None:
    (tmp_path / "here").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", KILLS, mode, what],
        cwd=tmp_path / "here",
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    steps, missing, news = map(int, done.stdout.split())
    assert steps > 15
    assert news > 1, "killed only before the folder was in place"
    # Between two renames there is no folder; that is the state to recover from.
    assert (missing > 0) == (mode == "renames")


def test_a_killed_replacement_is_not_replaced_again_without_force(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "out"
    work = left_between_renames(target)

    def is_one(folder: Path) -> bool:
        return (folder / "a").is_file()

    with pytest.raises(OutputExistsError, match="is a thing; choose another name or pass --force"):
        check_output(target, "a thing", is_one, force=False)
    assert (target / "a").read_text() == "new"
    assert not work.exists()
    # Where nothing may be written, everything stays where it is.
    shutil.rmtree(target)
    work = left_between_renames(target)
    monkeypatch.setattr(files, "_try_lock", lambda *_: (_ for _ in ()).throw(PermissionError()))
    finish_replacement(target)
    assert (work / "old" / "a").read_text() == "old"


def left_between_renames(target: Path) -> Path:
    """Make what a process leaves that is killed between its two renames; returns its folder."""
    work = target.with_name(f".{target.name}.fwl-export")
    (work / "new" / target.name).mkdir(parents=True)
    (work / "old").mkdir()
    (work / "new" / target.name / "a").write_text("new")
    (work / "old" / "a").write_text("old")
    (work / "lock").write_text(files._MARK)
    return work


def test_what_was_cut_off_before_the_renames_is_not_taken_for_the_output(tmp_path: Path) -> None:
    work = left_between_renames(tmp_path / "out")
    shutil.rmtree(work / "old")
    finish_replacement(tmp_path / "out")
    assert names(tmp_path) == [".out.fwl-export"]
    with pytest.raises(ValueError, match="stop"), replaced_folder(tmp_path / "out"):
        raise ValueError("stop")
    assert names(tmp_path) == []


@pytest.mark.parametrize("name", [".out.4194303.deadbeef", ".out.old", ".out.123.backup.old"])
def test_what_others_own_is_never_removed(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "precious").write_text("mine")
    for text in ("one", "two"):
        with replaced_folder(tmp_path / "out") as beside:
            (beside / "a").write_text(text)
        with replaced_file(tmp_path / "file") as path:
            path.write_text(text)
    assert names(tmp_path) == sorted([name, "file", "out"])
    assert (tmp_path / name / "precious").read_text() == "mine"


def precious(folder: Path) -> None:
    folder.mkdir()
    (folder / "precious").write_text("mine")


def precious_with_lock(folder: Path) -> None:
    precious(folder)
    (folder / "lock").write_text("my own lock")


def precious_with_empty_lock(folder: Path) -> None:
    precious(folder)
    (folder / "lock").touch()


def link_to_precious(folder: Path) -> None:
    precious(folder.with_name("elsewhere"))
    folder.symlink_to("elsewhere")


@pytest.mark.parametrize(
    "make",
    [
        precious,
        precious_with_lock,
        precious_with_empty_lock,
        link_to_precious,
        lambda path: path.write_text("mine"),
    ],
)
def test_a_folder_of_the_temporary_name_that_is_not_ours_is_left_alone(
    tmp_path: Path, make: Callable[[Path], object]
) -> None:
    work = tmp_path / ".out.fwl-export"
    make(work)
    before = sorted(tmp_path.rglob("*"))
    for write in (replaced_file, replaced_folder):
        with (
            pytest.raises(OutputExistsError, match=r"is not a folder that fwl-export made, so it"),
            write(tmp_path / "out", wait=0),
        ):
            pass
    assert sorted(tmp_path.rglob("*")) == before


HOLD = """
import sys
from pathlib import Path
from fwl_export.files import replaced_folder
with replaced_folder(Path("out")) as beside:
    (beside / "a").write_text("new")
    print("ready", flush=True)
    sys.stdin.readline()
"""


@contextmanager
def held(folder: Path, prefix: list[str]) -> Iterator[subprocess.Popen[str]]:
    """Run a process that writes the folder `out`, and waits for a line before it ends."""
    process = subprocess.Popen(
        [*prefix, sys.executable, "-c", HOLD],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
    )
    assert process.stdout
    assert process.stderr
    try:
        if process.stdout.readline() != "ready\n":
            pytest.skip(f"{prefix[0]} is not allowed here: {process.stderr.read().strip()}")
        yield process
    finally:
        process.kill()
        process.communicate()


# In a namespace of its own, the other process may have any number, also one that is free here.
@pytest.mark.parametrize("prefix", [[], ["unshare", "--pid", "--fork", "--kill-child"]])
def test_what_another_process_writes_is_not_removed(tmp_path: Path, prefix: list[str]) -> None:
    if prefix and not shutil.which(prefix[0]):
        pytest.skip(f"{prefix[0]} is not installed")
    with held(tmp_path, prefix) as process:
        with (
            pytest.raises(OutputBusyError, match="is being written by another process, or by ano"),
            replaced_folder(tmp_path / "out", wait=0.05),
        ):
            pass
        finish_replacement(tmp_path / "out")
        assert process.stdin
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.wait() == 0
    assert (tmp_path / "out" / "a").read_text() == "new"
    assert names(tmp_path) == ["out"]


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    with held(tmp_path, []) as process:
        process.kill()
        process.wait()
    assert names(tmp_path) == [".out.fwl-export"]
    with replaced_folder(tmp_path / "out", wait=0) as beside:
        (beside / "a").write_text("x")
    assert names(tmp_path) == ["out"]


def test_a_lock_that_cannot_be_trusted_holds_for_a_day(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "out"

    def attempt() -> None:
        with replaced_folder(target, wait=0) as beside:
            (beside / "a").write_text("new")

    def leave(mark: str, hours: float) -> None:
        work = left_between_renames(target)
        shutil.rmtree(work / "old")
        (work / "lock").write_text(mark)
        then = time.time() - hours * 3600
        os.utime(work / "lock", (then, then))

    here, elsewhere = files._MARK + filesystem.boot_id(), files._MARK + "another machine"
    monkeypatch.setattr(files, "is_shared_by_machines", lambda _: True)
    leave(elsewhere, 23)
    with pytest.raises(OutputBusyError, match=r"If there is none, remove '.*\.out\.fwl-export'"):
        attempt()
    shutil.rmtree(tmp_path / ".out.fwl-export")
    for mark, hours in ((here, 0), (elsewhere, 25)):
        leave(mark, hours)
        attempt()
        shutil.rmtree(target)
    monkeypatch.setattr(files, "try_lock", lambda _: None)
    leave(here, 0)
    with pytest.raises(OutputBusyError):
        attempt()
    shutil.rmtree(tmp_path / ".out.fwl-export")
    attempt()
    assert names(tmp_path) == ["out"]


def test_a_second_thread_waits_for_the_first(tmp_path: Path) -> None:
    ready = threading.Event()

    def first() -> None:
        with replaced_file(tmp_path / "file") as path:
            ready.set()
            with pytest.raises(OutputBusyError), replaced_file(tmp_path / "file", wait=0):
                pass
            path.write_text("first")

    thread = threading.Thread(target=first)
    thread.start()
    ready.wait()
    with replaced_file(tmp_path / "file", wait=60) as path:
        assert (tmp_path / "file").read_text() == "first"
        path.write_text("second")
    thread.join()
    assert (tmp_path / "file").read_text() == "second"
    assert names(tmp_path) == ["file"]


def test_a_long_name_and_one_like_those_inside(tmp_path: Path) -> None:
    for name in ("x" * 255, "é" * 127, "lock", "new", "old"):
        with replaced_folder(tmp_path / name) as beside:
            (beside / "a").write_text("x")
        with replaced_file(tmp_path / name / "a") as path:
            path.write_text("y")
        assert (tmp_path / name / "a").read_text() == "y"
    assert len(names(tmp_path)) == 5


def test_a_link_to_a_folder_stays_and_the_folder_is_replaced(
    tmp_path: Path, exchanging: str
) -> None:
    (tmp_path / "disk").mkdir()
    link = tmp_path / "link"
    link.symlink_to("disk/real")
    for text in ("dangling", "again"):
        with replaced_folder(link) as beside:
            (beside / "a").write_text(text)
        assert link.is_symlink()
        assert (tmp_path / "disk" / "real" / "a").read_text() == text
    assert names(tmp_path) == ["disk", "link"]
    assert names(tmp_path / "disk") == ["real"]


def test_what_cannot_be_replaced_by_a_folder_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "pipe")
    inside = tmp_path / "here" / "inside"
    inside.mkdir(parents=True)
    monkeypatch.chdir(inside)
    places = {
        tmp_path / "link": "is a link to '.*file', which is a file; remove the link, or choose an",
        tmp_path / "loop": "is a link that leads back to itself; remove the link, or choose anoth",
        tmp_path / "pipe": "is a named pipe; remove it, or choose another name",
        Path("/proc"): "is a mount point, which cannot be replaced; name a new folder inside it",
        tmp_path / "here": "is or contains the current folder or your home folder, and would be",
        Path(): "is or contains the current folder or your home folder, and would be replaced",
        Path.home(): "is or contains the current folder or your home folder",
    }
    for place, words in places.items():
        with pytest.raises(OutputExistsError, match=words), replaced_folder(place):
            pass
    assert names(tmp_path) == ["file", "here", "link", "loop", "pipe"]
    with replaced_folder(tmp_path / "file") as beside:  # `check_output` asks for --force before
        (beside / "a").write_text("x")
    assert (tmp_path / "file" / "a").read_text() == "x"


def test_a_mount_point_that_is_a_part_of_the_same_disk_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "a folder"
    folder.mkdir()
    point = str(folder).replace(" ", "\\040")
    table = tmp_path / "mountinfo"
    table.write_text(f"36 35 98:0 / {point} rw,noatime master:1 - ext4 /dev/root rw\n")
    monkeypatch.setattr(filesystem, "_MOUNTS", table)
    assert filesystem.is_mount_point(folder)
    assert not filesystem.is_mount_point(tmp_path)
    table.write_text("36 35 98:0 / /mnt rw - nfs4 server:/ rw\n")
    monkeypatch.setattr(os, "major", lambda _: 98)
    monkeypatch.setattr(os, "minor", lambda _: 0)
    with table.open() as stream:
        assert filesystem.is_shared_by_machines(stream.fileno())
        table.write_text("36 35 98:0 / /mnt rw - ext4 /dev/sda rw\n")
        assert not filesystem.is_shared_by_machines(stream.fileno())


def test_what_someone_else_creates_meanwhile_is_kept(tmp_path: Path) -> None:
    def replaced() -> None:
        with replaced_folder(tmp_path / "out"):
            if (tmp_path / "out").exists():
                (tmp_path / "out").rename(tmp_path / "before")
            precious(tmp_path / "out")

    for _ in range(2):
        with pytest.raises(OutputExistsError, match="was created, removed or replaced by someone"):
            replaced()
        assert (tmp_path / "out" / "precious").read_text() == "mine"


def test_files_get_the_permissions_of_new_files(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        with replaced_folder(tmp_path / "out") as beside:
            (beside / "a").touch(0o600)
        assert (tmp_path / "out" / "a").stat().st_mode & 0o777 == 0o640
        assert (tmp_path / "out").stat().st_mode & 0o777 == 0o750
    finally:
        os.umask(old)


def test_a_link_keeps_pointing_and_a_device_is_not_replaced(tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to("file")
    for text in ("created", "replaced"):
        with replaced_file(link) as path:
            path.write_text(text)
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


# Files may grow to 1 kB, like a disk with that much room. Python ignores the signal for it.
FULL = """
import resource, sys
from pathlib import Path
from fwl_export.files import replaced_file, replaced_folder
resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024))


def python(path):
    path.write_bytes(b"x" * 5000)


def safetensors(path):
    import numpy
    from safetensors.numpy import save_file
    save_file({"x": numpy.zeros(5000)}, path)


def tokenizers(path):
    from tokenizers import Tokenizer, models
    Tokenizer(models.WordLevel({str(n): n for n in range(999)}, unk_token="1")).save(str(path))


for write in (python, safetensors, tokenizers):
    for target in ("file", "folder"):
        try:
            if target == "file":
                with replaced_file(Path(target)) as path:
                    write(path)
            else:
                with replaced_folder(Path(target)) as folder:
                    write(folder / "a")
        except OSError as error:
            print(error)
"""


def test_a_full_disk_is_told_with_the_name_of_the_file(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FULL],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == ""
    file, folder = (f"[Errno 27] File too large: '{name}'" for name in ("file", "folder"))
    assert done.stdout.splitlines() == [file, folder] * 3
    assert names(tmp_path) == []


def test_errors_name_the_file_that_the_user_knows(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as found, replaced_folder(tmp_path / "out") as beside:
        (beside / "sub" / "a").write_text("x")
    assert found.value.filename == str(tmp_path / "out" / "sub" / "a")
    with pytest.raises(FileNotFoundError) as found, replaced_file(tmp_path / "file"):
        pass
    assert found.value.filename == str(tmp_path / "file")
    with pytest.raises(OSError, match="No space left on device: 'log'"), named_errors(Path("log")):
        raise OSError(errno.ENOSPC, "No space left on device")
    for other in (ValueError("os error 2"), BundleError("No space left on device, says a file")):
        with pytest.raises(type(other)), named_errors(Path("log")):
            raise other
    with pytest.raises(FileNotFoundError) as found, named_errors(Path("log"), tmp_path):
        Path("/missing/file").read_text()
    assert found.value.filename == "/missing/file"


def test_a_parent_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(NotADirectoryError) as found, replaced_file(tmp_path / "file" / "a"):
        pass
    assert found.value.filename == str(tmp_path / "file" / "a")


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with open_regular(tmp_path / "file", BundleError) as stream:
        assert stream.read() == b"x"
    os.mkfifo(tmp_path / "pipe")
    for path, kind in ((tmp_path / "pipe", "a named pipe"), (tmp_path, "a folder")):
        with pytest.raises(BundleError, match=f"is {kind}; expected a regular file"):
            open_regular(path, BundleError)
    with pytest.raises(BundleError, match="holds a NUL character; expected a file"):
        open_regular(tmp_path / "a\0b", BundleError)


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.EINVAL, errno.EPERM])
def test_without_an_exchange_of_the_system_folders_are_renamed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def refuse(first: bytes, second: bytes) -> int:
        import ctypes

        ctypes.set_errno(code)
        return -1

    monkeypatch.setattr(filesystem, "_exchange_call", lambda: refuse)
    test_a_folder_appears_whole_and_replaces_the_old_one(tmp_path, "")


@pytest.mark.parametrize(
    ("code", "words"),
    [(errno.EBUSY, "it is a mount point or in use"), (errno.EXDEV, "the file system cannot rena")],
)
def test_an_error_of_the_exchange_is_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, words: str
) -> None:
    def refuse(*_: Path) -> bool:
        raise OSError(code, os.strerror(code), "inside")

    monkeypatch.setattr(files, "exchange", refuse)
    (tmp_path / "out").mkdir()
    with pytest.raises(OSError, match=words) as found, replaced_folder(tmp_path / "out"):
        pass
    assert found.value.filename == str(tmp_path / "out")
    assert names(tmp_path) == ["out"]


def test_what_was_replaced_but_cannot_be_removed_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    precious(tmp_path / "out")

    def refuse(path: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", refuse)
        with replaced_folder(tmp_path / "out") as beside:
            (beside / "a").write_text("x")
    assert "could not be removed" in caplog.text
    assert names(tmp_path / "out") == ["a"]
    with replaced_folder(tmp_path / "out") as beside:
        pass
    assert names(tmp_path) == ["out"]
