"""Which files a bundle may name: those in its folder, and the contents of the cache it lies in."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath

from fwl_export.errors import BundleError
from fwl_export.filesystem import hub_blobs
from fwl_export.json_files import shown

_LONGEST_PATH = 250  # characters; file systems allow 255 bytes in one name
_CONTROL_CHARACTERS = re.compile(r"[\x00-\x1f\x7f-\x9f]")


def inside(folder: Path, name: str) -> Path:
    """Return the path of a file in a folder, after checking that it stays inside.

    Links are followed within the folder, and into the contents of the Hugging Face cache that the
    folder lies in; see `docs/formats/bundle.md`.

    Args:
      folder: Path of the bundle's folder.
      name: Path inside the folder, with slashes.

    Raises:
      BundleError: The name is empty or absolute, contains "..", or leads out through a link.
    """
    path = _named(folder, name)
    try:
        real = path.resolve()
        leaves = not real.is_relative_to(folder.resolve()) and real.parent != hub_blobs(folder)
    except (OSError, RuntimeError):  # a link that leads back to itself
        leaves = True
    if leaves:
        raise _leaves_by_link(folder, name)
    return path


def place_for(folder: Path, name: str) -> Path:
    """Return the path at which a file of a bundle may be written.

    What lies there, perhaps a link that somebody else made, must be replaced and not be written
    to: see `through_link` of `fwl_export.files.replaced_file`.

    Args:
      folder: Path of the bundle's folder.
      name: Path inside the folder, with slashes.

    Raises:
      BundleError: The name is empty or absolute, contains "..", or its folder leads out through a
        link.
    """
    path = _named(folder, name)
    try:
        leaves = not path.parent.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError):
        leaves = True
    if leaves:
        raise _leaves_by_link(folder, name)
    return path


def _named(folder: Path, name: str) -> Path:
    """Return the path of a name in a folder; links are not looked at."""
    parts = PurePosixPath(name)
    if parts.is_absolute() or ".." in parts.parts or "\\" in name or not name:
        raise BundleError(
            f"bundle '{folder}' names the path {shown(name)}, which leaves the bundle's folder; "
            "do not use this bundle"
        )
    if _CONTROL_CHARACTERS.search(name) or len(name) > _LONGEST_PATH:
        raise BundleError(
            f"bundle '{folder}' names the path {shown(name)}, which has control characters or more "
            f"than {_LONGEST_PATH} characters; do not use this bundle"
        )
    return folder / parts


def _leaves_by_link(folder: Path, name: str) -> BundleError:
    return BundleError(
        f"bundle '{folder}' names the path {shown(name)}, which leaves the bundle's folder through "
        "a link. If the link is yours, copy the bundle with `cp -rL`; otherwise do not use this "
        "bundle"
    )
