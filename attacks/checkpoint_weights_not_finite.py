"""A checkpoint with an infinite weight.

The attacker wants a model whose logits become NaN, perhaps only after a certain text. The file
must be refused.
"""

from __future__ import annotations

import struct

from attacks.common import Place, load_checkpoint, read_safetensors, run, write_safetensors


def attack(place: Place) -> object:
    path = place.bundle / "checkpoint" / "model.safetensors"
    header, data = read_safetensors(path)
    spoiled = struct.pack("<f", float("inf")) + data[4:]
    write_safetensors(path, header, spoiled)
    return load_checkpoint(place)


if __name__ == "__main__":
    run(attack)
