"""Writing so that nothing is ever half-written: beside the target, then renamed over it."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replaced_folder(target: Path) -> Iterator[Path]:
    """Yield an empty folder beside `target` that takes its place if the block succeeds.

    On an error, an interrupt too, the folder beside is removed and `target` is as before.
    """
    target = Path(os.path.abspath(target))
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    beside.chmod(0o755)
    try:
        yield beside
        _share(beside)
        if target.exists():
            old = beside.with_name(beside.name + ".old")
            os.rename(target, old)
            os.rename(beside, target)
            shutil.rmtree(old)
        else:
            os.rename(beside, target)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _share(folder: Path) -> None:
    """Give files the permissions of ordinary new files; some writers make theirs private."""
    mask = os.umask(0)
    os.umask(mask)
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(0o666 & ~mask)


@contextmanager
def replaced_file(target: Path) -> Iterator[Path]:
    """Yield a path beside `target`; the file written there replaces it if the block succeeds."""
    target = Path(os.path.abspath(target))
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield folder / target.name
        os.replace(folder / target.name, target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
