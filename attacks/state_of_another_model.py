"""A state file of another model whose tensors have the same names and shapes.

The attacker wants a session to continue from a state that means nothing to this model. The file
must be refused because it names another model's id.
"""

from __future__ import annotations

from attacks.common import Place, load_state, read_safetensors, run, saved_state, write_safetensors


def attack(place: Place) -> object:
    path = saved_state(place)
    header, data = read_safetensors(path)
    header["__metadata__"]["model_id"] = "0" * 64
    return load_state(place, write_safetensors(path, header, data))


if __name__ == "__main__":
    run(attack)
