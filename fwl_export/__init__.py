"""fwl-export: take Fast Weight Layer models, which learn while they read, to production.

from fwl_export import open_session

session = open_session("bundle")
logits = session.feed(token_ids)        # reads, learns, predicts
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fwl_export import deprecations
from fwl_export.errors import FwlError

if TYPE_CHECKING:
    from fwl_export.bundle import Bundle, read_bundle
    from fwl_export.export import export_bundle
    from fwl_export.runtimes import Session, open_session

__version__ = "0.2.0.dev0"

_LAZY = {
    "Bundle": "fwl_export.bundle",
    "Session": "fwl_export.runtimes",
    "export_bundle": "fwl_export.export",
    "open_session": "fwl_export.runtimes",
    "read_bundle": "fwl_export.bundle",
}

__all__ = ["Bundle", "FwlError", "Session", "export_bundle", "open_session", "read_bundle"]


deprecations.install()


def __getattr__(name: str) -> Any:
    # Lazy, so that `fwl-export --help` need not wait for torch.
    if name in _LAZY:
        import importlib

        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'fwl_export' has no attribute '{name}'")
