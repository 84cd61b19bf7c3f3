"""A manifest that says `max_tokens` twice: JSON readers differ in which of the two they take.

The attacker wants Python and C++ to see different bundles. The manifest must be refused.
"""

from __future__ import annotations

from attacks.common import Place, open_and_read, run
from fwl_export.bundle.manifest import MANIFEST_FILE


def attack(place: Place) -> object:
    path = place.bundle / MANIFEST_FILE
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace("{", '{"max_tokens": 4096, ', 1), encoding="utf-8")
    return open_and_read(place)


if __name__ == "__main__":
    run(attack)
