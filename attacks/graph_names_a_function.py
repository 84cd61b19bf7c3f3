"""The traced graph of a bundle names functions that are no operators.

The attacker wants `fwl-export bisect`, which runs the graph, to call them: to open a file, to run
code, or to read and write outside of a tensor's memory. Every name that is not on the list of
operators must be refused.
"""

from __future__ import annotations

import json

from attacks.common import Place, list_file, run
from fwl_export.bundle.manifest import GRAPH_FILE, read_bundle
from fwl_export.errors import BundleError
from fwl_export.model.traced_graph import read_graph

TARGETS = (
    "aten.from_file.default",
    "aten.save.default",
    "aten._unsafe_index_put.default",
    "aten.as_strided.default",
    "builtins.eval",
    "os.system",
    "operator.methodcaller",
    "torch.load",
)


def attack(place: Place) -> None:
    import torch

    path = place.bundle / GRAPH_FILE
    data = json.loads(path.read_text(encoding="utf-8"))
    arguments = [str(place.outside / "pwned.txt")]
    for target in TARGETS:
        evil = {"name": "evil", "target": target, "arguments": arguments}
        path.write_text(json.dumps({**data, "sources": {}, "operations": [evil]}), encoding="utf-8")
        list_file(place.bundle, GRAPH_FILE)
        graph = read_graph(read_bundle(place.bundle).file(GRAPH_FILE))
        try:
            graph.run({}, {}, torch.float64)
        except BundleError as error:
            refused = error
        else:
            return
    raise refused


if __name__ == "__main__":
    run(attack)
