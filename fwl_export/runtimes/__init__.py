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
    from fwl_export.runtimes.text_session import TextSession, TextStream, open_text_session
    from fwl_export.runtimes.text_writer import (
        Generation,
        LikelyToken,
        TextOptions,
        TokenLogprob,
    )

__all__ = [
    "RUNTIMES",
    "Generation",
    "Learned",
    "LearningLimits",
    "LikelyToken",
    "Sampler",
    "Session",
    "SessionSpec",
    "Slots",
    "TextOptions",
    "TextSession",
    "TextStream",
    "TokenLogprob",
    "open_session",
    "open_text_session",
]

# Loaded on first use, so that `fwl-export --help` can read the registry without NumPy.
_MODULES = {
    "RUNTIMES": "registry",
    "Generation": "text_writer",
    "Learned": "limits",
    "LearningLimits": "limits",
    "LikelyToken": "text_writer",
    "Sampler": "sampling",
    "Session": "session",
    "SessionSpec": "session",
    "Slots": "slots",
    "TextOptions": "text_writer",
    "TextSession": "text_session",
    "TextStream": "text_session",
    "TokenLogprob": "text_writer",
    "open_session": "opening",
    "open_text_session": "text_session",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
