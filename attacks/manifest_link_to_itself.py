"""A file of the bundle is a symbolic link to itself.

The attacker wants a reader that follows links without end. The bundle must be refused.
"""

from __future__ import annotations

from attacks.common import Place, open_and_read, run
from fwl_export.bundle.manifest import MODEL_FILE


def attack(place: Place) -> object:
    path = place.bundle / MODEL_FILE
    path.unlink()
    path.symlink_to(path.name)
    return open_and_read(place)


if __name__ == "__main__":
    run(attack)
