"""A manifest lists a file by its absolute path.

The attacker wants one of the user's files to be read as part of the bundle. Reading the manifest
must refuse the path.
"""

from __future__ import annotations

from attacks.common import Place, edit_manifest, read_all, run


def attack(place: Place) -> None:
    name = str(place.outside / "secret.txt")
    entry = {"sha256": "0" * 64, "bytes": 9}
    edit_manifest(place.bundle, lambda data: data["files"].update({name: entry}))
    read_all(place)


if __name__ == "__main__":
    run(attack)
