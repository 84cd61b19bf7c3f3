"""A tokenizer with more entries than the model has.

The attacker wants token ids beyond the end of the embedding table. A tokenizer may have a few
entries that the model does not know, as published ones have, but no text may lead to one; many of
them are refused.
"""

from __future__ import annotations

import json

from attacks.common import Place, load_checkpoint, run


def attack(place: Place) -> object:
    path = place.bundle / "checkpoint" / "tokenizer.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    size = len(data["model"]["vocab"])
    data["model"]["vocab"] |= {f"extra{n}": size + n for n in range(size)}
    path.write_text(json.dumps(data), encoding="utf-8")
    return load_checkpoint(place)


if __name__ == "__main__":
    run(attack)
