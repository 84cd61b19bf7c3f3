"""The manifest is a named pipe into which nobody writes.

The attacker wants whoever opens the bundle to wait for ever. The pipe must be refused.
"""

from __future__ import annotations

import os

from attacks.common import Place, open_and_read, run
from fwl_export.bundle.manifest import MANIFEST_FILE


def attack(place: Place) -> object:
    path = place.bundle / MANIFEST_FILE
    path.unlink()
    os.mkfifo(path)
    return open_and_read(place)


if __name__ == "__main__":
    run(attack)
