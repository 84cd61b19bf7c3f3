"""ONNX Runtime's package, imported in one way."""

from __future__ import annotations

import os
from typing import Any

from fwl_export.errors import MissingDependencyError


def import_onnxruntime(user: str = "runtime 'onnxruntime'") -> Any:
    """Import ONNX Runtime, silent about what is no error, and without its telemetry.

    Its builds for Linux start a thread that reports to Microsoft. Whoever wants that sets
    ORT_DISABLE_TELEMETRY=0, or imports onnxruntime first.

    Args:
      user: what needs it, for the message.

    Raises:
      MissingDependencyError: it is not installed.
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
