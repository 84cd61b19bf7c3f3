"""The demo model that ships with the package, and a play it never saw."""

from __future__ import annotations

from pathlib import Path

_FOLDER = Path(__file__).parent
CHECKPOINT = _FOLDER / "checkpoint"
HELD_OUT_PLAY = _FOLDER / "the_winters_tale.txt"


def checkpoint_folder(name: str) -> Path:
    """Return the folder of a checkpoint: 'demo' is the one that ships, all else is a path."""
    return CHECKPOINT if name == "demo" else Path(name)
