"""The manifest, which nothing has the hash of, is a symbolic link to a file outside.

The attacker wants that file to be read, quoted in an error or replaced when something is added to
the bundle. The link must be refused before the file is opened.
"""

from __future__ import annotations

from attacks.common import Place, read_all, run
from fwl_export.bundle.manifest import MANIFEST_FILE


def attack(place: Place) -> None:
    path = place.bundle / MANIFEST_FILE
    path.rename(place.outside / MANIFEST_FILE)
    path.symlink_to(place.outside / MANIFEST_FILE)
    try:
        read_all(place)
    finally:
        (place.outside / MANIFEST_FILE).unlink()  # what else changed here is an escape


if __name__ == "__main__":
    run(attack)
