"""Atomic output: files and folders are written beside their target, then take its place.

Whatever happens while one is written (an error, Ctrl-C, SIGKILL, a power failure, a full disk), the
target is the old one or the new one, whole. What is being written lies in a folder of its own
beside the target:

    .NAME.fwl-export/lock        locked while a process writes; also says whose folder this is
    .NAME.fwl-export/new/NAME    what is being written; after an exchange, what was replaced
    .NAME.fwl-export/old         only between two renames, where the system cannot exchange folders

There is one such folder for each target, so that only one process writes a target at a time; the
others wait a little, and then refuse. The kernel releases the lock when its process ends, however
it ends. So a lock that can be had means that the folder was left behind, and the next process that
writes the same target removes it. A folder without this lock file is somebody else's, and is never
touched. `finish_replacement` completes a replacement that was cut off between the two renames.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import re
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fwl_export.errors import FwlError, OutputBusyError, OutputExistsError
from fwl_export.filesystem import (
    boot_id,
    exchange,
    is_mount_point,
    is_shared_by_machines,
    kind_of,
    open_regular,
    sync,
    sync_tree,
    try_lock,
)

__all__ = [
    "WAIT_SECONDS",
    "check_output",
    "finish_replacement",
    "named_errors",
    "open_regular",
    "replaced_file",
    "replaced_folder",
]

_log = logging.getLogger(__name__)

# How long to wait for another process that writes the same target. Small files take milliseconds;
# what takes longer, such as an export, is not worth waiting for in silence.
WAIT_SECONDS = 5.0

_LOCK, _NEW, _OLD = "lock", "new", "old"
_SIGNATURE = "written by fwl-export"
_MARK = (
    f"{_SIGNATURE}, which keeps what it is writing in this folder and removes it afterwards.\n"
    "If it is not running, the next one that writes the same output removes the folder.\n"
)
# Seconds after which a lock file counts as left behind where locks cannot tell: see `_is_free`.
_PATIENCE = 24 * 3600.0
_LONGEST_NAME = 200  # bytes of a name that can be seen in the name of its folder

# Errors of a rename that the system describes too briefly.
_RENAME_ERRORS = {
    errno.EBUSY: "it is a mount point or in use, and cannot be replaced; choose another name",
    errno.EXDEV: "the file system cannot rename it, as with folders of a container's image; "
    "remove it first, or choose another name",
}
_DISK_ERRORS = {
    errno.ENOSPC: r"No space left on device|os error 28\b|Errno 28\b",
    errno.EDQUOT: r"Disk quota exceeded|os error 122\b|Errno 122\b",
    errno.EFBIG: r"File too large|os error 27\b|Errno 27\b",
}


@contextmanager
def replaced_folder(target: Path, wait: float | None = None) -> Iterator[Path]:
    """Yield an empty folder beside `target` that takes its place if the block succeeds.

    On an error or interrupt the new folder is removed, and `target` stays as it was. So it does, or
    is the new folder, if the process is killed at any moment.

    Args:
      target: Path of the folder to write; replaced if it exists, with all it contains. If it is a
        symbolic link, the link stays, and the folder that it points to is replaced.
      wait: Seconds to wait for another process that writes the same folder; None means
        `WAIT_SECONDS`.

    Raises:
      OutputExistsError: The target cannot be replaced: it is a link to a file, a device, a mount
        point, or the current folder; or somebody else created or replaced it meanwhile.
      OutputBusyError: Another process is writing the same folder.
      OSError: The folder cannot be written; the error names it.
    """
    shown, target = target, _checked_folder(target)
    with _place_beside(target, wait) as new, named_errors(shown, new):
        before = _identity(target)
        new.mkdir()
        yield new
        _share(new)
        sync_tree(new)
        if _identity(target) != before:
            raise OutputExistsError(
                f"'{shown}' was created, removed or replaced by someone else while it was being "
                "written, and was left as it is; write again, or choose another name"
            )
        _put_in_place(new, target)
        sync(new.parent)
        sync(target.parent)
        _log.info("wrote folder '%s'", target)


@contextmanager
def replaced_file(
    target: Path, wait: float | None = None, through_link: bool = True
) -> Iterator[Path]:
    """Yield a path beside `target`; the file written there replaces it if the block succeeds.

    On an error or interrupt `target` stays as it was. No other process, nor another thread, can
    replace the same file during the block.

    Args:
      target: Path of the file to write.
      wait: Seconds to wait for another process that writes the same file; None means
        `WAIT_SECONDS`.
      through_link: What happens if the target is a symbolic link. On: the link stays, and the file
        that it points to is replaced. Off: the link itself is replaced, as it must be where
        somebody else may have made it.

    Raises:
      FileExistsError: The target exists and is not a regular file, but e.g. a folder or device.
      OutputBusyError: Another process is writing the same file.
      OSError: The file cannot be written; the error names it.
    """
    shown = target
    real = os.path.realpath(target if through_link else target.parent)
    target = Path(real) if through_link else Path(real, target.name)
    replaceable = target.is_file() or (not through_link and target.is_symlink())
    if os.path.lexists(target) and not replaceable:
        raise FileExistsError(
            errno.EEXIST, "not a regular file, so it was not replaced", str(target)
        )
    with _place_beside(target, wait) as new, named_errors(shown, new):
        yield new
        sync(new)
        _rename(new, target)
        sync(target.parent)
        _log.info("wrote '%s'", target)


def _checked_folder(target: Path) -> Path:
    """Return the absolute path of a folder to write, after checking that it can be replaced."""
    real = Path(os.path.realpath(target))
    reason = ""
    if real.is_symlink():
        reason = "is a link that leads back to itself; remove the link"
    elif os.path.lexists(real) and not real.is_dir():
        if target.is_symlink():
            reason = f"is a link to '{real}', which is {kind_of(real)}; remove the link"
        elif not real.is_file():
            reason = f"is {kind_of(real)}; remove it"
    elif real.is_dir() and is_mount_point(real):
        reason = "is a mount point, which cannot be replaced; name a new folder inside it"
    elif real.is_dir() and _holds_precious(real):
        reason = (
            "is or contains the current folder or your home folder, and would be replaced as a "
            "whole; go to another folder first"
        )
    if reason:
        raise OutputExistsError(f"output '{target}' {reason}, or choose another name")
    return real


def _holds_precious(folder: Path) -> bool:
    """Return whether a folder is or contains the current folder or the home folder."""
    precious = []
    with suppress(RuntimeError):  # an account without a home, as a container's number may be
        precious.append(Path.home())
    with suppress(FileNotFoundError):  # the current folder may have been removed
        precious.append(Path.cwd())
    return any(path.resolve().is_relative_to(folder) for path in precious)


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = path.lstat()
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


@contextmanager
def _place_beside(target: Path, wait: float | None) -> Iterator[Path]:
    """Yield a path at which the new target can be written, in a folder that no one else uses.

    Args:
      target: Absolute path of the target, without links.
      wait: Seconds to wait for another process; None means `WAIT_SECONDS`.
    """
    wait = WAIT_SECONDS if wait is None else wait
    with suppress(FileExistsError):  # a file in the way is found below, and named
        target.parent.mkdir(parents=True, exist_ok=True)
    with _locked(_work_folder(target), target, wait) as work:
        _settle(work, target)
        (work / _NEW).mkdir()
        yield work / _NEW / target.name


def _work_folder(target: Path) -> Path:
    name = target.name
    if len(os.fsencode(name)) > _LONGEST_NAME:
        name = hashlib.sha256(os.fsencode(name)).hexdigest()[:16]
    return target.with_name(f".{name}.fwl-export")


@contextmanager
def _locked(work: Path, target: Path, wait: float) -> Iterator[Path]:
    """Hold the lock of the folder beside a target; at the end, the folder is removed.

    Args:
      work: The folder, which is made if it is not there.
      target: Absolute path of the target.
      wait: Seconds to wait for another process.
    """
    descriptor = _lock(work, target, wait)
    try:
        try:
            yield work
        finally:
            try:
                _settle(work, target)
                _remove_work_folder(work)
            except OSError as error:
                _log.warning("'%s' could not be removed (%s); remove it", work, error)
    finally:
        os.close(descriptor)
        with suppress(OSError):  # on NFS, a file that is removed stays until it is closed
            work.rmdir()


def _remove_work_folder(work: Path) -> None:
    """Remove the folder with its lock file, first the file: then the folder is nobody's."""
    with suppress(OSError):
        (work / _LOCK).unlink()
        work.rmdir()


def _lock(work: Path, target: Path, wait: float) -> int:
    """Return the descriptor of the lock file, once it is locked."""
    deadline = time.monotonic() + wait
    while True:
        descriptor = _try_lock(work, target)
        if descriptor is not None:
            return descriptor
        if time.monotonic() >= deadline:
            raise OutputBusyError(
                f"'{target}' is being written by another process, or by another thread of this "
                f"one; try again when it has finished. If there is none, remove '{work}'"
            )
        time.sleep(0.01)


def _try_lock(work: Path, target: Path) -> int | None:
    """Return the descriptor of the locked lock file, or None if another process is faster."""
    lock = work / _LOCK
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
    made, descriptor = False, -1
    try:
        made = _make_work_folder(work, target)
        with suppress(FileNotFoundError):  # another process may just have removed the folder
            descriptor = os.open(lock, flags, 0o666)
            # Or the lock file, between opening and locking.
            if _is_free(descriptor, made) and _identity(lock) == _identity_of(descriptor):
                os.lseek(descriptor, 0, os.SEEK_SET)
                os.write(descriptor, (_MARK + boot_id()).encode())
                return descriptor
    except OSError as error:
        if made:
            _remove_work_folder(work)
        if descriptor >= 0:
            os.close(descriptor)
        raise OSError(error.errno, error.strerror, str(target)) from None
    if descriptor >= 0:
        os.close(descriptor)
    return None


def _is_free(descriptor: int, made: bool) -> bool:
    """Lock the lock file, and return whether no other process can be writing the target.

    Where the file system has no locks, or belongs to several machines, of which some may keep their
    locks to themselves, the lock file of another one counts as locked for a day.

    Args:
      descriptor: Descriptor of the lock file.
      made: Whether this process has just made the folder.
    """
    locked = try_lock(descriptor)
    if locked is False:
        return False
    if made:
        return True
    if locked and not is_shared_by_machines(descriptor):
        return True
    if locked and os.read(descriptor, 1000).decode(errors="replace") == _MARK + boot_id():
        return True
    return time.time() - os.fstat(descriptor).st_mtime > _PATIENCE


def _identity_of(descriptor: int) -> tuple[int, int]:
    found = os.fstat(descriptor)
    return found.st_dev, found.st_ino


def _make_work_folder(work: Path, target: Path) -> bool:
    """Make the folder beside a target; False if it is there already, and is one of ours.

    Raises:
      OutputExistsError: There is something of this name that fwl-export has not made.
    """
    try:
        work.mkdir()
    except FileExistsError:
        if _is_ours(work):
            return False
        raise OutputExistsError(
            f"'{work}' is in the way of writing '{target}': it is not a folder that fwl-export "
            "made, so it was left alone; move it away, or choose another name for the output"
        ) from None
    return True


def _is_ours(work: Path) -> bool:
    """Return whether fwl-export made this folder, which may vanish or be filled meanwhile."""
    try:
        if not stat.S_ISDIR(work.lstat().st_mode):
            return False
        names = {path.name for path in work.iterdir()}
        if _LOCK not in names:
            return not names  # just made, or about to be removed
        mark = (work / _LOCK).read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return mark.startswith(_SIGNATURE) if mark else names == {_LOCK}


def _settle(work: Path, target: Path) -> None:
    """Empty the locked folder beside a target, after completing a replacement that was cut off.

    Between its two renames the target is missing, and both the old and the new one, which is
    complete by then, lie in this folder: nothing is removed before one of them is in its place.
    """
    old = work / _OLD
    if os.path.lexists(old) and not os.path.lexists(target):
        new = work / _NEW / target.name
        os.rename(new if os.path.lexists(new) else old, target)
        sync(target.parent)
        _log.warning("completed the replacement of '%s', which had been interrupted", target)
    for path in list(work.iterdir()):
        if path.name != _LOCK:
            _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def finish_replacement(target: Path) -> None:
    """Complete a replacement of a folder that was cut off while the folder was missing.

    Readers and checks call this where they find nothing at a path. It does nothing if there is
    nothing to complete, if another process is at it, or if the folder may not be written.

    Args:
      target: Path of the folder.
    """
    target = Path(os.path.realpath(target))
    work = _work_folder(target)
    if os.path.lexists(target) or not os.path.lexists(work / _OLD):
        return
    with suppress(OSError, OutputBusyError, OutputExistsError), _locked(work, target, WAIT_SECONDS):
        pass  # settled at the end of the block


def _put_in_place(new: Path, target: Path) -> None:
    """Let a new folder take its target's place; afterwards the old one lies where the new one was.

    Args:
      new: Path of the new folder, in the folder beside the target.
      target: Absolute path of the target, without links.
    """
    if not os.path.lexists(target):
        _rename(new, target)
        return
    try:
        if exchange(new, target):
            return
    except OSError as error:
        raise _told(error, target) from None
    old = new.parent.with_name(_OLD)
    _rename(target, old)
    try:
        os.rename(new, target)
    except OSError:
        os.rename(old, target)
        raise
    os.rename(old, new)  # from here on `_settle` may remove it


def _rename(source: Path, target: Path) -> None:
    try:
        os.replace(source, target)
    except OSError as error:
        raise _told(error, target) from None


def _told(error: OSError, target: Path) -> OSError:
    words = _RENAME_ERRORS.get(error.errno or 0, error.strerror)
    return OSError(error.errno, words, str(target))


@contextmanager
def named_errors(target: Path, temporary: Path | None = None) -> Iterator[None]:
    """Let errors of a block that writes a file name this file, as its user knows it.

    Python's own writing of a file does not name it where the disk is full, and libraries raise
    exceptions of their own.

    Args:
      target: The file or folder that is being written.
      temporary: Where it is written to for the time being.

    Raises:
      OSError: The block raised it, or an error of a library because the disk is full.
    """
    try:
        yield
    except OSError as error:
        # Of the two files of a copy, it is the second that did not fit, not the one named first.
        full = error.errno in (*_DISK_ERRORS, errno.EIO)
        named = error.filename2 if full and error.filename2 else error.filename
        if named is None and full:
            raise OSError(error.errno, error.strerror, str(target)) from error
        if temporary is not None and isinstance(named, str | os.PathLike):
            path = Path(os.fsdecode(named))
            if path.is_relative_to(temporary):
                shown = target / path.relative_to(temporary)
                raise OSError(error.errno, error.strerror, str(shown)) from error
        raise
    except FwlError:
        raise
    except Exception as error:
        for code, words in _DISK_ERRORS.items():
            if re.search(words, str(error)):
                raise OSError(code, os.strerror(code), str(target)) from error
        raise


def _share(folder: Path) -> None:
    """Give files the permissions of ordinary new files; some libraries make theirs private."""
    mask = os.umask(0)
    os.umask(mask)
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(0o666 & ~mask)


def check_output(
    folder: Path,
    kind: str,
    is_one: Callable[[Path], bool],
    force: bool,
    over_anything: bool = False,
) -> None:
    """Check that writing an output folder would not destroy something that the user wants to keep.

    Args:
      folder: Path of the output.
      kind: What will be written, with its article, e.g. "a bundle".
      is_one: Function that tells whether a folder already holds such an output.
      force: Whether the user allows an existing output of this kind to be replaced.
      over_anything: Whether `force` also allows any other file or folder to be replaced, except one
        that contains the current folder or the home folder.

    Raises:
      OutputExistsError: There is something at the path that must not be replaced.
    """
    finish_replacement(folder)
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    ours = is_one(folder)
    if not ours and not (force and over_anything):
        ending = " or pass --force to replace it" if over_anything else ""
        raise OutputExistsError(
            f"output '{folder}' exists and is not {kind}; choose another name{ending}"
        )
    if not force:
        raise OutputExistsError(
            f"output '{folder}' is {kind}; choose another name or pass --force to replace it"
        )
    if not ours and _holds_precious(folder.resolve()):
        raise OutputExistsError(
            f"output '{folder}' is or contains the current folder or your home folder; --force "
            "does not replace it"
        )
