"""A manifest that allows zero tokens per call, so that a text is never finished.

The attacker wants a session to loop without end. The value must be refused.
"""

from __future__ import annotations

from attacks.common import Place, edit_manifest, open_and_read, run


def attack(place: Place) -> object:
    edit_manifest(place.bundle, lambda data: data.update(max_tokens=0))
    return open_and_read(place)


if __name__ == "__main__":
    run(attack)
