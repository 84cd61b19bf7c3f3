"""A manifest that names one tensor of the state twice, with two shapes.

The attacker wants buffers of one shape to be used with the other. The manifest must be refused.
"""

from __future__ import annotations

from attacks.common import Place, edit_manifest, open_and_read, run


def attack(place: Place) -> object:
    spec = {"name": "pending.hidden", "shape": [1], "dtype": "float32"}
    edit_manifest(place.bundle, lambda data: data["state"].append(spec))
    return open_and_read(place)


if __name__ == "__main__":
    run(attack)
