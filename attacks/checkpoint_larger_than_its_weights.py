"""A checkpoint whose config describes a model of 64 GB, within all bounds, with weights of 40 kB.

The attacker wants memory to be exhausted before the weights are read. The sizes must be compared
with the file first, and the checkpoint refused.
"""

from __future__ import annotations

import json

from attacks.common import Place, load_checkpoint, run


def attack(place: Place) -> object:
    path = place.bundle / "checkpoint" / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["vocab_size"] = (1 << 24) - 1
    config["backbone"] |= {"width": 1 << 10, "heads": 2}
    config["fast_weights"] |= {"input_size": 1 << 10}
    path.write_text(json.dumps(config), encoding="utf-8")
    return load_checkpoint(place)


if __name__ == "__main__":
    run(attack)
