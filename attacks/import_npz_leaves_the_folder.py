"""An .npz to import whose archive names files outside, as in a "zip slip".

The attacker wants reading to unpack them. Names of an archive are names of arrays, never paths.
"""

from __future__ import annotations

import zipfile

import numpy as np

from attacks.common import Place, run


def attack(place: Place) -> str:
    from fwl_export.importers.arrays import read_jax

    path, beside = place.bundle.with_name("params.npz"), place.bundle.with_name("x.npy")
    np.save(beside, np.zeros(3))
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(beside, "../outside/pwned.npy")
        archive.write(beside, f"{place.outside}/pwned.npy")
    read = [array() for array in read_jax(path).values()]
    assert all(array.shape == (3,) for array in read)
    return f"harmless: {len(read)} arrays were read in memory"


if __name__ == "__main__":
    run(attack)
