"""The one definition of the op `fwl::LinearAttentionUpdate`, version 2.

Update, then read, token by token:

    S_i = d_i S_{i-1} + k_i (outer) v_i        o_i = q_i^T S_i        i = 1 ... T

where q_i, k_i and v_i are the rows of query, key and value, d_i the decay, S_0 the past state, S_T
the present state, and o_i the output. The PyTorch op, the ONNX function body, kernels and plugins
take names, order, types and attributes from here.

The output is a sum over all tokens so far, which a caller multiplies by a small step size. It is
float32 whatever the activations are, because such a sum soon exceeds 65504, where float16 ends.
"""

from __future__ import annotations

from dataclasses import dataclass

from fwl_export.errors import ShapeError

DOMAIN = "fwl"
NAME = "LinearAttentionUpdate"
VERSION = 2
# In version 1, the output had the activations' type. Where that is float32, both are the same, so
# such nodes still run; others are refused.
FLOAT32_VERSION = 1

# Attributes of the ONNX node. TensorRT's parser looks for a plugin in this namespace and version,
# and does not find ours without them.
NODE_ATTRIBUTES = {"plugin_namespace": "fwl", "plugin_version": str(VERSION)}

# Stands for log 0 where products of decays are sums of logs: finite, so that 0 * log 0 is not NaN,
# and small enough for its exp to be exactly 0.
LOG_ZERO = -1e4

ACTIVATION_TYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class Argument:
    """One input or output of the op.

    Attributes:
      name: Name in every implementation.
      shape: One symbol per axis; equal symbols mean equal sizes.
      dtype: Either "float32", or "T" for one of ACTIVATION_TYPES, the same for all of these.
      doc: Description for generated documentation.
    """

    name: str
    shape: tuple[str, ...]
    dtype: str
    doc: str


INPUTS = (
    Argument("query", ("B", "T", "Dk"), "T", "read vectors"),
    Argument("key", ("B", "T", "Dk"), "T", "write keys"),
    Argument("value", ("B", "T", "Dv"), "T", "write values, unnormalised"),
    Argument("decay", ("B", "T"), "float32", "in [0, 1]; applied before the token's own write"),
    Argument("past_state", ("B", "Dk", "Dv"), "float32", "the state before the first token"),
)
OUTPUTS = (
    Argument("output", ("B", "T", "Dv"), "float32", "what the queries read"),
    Argument("present_state", ("B", "Dk", "Dv"), "float32", "the state after the last token"),
)


def check_shapes(shapes: dict[str, tuple[int, ...]]) -> dict[str, int]:
    """Check the inputs' shapes against the definition.

    Args:
      shapes: Shape of every input, by name.

    Returns:
      Sizes by symbol: "B", "T", "Dk" and "Dv".

    Raises:
      ShapeError: The number of axes or a size does not fit, or B or T is 0.
    """
    sizes: dict[str, int] = {}
    for argument in INPUTS:
        shape = tuple(shapes[argument.name])
        expected = [sizes.get(symbol, symbol) for symbol in argument.shape]
        fits = len(shape) == len(expected) and all(
            symbol not in sizes or sizes[symbol] == size
            for symbol, size in zip(argument.shape, shape, strict=True)
        )
        if not fits:
            raise ShapeError(
                f"{DOMAIN}::{NAME}: '{argument.name}' has shape {list(shape)}; expected "
                f"[{', '.join(map(str, expected))}]"
            )
        sizes.update(zip(argument.shape, shape, strict=True))
    for symbol, meaning in (("B", "rows"), ("T", "tokens")):
        if sizes[symbol] < 1:
            raise ShapeError(
                f"{DOMAIN}::{NAME}: {symbol} ({meaning}) is {sizes[symbol]}; expected 1 or more"
            )
    return sizes
