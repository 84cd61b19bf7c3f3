"""One bit of the weights in a state file is flipped.

The attacker, or a failing disk, wants a session to continue from a state that no text leads to,
with values that look like any others. The file must be refused.
"""

from __future__ import annotations

from attacks.common import Place, load_state, read_safetensors, run, saved_state, write_safetensors


def attack(place: Place) -> object:
    path = saved_state(place)
    header, data = read_safetensors(path)
    spoiled = bytearray(data)
    spoiled[header["fast.up.kernel"]["data_offsets"][0] + 1] ^= 1
    return load_state(place, write_safetensors(path, header, bytes(spoiled)))


if __name__ == "__main__":
    run(attack)
