"""The weights are overwritten while a session is open.

The attacker, or a copy of a newer bundle over the older one, wants an open session to compute
something else from one token to the next, or to crash. The session must go on as if nothing had
happened.
"""

from __future__ import annotations

import numpy as np

from attacks.common import Place, run
from fwl_export.bundle.manifest import MODEL_DATA_FILE
from fwl_export.runtimes import open_session


def attack(place: Place) -> object:
    session, expected = (open_session(place.bundle) for _ in range(2))
    logits = expected.feed([1, 2, 3])
    path = place.bundle / MODEL_DATA_FILE
    with path.open("r+b") as stream:
        stream.write(bytes(path.stat().st_size))
    with path.open("r+b") as stream:
        stream.truncate(0)
    if np.array_equal(session.feed([1, 2, 3]), logits):
        return "harmless: the session computes from the bytes that were hashed"
    return "the logits moved"


if __name__ == "__main__":
    run(attack)
