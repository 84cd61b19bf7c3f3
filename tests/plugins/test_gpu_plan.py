"""The launch plan of the GPU kernels: properties for all sizes, and errors for bad sizes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fwl_export.op.spec import ACTIVATION_TYPES
from plugins.kernels.gpu.plan import MULTIPROCESSORS, SIGNATURES, plan, variants

SM = st.sampled_from(list(MULTIPROCESSORS))
DTYPE = st.sampled_from(ACTIVATION_TYPES)
SIZE = st.integers(1, 5000)


@given(rows=st.integers(1, 300), tokens=SIZE, size_k=SIZE, size_v=SIZE, dtype=DTYPE, sm=SM)
def test_any_sizes_give_launches_of_compiled_variants(
    rows: int, tokens: int, size_k: int, size_v: int, dtype: str, sm: int
) -> None:
    steps = plan(rows, tokens, size_k, size_v, dtype, sm)
    for step in steps.launches:
        assert step.variant in set(variants(sm))
        assert 1 <= step.grid < 2**31
        scalars = {n for n, kind in SIGNATURES[step.variant.kernel].items() if kind == "i32"}
        assert scalars <= step.scalars.keys()
        assert not step.variant.aligned or (size_k % 16 == 0 and size_v % 16 == 0)
    covered = [s for s in steps.launches if s.variant.kernel == "prefill_state"]
    if tokens > 1:
        ends = [s.scalars["start"] + s.scalars["length"] for s in covered]
        assert [s.scalars["start"] for s in covered] == [0, *ends[:-1]]
        assert ends[-1] == tokens
        assert [s.first_segment for s in covered] == [i == 0 for i in range(len(covered))]
        largest = max(s.scalars["length"] for s in covered)
        # Kernels compute offsets inside a segment with 32 bits.
        assert largest * max(size_k, size_v) < 2**31
        assert steps.workspace == steps.launches[1].scalars["tiles_k"] * rows * largest * size_v


@given(rows=st.integers(1, 300), size_k=SIZE, size_v=SIZE, sm=SM)
def test_decode_covers_every_row_of_the_state_once(
    rows: int, size_k: int, size_v: int, sm: int
) -> None:
    steps = plan(rows, 1, size_k, size_v, "float16", sm)
    scalars = steps.launches[0].scalars
    assert (scalars["splits"] - 1) * scalars["rows"] < size_k <= scalars["splits"] * scalars["rows"]
    assert len(steps.launches) == (2 if scalars["splits"] > 1 else 1)
    assert steps.workspace == (rows * scalars["splits"] * size_v if scalars["splits"] > 1 else 0)


def test_small_batches_are_split_and_large_ones_are_not() -> None:
    assert plan(1, 1, 768, 768, "float16", 90).launches[0].variant.name == (
        "decode_split_fp16_aligned"
    )
    assert plan(512, 1, 768, 768, "float16", 90).launches[0].variant.name == "decode_fp16_aligned"


def test_unaligned_pointers_use_the_general_kernels() -> None:
    steps = plan(1, 8, 64, 64, "float16", 90, aligned=False)
    assert not any(step.variant.aligned for step in steps.launches)


@pytest.mark.parametrize("sm", MULTIPROCESSORS)
def test_names_of_variants_are_unique(sm: int) -> None:
    names = [variant.name for variant in variants(sm)]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": 0}, "B is 0; expected 1 or more"),
        ({"tokens": 0}, "T is 0; expected 1 or more"),
        ({"size_k": 2**16, "size_v": 2**15}, r"Dk \* Dv is 2147483648; expected less than"),
        ({"dtype": "float64"}, "dtype is 'float64'; expected one of float32"),
        ({"sm": 70}, "sm is 70; expected one of 75"),
    ],
)
def test_unsupported_calls_are_refused(changes: dict[str, object], message: str) -> None:
    sizes = {"rows": 1, "tokens": 1, "size_k": 8, "size_v": 8, "dtype": "float32", "sm": 90}
    with pytest.raises(ValueError, match=message):
        plan(**{**sizes, **changes})
