"""A tokenizer with more entries than the model has.

The attacker wants token ids beyond the end of the embedding table. The file must be refused.
"""

from __future__ import annotations

import json

from attacks.common import Place, load_checkpoint, run


def attack(place: Place) -> object:
    path = place.bundle / "checkpoint" / "tokenizer.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    data["model"]["vocab"]["extra"] = 1 << 20
    path.write_text(json.dumps(data), encoding="utf-8")
    return load_checkpoint(place)


if __name__ == "__main__":
    run(attack)
