"""A tokenizer file that is JSON, but not a tokenizer.

The attacker wants the library that reads it, which is written in Rust, to crash. The file must be
refused.
"""

from __future__ import annotations

import json

from attacks.common import Place, load_checkpoint, run


def attack(place: Place) -> object:
    path = place.bundle / "checkpoint" / "tokenizer.json"
    model = {"type": "BPE", "vocab": {"a": -1}, "merges": [["a", "b"]]}
    path.write_text(json.dumps({"version": "1.0", "model": model}), encoding="utf-8")
    return load_checkpoint(place)


if __name__ == "__main__":
    run(attack)
