"""A precision policy whose target is a list, which cannot be a dictionary's key.

The attacker wants the code that looks up the target to crash. The policy must be refused.
"""

from __future__ import annotations

import json

from attacks.common import Place, run
from fwl_export.precision.policy import SCHEMA_VERSION, read_policy


def attack(place: Place) -> object:
    path = place.bundle.with_name("precision.json")
    policy = {"schema_version": SCHEMA_VERSION, "target": ["fp16"], "kept": [], "lowered": []}
    path.write_text(json.dumps(policy), encoding="utf-8")
    return read_policy(path)


if __name__ == "__main__":
    run(attack)
