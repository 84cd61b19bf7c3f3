"""A checkpoint whose config has NaN where a number belongs.

The attacker wants a model that computes NaN, or a comparison that NaN passes. The value must be
refused.
"""

from __future__ import annotations

import json

from attacks.common import Place, load_checkpoint, run


def attack(place: Place) -> object:
    path = place.bundle / "checkpoint" / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["fast_weights"]["norm_epsilon"] = float("nan")
    path.write_text(json.dumps(config), encoding="utf-8")
    return load_checkpoint(place)


if __name__ == "__main__":
    run(attack)
