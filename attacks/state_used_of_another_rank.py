"""A compressed attention cache that has one axis less than the cache.

The attacker wants the code that puts it into the whole cache to crash, or to spread it over places
where it does not belong. The file must be refused.
"""

from __future__ import annotations

import math

from attacks.common import Place, load_state, read_safetensors, run, signed, write_safetensors
from fwl_export.runtimes import open_session


def attack(place: Place) -> object:
    path = place.bundle.with_name("small.state")
    session = open_session(place.bundle)
    session.feed([1, 2, 3])
    session.save_state(path, compress="lowrank")
    header, data = read_safetensors(path)
    entry = header["cache.0.key.used"]
    rows, *sizes = entry["shape"]
    entry["shape"] = [rows, math.prod(sizes)]
    return load_state(place, write_safetensors(path, signed(header, data), data))


if __name__ == "__main__":
    run(attack)
