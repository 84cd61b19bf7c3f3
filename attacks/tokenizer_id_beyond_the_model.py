"""A tokenizer of the right size, one of whose tokens has an id that the model does not have.

The attacker wants the model to read beyond its embedding. A tokenizer may have entries that the
model does not know, but a text that leads to one must be refused.
"""

from __future__ import annotations

import json

from attacks.common import Place, load_checkpoint, run
from fwl_export.bundle.tokenizer import encode


def attack(place: Place) -> object:
    path = place.bundle / "checkpoint" / "tokenizer.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    token = next(iter(data["model"]["vocab"]))
    data["model"]["vocab"][token] = 1 << 31
    path.write_text(json.dumps(data), encoding="utf-8")
    return encode(token, load_checkpoint(place).tokenizer)


if __name__ == "__main__":
    run(attack)
