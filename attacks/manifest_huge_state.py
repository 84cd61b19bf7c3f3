"""A manifest that declares a state tensor of 64 TiB per session.

The attacker wants opening the bundle to exhaust the machine's memory. The size must be compared
with the model and refused before anything is allocated.
"""

from __future__ import annotations

from attacks.common import Place, edit_manifest, open_and_read, run


def attack(place: Place) -> object:
    edit_manifest(place.bundle, lambda data: data["state"][0].update(shape=[1 << 22, 1 << 22]))
    return open_and_read(place)


if __name__ == "__main__":
    run(attack)
