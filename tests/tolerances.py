"""How far two results may be apart, and why: the one table of tolerances for all tests.

A test names its row: `assert_close("op.output.float16", actual, expected)` passes if
`|actual - expected| <= atol + rtol * |expected|` holds for every element. To add a row, derive its
size (machine epsilon times the size of what is summed), then measure the error. A bound that is
much wider than the measured error hides bugs. If a bound seems too tight, look for a bug first.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Tolerance:
    """Bounds of an elementwise comparison.

    Attributes:
      atol: Absolute tolerance, in the unit of the compared values.
      rtol: Relative tolerance, as a share of the expected value.
      reason: Reason for the size of the bounds.
    """

    atol: float
    rtol: float
    reason: str


# Over the op's CASES an output is at most 200 and comes from two sums, of 96 and of 257 terms; a
# state is at most 19 and comes from one sum. Rounding errors of such sums grow with the square root
# of their length, to about 5 roundings of the largest value; half of that was measured.
_OUTPUT = 5 * 200
_STATE = 5 * 19
_EPS_64 = 2.0**-52
_EPS_32 = 2.0**-23

TOLERANCES = {
    "op.output.float64": Tolerance(_OUTPUT * _EPS_64, 0.0, "5 roundings of 200 in float64"),
    "op.output.float32": Tolerance(
        _OUTPUT * _EPS_32, 0.0, "5 roundings of 200 in float32, for activations of any dtype"
    ),
    "op.state.float64": Tolerance(_STATE * _EPS_64, 0.0, "5 roundings of 19 in float64"),
    "op.state.float32": Tolerance(
        _STATE * _EPS_32, 0.0, "5 roundings of 19 in float32, for activations of any dtype"
    ),
    "beyond_half.output.float32": Tolerance(
        5 * 4e5 * _EPS_32, 0.0, "5 roundings of 400 000 in float32, for activations of any dtype"
    ),
    "beyond_half.state.float32": Tolerance(5 * 7e4 * _EPS_32, 0.0, "5 roundings of 70 000"),
    "op.decay_products.float32": Tolerance(
        0.0, 20 * _EPS_32, "exp of a sum of logs up to 20, whose absolute error becomes relative"
    ),
    "kernel.output.float32": Tolerance(
        5 * 1000 * _EPS_32, 0.0, "5 roundings of 1000 in float32: sums of 523 and of 300 terms"
    ),
    "kernel.state.float32": Tolerance(
        5 * 50 * _EPS_32, 0.0, "5 roundings of 50 in float32, over up to 10 000 tokens"
    ),
    "model.paper_code": Tolerance(
        1e-10, 0.0, "sums in another order in float64, on logits of size 5; 2e-15 was measured"
    ),
    "importers.float32": Tolerance(
        1e-6, 0.0, "roundings of 6e-8 through two layers, on logits of size 2; 5e-7 was measured"
    ),
    "model.gradcheck": Tolerance(
        1e-7, 1e-5, "a central difference of step 1e-6 in float64, on gradients up to 1"
    ),
    "model.float64": Tolerance(
        1e-12, 1e-12, "the same sums in another order: a few hundred roundings of 2e-16"
    ),
    "model.float32_stream": Tolerance(
        5e-6, 0.0, "roundings of 6e-8 through two layers, on logits of size 1.5; 9e-7 was measured"
    ),
    "model.float16_stream": Tolerance(
        0.01, 0.0, "a few roundings of 5e-4 on logits of size 1.2; 3e-3 was measured"
    ),
    "backbone.float32": Tolerance(
        1e-5,
        0.0,
        "float32 through 2 layers and rotary phases of 41 tokens: 2e-6 of the largest value",
    ),
    "backbone.float16": Tolerance(
        1e-2, 0.0, "float16 through 2 layers: 20 roundings of 5e-4 of the largest value"
    ),
    "runtime.float32": Tolerance(
        1e-5, 1e-5, "two float32 programs over 63 tokens, on values up to 5; 4e-6 was measured"
    ),
    "runtime.float16": Tolerance(
        0.05, 0.0, "48 tokens in float16, on logits of size 3; 1e-2 was measured"
    ),
    "training.two_processes": Tolerance(
        1e-12, 1e-10, "sums in another order in float64, through the iterations of Muon"
    ),
    "training.bfloat16": Tolerance(
        2e-3,
        0.0,
        "12 updates with products rounded to 8 bits, on losses of size 4; 7e-4 was measured",
    ),
    "model.rotary": Tolerance(
        1e-5, 0.0, "a product of two rotated vectors of size 3 in float32: 20 roundings of 1e-7"
    ),
    "docs.converter": Tolerance(
        1e-8, 0.0, "float64, but step sizes and horizon are stored in float32: 2e-9 was measured"
    ),
    "foreign.bundle": Tolerance(
        2e-6, 0.0, "ONNX Runtime's float32, logits of up to 2.2 that learn: 8e-7 was measured"
    ),
    "model.central_difference": Tolerance(
        1e-8, 1e-5, "a central difference of step 1e-6 in float64, accurate to about 1e-9"
    ),
}


def assert_close(
    name: str, actual: npt.ArrayLike, expected: npt.ArrayLike, message: str = ""
) -> None:
    """Compare in float64 with the row `name` of the table; the shapes must be equal too.

    Args:
      name: Name of a row of `TOLERANCES`.
      actual: Values to check.
      expected: Values that are right.
      message: Text to show first if the comparison fails.
    """
    tolerance = TOLERANCES[name]
    np.testing.assert_allclose(
        np.asarray(actual, dtype=np.float64),
        np.asarray(expected, dtype=np.float64),
        rtol=tolerance.rtol,
        atol=tolerance.atol,
        equal_nan=False,
        err_msg=f"{message} [{name}: {tolerance.reason}]",
        strict=True,
    )
