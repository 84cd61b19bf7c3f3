"""A precision policy that lists numbers instead of the names of matrices.

The attacker wants a policy that quantizes nothing and claims otherwise. The policy must be
refused.
"""

from __future__ import annotations

import json

from attacks.common import Place, run
from fwl_export.precision.policy import SCHEMA_VERSION, read_policy


def attack(place: Place) -> object:
    path = place.bundle.with_name("precision.json")
    policy = {"schema_version": SCHEMA_VERSION, "target": "fp16", "kept": [], "lowered": [1, 2]}
    path.write_text(json.dumps(policy), encoding="utf-8")
    return read_policy(path)


if __name__ == "__main__":
    run(attack)
