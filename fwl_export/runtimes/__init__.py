"""Runtimes: open a bundle as a session and feed it tokens.

from fwl_export.runtimes import Sampler, open_session

session = open_session("demo-bundle")
for token in session.generate([11, 42, 7], 20, Sampler(temperature=0.8)):
    print(token)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fwl_export.runtimes.limits import Learned, LearningLimits
    from fwl_export.runtimes.opening import open_session
    from fwl_export.runtimes.registry import RUNTIMES
    from fwl_export.runtimes.sampling import Sampler
    from fwl_export.runtimes.session import Session, SessionSpec
    from fwl_export.runtimes.slots import Slots

__all__ = [
    "RUNTIMES",
    "Learned",
    "LearningLimits",
    "Sampler",
    "Session",
    "SessionSpec",
    "Slots",
    "open_session",
]

# Loaded on first use, so that `fwl-export --help` can read the registry without NumPy.
_MODULES = {
    "RUNTIMES": "registry",
    "Learned": "limits",
    "LearningLimits": "limits",
    "Sampler": "sampling",
    "Session": "session",
    "SessionSpec": "session",
    "Slots": "slots",
    "open_session": "opening",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
