"""A manifest that declares a state tensor of Python objects.

The attacker wants bytes of the file to be used as pointers to objects. The type must be refused.
"""

from __future__ import annotations

from attacks.common import Place, edit_manifest, open_and_read, run


def attack(place: Place) -> object:
    edit_manifest(place.bundle, lambda data: data["state"][-1].update(dtype="object"))
    return open_and_read(place)


if __name__ == "__main__":
    run(attack)
