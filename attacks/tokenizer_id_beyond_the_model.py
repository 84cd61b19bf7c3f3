"""A tokenizer of the right size, one of whose tokens has an id that the model does not have.

The attacker wants the model to read beyond its embedding. The tokenizer must be refused.
"""

from __future__ import annotations

import json

from attacks.common import Place, load_checkpoint, run


def attack(place: Place) -> object:
    path = place.bundle / "checkpoint" / "tokenizer.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    token = next(iter(data["model"]["vocab"]))
    data["model"]["vocab"][token] = 1 << 31
    path.write_text(json.dumps(data), encoding="utf-8")
    return load_checkpoint(place)


if __name__ == "__main__":
    run(attack)
