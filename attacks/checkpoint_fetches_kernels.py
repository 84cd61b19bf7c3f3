"""A Hugging Face backbone whose config names a repository of attention kernels.

The attacker wants transformers to download and run code from there. The config must be refused,
wherever in it the name stands.
"""

from __future__ import annotations

import json

from attacks.common import Place, run
from fwl_export.errors import FwlError

NAME = "attacker/kernels"


def attack(place: Place) -> object:
    from fwl_export.model.backbones.huggingface import causal_model
    from fwl_export.model.backbones.huggingface_import import import_backbone

    folder = place.bundle.with_name("backbone")
    folder.mkdir()
    (folder / "model.safetensors").touch()
    good = {"model_type": "llama", "vocab_size": 64}
    spoiled = (
        {"attn_implementation": NAME},
        {"_attn_implementation": NAME},
        {"experts_implementation": NAME},
        {"text_config": {"attn_implementation": {"": NAME}}},
        {"parts": [{"_attn_implementation_internal": NAME, "attn_implementation": f"a|{NAME}"}]},
        {"use_kernels": True},
    )
    refused = []
    for part in spoiled:
        (folder / "config.json").write_text(json.dumps({**good, **part}), encoding="utf-8")
        for read in (
            lambda: import_backbone(folder),
            lambda part=part: causal_model({**good, **part}),
        ):
            try:
                read()
            except FwlError as error:
                refused.append(error)
    if len(refused) == 2 * len(spoiled) and all("fetch and run code" in str(e) for e in refused):
        raise refused[0]
    return refused


if __name__ == "__main__":
    run(attack)
