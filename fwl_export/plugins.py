"""Where the package's compiled libraries are."""

from __future__ import annotations

import sys
from pathlib import Path

from fwl_export.errors import PluginError

# Filled when the package is built, or by `make plugins`.
FOLDER = Path(__file__).parent / "plugins_lib"

_SUFFIX = {"darwin": ".dylib", "win32": ".dll"}.get(sys.platform, ".so")

ONNXRUNTIME = f"libfwl_ort{_SUFFIX}"
TENSORRT = f"libfwl_trt{_SUFFIX}"

CHOICES = ("auto", "none", "required")


def find_plugin(library: str, choice: str | Path = "auto") -> Path | None:
    """Return the library to load, or None to run without it.

    A library is code that runs in this process, so it comes from the package or from the caller's
    own path: never from an environment variable, a search path, or a bundle.

    Args:
      library: file name of one of ours, such as `ONNXRUNTIME`.
      choice: "auto", the package's own if it is there; "required", the same or an error; "none";
        or the path of a library.

    Raises:
      PluginError: it is required, or was given by its path, and is not there.
    """
    if choice == "none":
        return None
    if choice in CHOICES:
        path = FOLDER / library
        if path.is_file():
            return path
        if choice == "auto":
            return None
        raise PluginError(
            f"plugin '{library}' is required and not in '{FOLDER}'; build it with `make plugins`, "
            "or give its path"
        )
    path = Path(choice)
    if not path.is_file():
        raise PluginError(
            f"plugin '{path}' does not exist; expected a library, or one of {', '.join(CHOICES)}"
        )
    return path.resolve()
