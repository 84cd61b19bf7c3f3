"""The package of ONNX Runtime: how this project imports it and loads the plugin library into it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from fwl_export.errors import MissingDependencyError, PluginError


def import_onnxruntime(user: str = "runtime 'onnxruntime'") -> Any:
    """Import ONNX Runtime with its telemetry off, and with errors only in its log.

    ONNX Runtime's builds for Linux start a thread that reports to Microsoft. To allow that, set
    ORT_DISABLE_TELEMETRY=0, or import onnxruntime before this function does.

    Args:
      user: What needs ONNX Runtime; begins the error message.

    Raises:
      MissingDependencyError: ONNX Runtime is not installed.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingDependencyError(
            f"{user} needs ONNX Runtime; pip install 'fwl-export[cpu]'"
        ) from error
    onnxruntime.set_default_logger_severity(3)
    return onnxruntime


def register_plugin(options: Any, library: Path) -> None:
    """Let sessions with these options run the kernel of a plugin library.

    Args:
      options: ONNX Runtime's `SessionOptions`, changed in place.
      library: Path of libfwl_ort. It is code, and runs in this process.

    Raises:
      PluginError: ONNX Runtime cannot load the library.
    """
    try:
        options.register_custom_ops_library(str(library))
    except Exception as error:  # ONNX Runtime's exceptions share no narrower base
        raise PluginError(
            f"ONNX Runtime cannot load plugin '{library}': {error}; leave it out with plugin='none'"
        ) from None
