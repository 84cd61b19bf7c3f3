"""A manifest with an infinite number, which JSON forbids and Python's reader accepts.

The attacker wants the code that computes with the number to crash. The value must be refused.
"""

from __future__ import annotations

from attacks.common import Place, edit_manifest, open_and_read, run


def attack(place: Place) -> object:
    edit_manifest(place.bundle, lambda data: data.update(max_tokens=float("inf")))
    return open_and_read(place)


if __name__ == "__main__":
    run(attack)
