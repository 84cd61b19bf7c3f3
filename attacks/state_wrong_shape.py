"""A tensor of a state file declares a shape that its bytes do not fill.

The attacker wants the reader to read beyond the end of the data. The file must be refused.
"""

from __future__ import annotations

from attacks.common import Place, load_state, read_safetensors, run, saved_state, write_safetensors


def attack(place: Place) -> object:
    path = saved_state(place)
    header, data = read_safetensors(path)
    header["position"]["shape"] = [1 << 40]
    return load_state(place, write_safetensors(path, header, data))


if __name__ == "__main__":
    run(attack)
