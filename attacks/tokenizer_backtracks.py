"""A tokenizer whose pattern needs exponential time on a short text.

The attacker wants the process to hang, or the library to panic. The text must be refused.
"""

from __future__ import annotations

import json

from attacks.common import Place, list_file, run

TOKENIZER = "tokenizer.json"


def attack(place: Place) -> object:
    from fwl_export.bundle.manifest import read_bundle
    from fwl_export.bundle.tokenizer import read_ids
    from fwl_export.runtimes.text import bundle_tokenizer

    path = place.bundle / TOKENIZER
    data = json.loads(path.read_text(encoding="utf-8"))
    pattern = {"Regex": "(a+)+$"}
    data["pre_tokenizer"] = {
        "type": "Split",
        "pattern": pattern,
        "behavior": "Isolated",
        "invert": False,
    }
    path.write_text(json.dumps(data), encoding="utf-8")
    list_file(place.bundle, TOKENIZER)
    text = place.bundle.with_name("text.txt")
    text.write_text("a" * 5000 + "!", encoding="utf-8")
    return read_ids(text, bundle_tokenizer(read_bundle(place.bundle)))


if __name__ == "__main__":
    run(attack)
