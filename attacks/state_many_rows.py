"""A compressed state file of a few kilobytes that claims a hundred million rows.

The attacker wants the reader to allocate room for all of them. The number must be compared with
the tensors before anything is allocated, and the file refused.

"""

from __future__ import annotations

from attacks.common import Place, load_state, read_safetensors, run, signed, write_safetensors
from fwl_export.runtimes import open_session


def attack(place: Place) -> object:
    session = open_session(place.bundle)
    session.feed([1, 2, 3])
    path = place.bundle.with_name("small.state")
    session.save_state(path, compress="lowrank")
    header, data = read_safetensors(path)
    header["__metadata__"]["rows"] = "100000000"
    return load_state(place, write_safetensors(path, signed(header, data), data))


if __name__ == "__main__":
    run(attack)
