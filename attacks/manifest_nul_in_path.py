"""A manifest lists a file whose name contains a NUL character, at which C libraries end a string.

The attacker wants Python to check one path and the operating system to open another. The name must
be refused.
"""

from __future__ import annotations

from attacks.common import Place, edit_manifest, read_all, run


def attack(place: Place) -> None:
    entry = {"sha256": "0" * 64, "bytes": 9}
    edit_manifest(place.bundle, lambda data: data["files"].update({"model.onnx\0.txt": entry}))
    read_all(place)


if __name__ == "__main__":
    run(attack)
