"""A state file that claims a header of 2^60 bytes.

The attacker wants the reader to allocate that much. The file must be refused.
"""

from __future__ import annotations

from attacks.common import Place, load_state, read_safetensors, run, saved_state, write_safetensors


def attack(place: Place) -> object:
    path = saved_state(place)
    header, data = read_safetensors(path)
    return load_state(place, write_safetensors(path, header, data, size=1 << 60))


if __name__ == "__main__":
    run(attack)
