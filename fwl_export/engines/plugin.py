"""Load the plugin library of the fast-weight update into TensorRT."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fwl_export.engines.messages import shorten
from fwl_export.errors import PluginError
from fwl_export.op.spec import NAME, NODE_ATTRIBUTES

_REMEDY = (
    "build it with `make plugins`, or build the engine with `--plugin none`, which uses standard "
    "operators instead"
)


def load_plugin(trt: Any, title: str, library: Path, errors: Sequence[str]) -> None:
    """Load the plugin library, unless this process has its plugin already.

    Args:
      trt: The Python module of the TensorRT variant.
      title: Name and version of the variant, for error messages.
      library: Path of the library to load.
      errors: The list to which TensorRT's logger adds its errors.

    Raises:
      PluginError: TensorRT cannot load the library, or the library lacks our plugin.
    """
    registry = trt.get_plugin_registry()
    version, namespace = (NODE_ATTRIBUTES[f"plugin_{key}"] for key in ("version", "namespace"))
    if registry.get_creator(NAME, version, namespace) is not None:
        return
    if registry.load_library(str(library)) is None:
        reason = f" ({shorten(errors)})" if errors else ""
        raise PluginError(f"{title} cannot load plugin '{library}'{reason}; {_REMEDY}")
    if registry.get_creator(NAME, version, namespace) is None:
        raise PluginError(
            f"plugin library '{library}' has no plugin {namespace}::{NAME} of version {version}; "
            f"{_REMEDY}"
        )
