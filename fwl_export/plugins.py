"""The compiled plugin libraries with this project's kernels, and the choice of one."""

from __future__ import annotations

import sys
from pathlib import Path

from fwl_export.errors import PluginError

# Building the package, or `make plugins`, puts the libraries here.
FOLDER = Path(__file__).parent / "plugins_lib"

_SUFFIX = {"darwin": ".dylib", "win32": ".dll"}.get(sys.platform, ".so")

ONNXRUNTIME = f"libfwl_ort{_SUFFIX}"
TENSORRT = f"libfwl_trt{_SUFFIX}"

CHOICES = ("auto", "none", "required")


def find_plugin(library: str, choice: str | Path = "auto") -> Path | None:
    """Return the path of the plugin library to load, or None to run without one.

    A library is code that runs in this process. So it comes from this package, or from a path that
    the caller gives, and never from an environment variable, a search path or a bundle.

    Args:
      library: File name of a library of this package, `ONNXRUNTIME` or `TENSORRT`.
      choice: "auto" for the package's own library if it exists, otherwise None; "required" for the
        package's own or an error; "none" for None; or the path of another library.

    Raises:
      PluginError: The library is required, or was given by its path, and does not exist.
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
            "or give the path of one"
        )
    path = Path(choice)
    if not path.is_file():
        raise PluginError(
            f"plugin '{path}' does not exist; expected a library, or one of {', '.join(CHOICES)}"
        )
    return path.resolve()
