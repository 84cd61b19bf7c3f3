"""Find the cause of what `check` found: the call, the tensor, the node, and a reproducer.

    bisection = bisect_bundle(read_bundle(Path("bundle")), ids, "onnxruntime")
    print(bisection.to_text())

`steps` finds the first call that goes wrong, `expose` runs it with every tensor as an output,
`locate` finds the first wrong tensor, `reproduce` writes the nodes that compute it.
"""

from fwl_export.bisect.finding import Bisection, Finding
from fwl_export.bisect.run import DEFAULT_TOKENS, bisect_bundle

__all__ = ["DEFAULT_TOKENS", "Bisection", "Finding", "bisect_bundle"]
