"""An .npz of 300 bytes to import, whose array claims 4 TiB.

The attacker wants the memory to be allocated. The array must be refused before.
"""

from __future__ import annotations

import io
import zipfile

import numpy as np

from attacks.common import Place, run


def attack(place: Place) -> object:
    from fwl_export.importers.arrays import read_jax

    head = io.BytesIO()
    claim = {"descr": "<f4", "fortran_order": False, "shape": (1 << 40,)}
    np.lib.format.write_array_header_1_0(head, claim)
    path = place.bundle.with_name("params.npz")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("kernel.npy", head.getvalue())
    return read_jax(path)["kernel"]()


if __name__ == "__main__":
    run(attack)
