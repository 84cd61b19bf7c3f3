"""A precision policy whose measurements are nested a thousand levels deep.

The attacker wants the recursion of whoever copies it to end in a crash. It must be refused.
"""

from __future__ import annotations

from attacks.common import Place, run
from fwl_export.precision.policy import read_policy


def attack(place: Place) -> object:
    path = place.bundle / "precision.json"
    measured = '{"a":' * 900 + "1" + "}" * 900
    path.write_text(
        f'{{"schema_version": 1, "target": "fp16", "kept": [], "lowered": [], '
        f'"measured": {measured}}}',
        encoding="utf-8",
    )
    return read_policy(path).to_dict()


if __name__ == "__main__":
    run(attack)
