"""A manifest lists a file outside the bundle, by a path with `..` in it.

The attacker wants that file to be read as part of the bundle. Reading the manifest must refuse the
path.
"""

from __future__ import annotations

from attacks.common import Place, edit_manifest, read_all, run


def attack(place: Place) -> None:
    entry = {"sha256": "0" * 64, "bytes": 9}
    edit_manifest(place.bundle, lambda data: data["files"].update({"../outside/secret.txt": entry}))
    read_all(place)


if __name__ == "__main__":
    run(attack)
