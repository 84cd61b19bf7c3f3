"""A file of the bundle is a symbolic link to a file outside.

The attacker, who may unpack an archive with links on the user's machine, wants that file to be
read as part of the bundle. Reading the manifest must refuse the link.
"""

from __future__ import annotations

from attacks.common import Place, read_all, run


def attack(place: Place) -> None:
    path = place.bundle / "tokenizer.json"
    path.unlink()
    path.symlink_to(place.outside / "secret.txt")
    read_all(place)


if __name__ == "__main__":
    run(attack)
