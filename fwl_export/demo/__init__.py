"""The demo model that comes with the package, and a play that it was not trained on."""

from __future__ import annotations

from pathlib import Path

_FOLDER = Path(__file__).parent
CHECKPOINT = _FOLDER / "checkpoint"
HELD_OUT_PLAY = _FOLDER / "the_winters_tale.txt"


def checkpoint_folder(name: str) -> Path:
    """Return the folder of a checkpoint by name.

    Args:
      name: Path of a folder, or "demo" for the model that comes with this package.
    """
    return CHECKPOINT if name == "demo" else Path(name)
