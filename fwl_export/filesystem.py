"""What the operating system offers for files that cannot be lost, and how far it offers it.

Exchanging two folders in one step, locks that end with their process, writing through to the disk,
and opening a file only if it is one.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import io
import os
import platform
import re
import stat
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment] # see `try_lock`

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2  # Linux; macOS calls it RENAME_SWAP, with the same value
_RENAMEAT2 = {"x86_64": 316, "aarch64": 276}  # numbers of the system call, for old C libraries

# What the system answers where it has no exchange, or a sandbox knows no such call.
_NO_EXCHANGE = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EPERM}
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EBADF}

_MOUNTS = Path("/proc/self/mountinfo")
_NETWORK = re.compile(r"nfs\d?|cifs|smb\d?|smbfs|9p|afs|ceph|lustre|gpfs|fuse\..*")

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def kind_of(path: Path) -> str:
    """Return in words what is at a path, after following links: "a file", "a named pipe", ..."""
    return _kind(path.stat().st_mode)


def _kind(mode: int) -> str:
    return _KINDS.get(stat.S_IFMT(mode), "a file")


def hub_blobs(folder: Path) -> Path | None:
    """Return where the Hugging Face cache that a folder lies in keeps the contents of files.

    The files below `models--OWNER--NAME/snapshots/REVISION` are links to files in
    `models--OWNER--NAME/blobs`, each named by a hash of its content.

    Args:
      folder: A folder, perhaps inside of a snapshot.

    Returns:
      The folder `blobs`, without links in its path; None if the folder lies in no such cache.
    """
    real = Path(os.path.realpath(folder))
    for revision in (real, *real.parents):
        snapshots = revision.parent
        blobs = snapshots.parent / "blobs"
        if snapshots.name == "snapshots" and blobs.is_dir() and not blobs.is_symlink():
            return blobs
    return None


def open_regular(path: Path, error: type[Exception]) -> io.FileIO:
    """Open a file for reading, without a buffer, only if it is a regular file.

    A named pipe or a device could block forever, or never end.

    Args:
      path: File to read.
      error: Class of the exception to raise if the path is something else.

    Raises:
      Exception: The path is not a regular file; raised as `error`.
      OSError: The file cannot be opened.
    """
    try:
        kind = kind_of(path)
        if kind == "a file":
            flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
            stream = io.FileIO(os.open(path, flags | getattr(os, "O_CLOEXEC", 0)), "rb")
            kind = _kind(os.fstat(stream.fileno()).st_mode)  # it may have been replaced meanwhile
            if kind == "a file":
                return stream
            stream.close()
    except ValueError:
        raise error(f"the path {str(path)!r} holds a NUL character; expected a file") from None
    raise error(f"'{path}' is {kind}; expected a regular file")


def exchange(first: Path, second: Path) -> bool:
    """Exchange two files or folders in one step, so that at no moment either is missing.

    Args:
      first: Path of one of them.
      second: Path of the other, in the same file system.

    Returns:
      Whether the system and this file system can do it; if not, nothing has changed.

    Raises:
      OSError: A path does not exist, or cannot be renamed.
    """
    call = _exchange_call()
    if call is None:
        return False
    if call(os.fsencode(first), os.fsencode(second)) == 0:
        return True
    code = ctypes.get_errno()
    if code in _NO_EXCHANGE:
        return False
    raise OSError(code, os.strerror(code), str(second))


@functools.cache
def _exchange_call() -> Callable[[bytes, bytes], int] | None:
    """Return the function of the C library that exchanges two paths; 0 means success."""
    if sys.platform not in ("linux", "darwin"):
        return None
    library: Any = ctypes.CDLL(None, use_errno=True)
    if hasattr(library, "renamex_np"):  # macOS
        return lambda a, b: int(library.renamex_np(a, b, _RENAME_EXCHANGE))
    if hasattr(library, "renameat2"):
        return lambda a, b: int(
            library.renameat2(_AT_FDCWD, a, _AT_FDCWD, b, ctypes.c_uint(_RENAME_EXCHANGE))
        )
    number = _RENAMEAT2.get(platform.machine())
    if number is None:
        return None
    return lambda a, b: int(library.syscall(number, _AT_FDCWD, a, _AT_FDCWD, b, _RENAME_EXCHANGE))


def sync(path: Path) -> None:
    """Write a file, or a folder's list of names, through to the disk.

    Raises:
      OSError: The disk reports an error, or the file cannot be opened.
    """
    folder = path.is_dir()
    if folder and os.name == "nt":
        return  # Windows opens no folders
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not folder or error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Write all files below a folder, and the folders themselves, through to the disk."""
    for parent, _, names in os.walk(folder, topdown=False):
        for name in names:
            path = Path(parent, name)
            if path.is_file() and not path.is_symlink():
                sync(path)
        sync(Path(parent))


def boot_id() -> str:
    """Return a text that all processes share that this machine ran since it was started."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return platform.node()


def try_lock(descriptor: int) -> bool | None:
    """Try to lock an open file; the system releases the lock when the process ends.

    The lock holds between processes on one machine, also in different containers.

    Args:
      descriptor: Descriptor of the lock file, opened for writing. Closing it releases the lock.

    Returns:
      Whether the lock is held now, or None if this file system has no locks.
    """
    if fcntl is None:
        return None  # type: ignore[unreachable] # on Windows it is None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return None
    return True


def is_shared_by_machines(descriptor: int) -> bool:
    """Return whether an open file is in a network's file system, where locks may be local."""
    device = os.fstat(descriptor).st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    return any(found == number and _NETWORK.fullmatch(kind) for found, kind, _ in _mounts())


def is_mount_point(path: Path) -> bool:
    """Return whether a file system, or a part of one, is mounted at a path.

    Args:
      path: Absolute path without links.
    """
    if os.path.ismount(path):
        return True
    return any(str(path) == point for _, _, point in _mounts())  # also parts of the same disk


def _mounts() -> Iterator[tuple[str, str, str]]:
    """Yield device number, kind and path of each mounted file system; nothing if not on Linux."""
    try:
        table = os.fsdecode(_MOUNTS.read_bytes())
    except OSError:
        return
    for line in table.splitlines():
        fields, _, rest = line.partition(" - ")
        parts, kind = fields.split(" "), rest.partition(" ")[0]
        if len(parts) > 4:
            point = re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), parts[4])
            yield parts[2], kind, point
