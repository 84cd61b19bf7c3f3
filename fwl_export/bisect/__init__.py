"""Find the cause of an error that `check` reported: the call, the tensor, the ONNX node.

    bisection = bisect_bundle(read_bundle(Path("bundle")), ids, "onnxruntime")
    print(bisection.to_text())

`reported` reads from a check in which case something is wrong, `steps` finds the first call of that
case that goes wrong, `expose` runs it with every tensor of the graph as an output, `locate` finds
the first wrong tensor, and `reproduce` writes a small program with only the nodes that compute it.
Where the graph is right, `around` searches the session. `run` puts these together; `finding` holds
the result.
"""

from fwl_export.bisect.finding import Bisection, Finding
from fwl_export.bisect.run import bisect_bundle
from fwl_export.parity.check import DEFAULT_TOKENS

__all__ = ["DEFAULT_TOKENS", "Bisection", "Finding", "bisect_bundle"]
