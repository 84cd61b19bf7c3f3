"""A manifest of a hundred thousand opening brackets.

The attacker wants the reader to exhaust the stack. The file must be refused.
"""

from __future__ import annotations

from attacks.common import Place, read_all, run
from fwl_export.bundle.manifest import MANIFEST_FILE


def attack(place: Place) -> None:
    (place.bundle / MANIFEST_FILE).write_text("[" * 100_000, encoding="utf-8")
    read_all(place)


if __name__ == "__main__":
    run(attack)
