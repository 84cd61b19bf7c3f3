"""Atomic output: files and folders are written beside their target, then renamed over it."""

from __future__ import annotations

import errno
import glob
import logging
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from fwl_export.errors import OutputExistsError

_log = logging.getLogger(__name__)


@contextmanager
def replaced_folder(target: Path) -> Iterator[Path]:
    """Yield an empty folder beside `target` that takes its place if the block succeeds.

    On an error or interrupt the new folder is removed, and `target` stays as it was.

    Args:
      target: Path of the folder to write; replaced if it exists, with all it contains.
    """
    target, beside = _names(target)
    try:
        beside.mkdir()
        yield beside
        _share(beside)
        if target.exists():
            old = beside.with_name(beside.name + ".old")
            os.rename(target, old)
            os.rename(beside, target)
            shutil.rmtree(old)
        else:
            os.rename(beside, target)
        _log.info("wrote folder '%s'", target)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _names(target: Path) -> tuple[Path, Path]:
    """Return the absolute target, and a name for a temporary folder beside it.

    The caller makes the folder inside the `try` that removes it, so that an interrupt cannot leave
    it behind. Its name contains this process's id; folders of processes that were killed are
    removed here.
    """
    target = Path(os.path.abspath(target))
    target.parent.mkdir(parents=True, exist_ok=True)
    for left in target.parent.glob(f".{glob.escape(target.name)}.*"):
        owner = left.name.removeprefix(f".{target.name}.").partition(".")[0]
        if owner.isdigit() and not _is_running(int(owner)):
            shutil.rmtree(left, ignore_errors=True)
    unique = f".{target.name}.{os.getpid()}.{secrets.token_hex(4)}"
    return target, target.with_name(unique)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _share(folder: Path) -> None:
    """Give files the permissions of ordinary new files; some libraries make theirs private."""
    mask = os.umask(0)
    os.umask(mask)
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(0o666 & ~mask)


@contextmanager
def replaced_file(target: Path) -> Iterator[Path]:
    """Yield a path beside `target`; the file written there replaces it if the block succeeds.

    On an error or interrupt `target` stays as it was.

    Args:
      target: Path of the file to write. If it is a symbolic link, the link stays and the file that
        it points to is replaced.

    Raises:
      FileExistsError: The target exists and is not a regular file, but e.g. a folder or device.
    """
    target = Path(os.path.realpath(target))
    if target.exists() and not target.is_file():
        raise FileExistsError(
            errno.EEXIST, "not a regular file, so it was not replaced", str(target)
        )
    target, folder = _names(target)
    try:
        folder.mkdir()
        yield folder / target.name
        os.replace(folder / target.name, target)
        _log.info("wrote '%s'", target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


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
    resolved, precious = folder.resolve(), (Path.cwd().resolve(), Path.home().resolve())
    if not ours and any(path.is_relative_to(resolved) for path in precious):
        raise OutputExistsError(
            f"output '{folder}' is or contains the current folder or your home folder; --force "
            "does not replace it"
        )
