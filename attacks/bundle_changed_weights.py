"""One bit of the weights is flipped.

The attacker wants a manipulated model to pass for a checked one. Opening the bundle must refuse
it, because the hash in the manifest does not match.
"""

from __future__ import annotations

from attacks.common import Place, open_and_read, run


def attack(place: Place) -> object:
    path = place.bundle / "model.onnx.data"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    return open_and_read(place)


if __name__ == "__main__":
    run(attack)
