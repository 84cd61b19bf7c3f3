"""An array of an .npz file grows from 200 kB to 200 MB when it is unpacked.

The attacker wants memory to be exhausted, as by a zip bomb. The array must be refused.
"""

from __future__ import annotations

import numpy as np

from attacks.common import Place, run
from fwl_export.importers.arrays import read_tensorflow


def attack(place: Place) -> object:
    path = place.bundle / "block.npz"
    np.savez_compressed(path, up_kernel=np.zeros(50_000_000, np.float32))
    return read_tensorflow(path)["up_kernel"]().sum()


if __name__ == "__main__":
    run(attack)
