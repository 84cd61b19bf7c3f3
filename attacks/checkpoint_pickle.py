"""A pickle under the name model.safetensors that writes a file when it is loaded.

The attacker wants code to run when the checkpoint is opened. The file must be refused because it
is not safetensors, and the code must not run.
"""

from __future__ import annotations

import pickle
from pathlib import Path

from attacks.common import Place, load_checkpoint, run


class Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.write_text, (self.path, "pwned")


def attack(place: Place) -> object:
    content = pickle.dumps({"weight": Payload(place.outside / "pwned.txt")})
    (place.bundle / "checkpoint" / "model.safetensors").write_bytes(content)
    return load_checkpoint(place)


if __name__ == "__main__":
    run(attack)
