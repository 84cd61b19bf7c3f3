"""A manifest whose state is 16 GiB per session, like its configuration but unlike the model.

The attacker wants memory to be exhausted by a manifest that agrees with itself. State and ONNX file
must be compared before memory is reserved.
"""

from __future__ import annotations

from typing import Any

from attacks.common import Place, edit_manifest, open_and_read, run


def attack(place: Place) -> object:
    def change(data: dict[str, Any]) -> None:
        backbone = data["config"]["backbone"]
        backbone["window"] = 1 << 24
        for spec in data["state"]:
            if spec["name"].startswith("cache."):
                spec["shape"][1] = backbone["window"] + data["max_tokens"] - 1

    edit_manifest(place.bundle, change)
    return open_and_read(place)


if __name__ == "__main__":
    run(attack)
