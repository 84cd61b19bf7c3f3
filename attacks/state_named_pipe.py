"""A state file that is a named pipe into which nobody writes.

The attacker wants a server to wait forever. Anything but a regular file must be refused.

"""

from __future__ import annotations

import os

from attacks.common import Place, load_state, run


def attack(place: Place) -> object:
    path = place.bundle.with_name("pipe.state")
    os.mkfifo(path)
    return load_state(place, path)


if __name__ == "__main__":
    run(attack)
