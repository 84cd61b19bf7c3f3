"""A state file whose metadata is null instead of an object.

The attacker wants the code that reads the metadata to crash. The file must be refused.

"""

from __future__ import annotations

from attacks.common import Place, load_state, read_safetensors, run, saved_state, write_safetensors


def attack(place: Place) -> object:
    path = saved_state(place)
    header, data = read_safetensors(path)
    header["__metadata__"] = None
    return load_state(place, write_safetensors(path, header, data))


if __name__ == "__main__":
    run(attack)
