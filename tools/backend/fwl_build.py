"""Build backend: scikit-build-core, with a sentence where something that it needs is missing.

With `pip install --no-build-isolation`, pip fetches nothing, so scikit-build-core or CMake may be
missing. Without scikit-build-core nothing can be built; without CMake the wheel has no compiled
libraries, just as without a compiler (pyproject.toml); `fwl-export doctor` says what that costs.
"""

from __future__ import annotations

import sys
from typing import Any

try:
    from scikit_build_core.build import (
        build_editable,
        build_sdist,
        get_requires_for_build_editable,
        get_requires_for_build_sdist,
        get_requires_for_build_wheel,
    )
    from scikit_build_core.build import build_wheel as build_with_cmake
    from scikit_build_core.errors import CMakeNotFoundError
except ModuleNotFoundError as error:
    sys.exit(
        f"fwl-export is built by scikit-build-core, but '{error.name}' is not installed here; "
        "pip install 'scikit-build-core>=0.11', or leave out --no-build-isolation"
    )

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
]

NO_CMAKE = (
    "fwl-export: CMake 3.20 or newer is not installed, so this wheel has no compiled libraries: "
    "the fast-weight update runs in standard operators, slower. For the libraries, install CMake "
    "and a C++ compiler and install again, or leave out --no-build-isolation."
)


def build_wheel(
    wheel_directory: str,
    config_settings: dict[str, Any] | None = None,
    metadata_directory: str | None = None,
) -> str:
    """Build a wheel into a folder, without compiled libraries if there is no CMake.

    Args:
      wheel_directory: Folder to write to.
      config_settings: Settings from pip's command line.
      metadata_directory: Folder with the wheel's metadata, if it was made before.

    Returns:
      The wheel's file name.
    """
    try:
        return build_with_cmake(wheel_directory, config_settings, metadata_directory)
    except CMakeNotFoundError:
        print(NO_CMAKE, file=sys.stderr)
        settings = {**(config_settings or {}), "wheel.cmake": "false"}
        return build_with_cmake(wheel_directory, settings, metadata_directory)
