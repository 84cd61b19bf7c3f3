"""Two tensors of the same shape have changed places in a state file.

The attacker wants a session to continue from a state that no text leads to. The file must be
refused.

"""

from __future__ import annotations

from attacks.common import Place, load_state, read_safetensors, run, saved_state, write_safetensors


def attack(place: Place) -> object:
    path = saved_state(place)
    header, data = read_safetensors(path)
    header["cache.0.key"], header["cache.1.key"] = header["cache.1.key"], header["cache.0.key"]
    return load_state(place, write_safetensors(path, header, data))


if __name__ == "__main__":
    run(attack)
