"""Parameters to import, as .npz, that hold a pickled object which writes a file when it is loaded.

The attacker wants `fwl-export import` to load it. The array must be refused, unread.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from attacks.common import Place, run


class Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.write_text, (self.path, "pwned")


def attack(place: Place) -> object:
    from fwl_export.importers.arrays import read_jax

    path = place.bundle.with_name("params.npz")
    np.savez(path, kernel=np.array([Payload(place.outside / "pwned.txt")], object))
    return read_jax(path)["kernel"]()


if __name__ == "__main__":
    run(attack)
