"""The running statistics against plain numpy on small arrays."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fwl_export.parity.compare import (
    ULP_BINS,
    PredictionSum,
    TensorSum,
    log_softmax,
    ulp_histogram,
)


def test_tensor_statistics_are_those_of_numpy() -> None:
    rng = np.random.default_rng(0)
    reference = rng.standard_normal((3, 4, 5))
    candidate = (reference + rng.standard_normal((3, 4, 5)) * 1e-3).astype(np.float32)
    total = TensorSum(3)
    for row in range(3):
        for part in (slice(0, 1), slice(1, 4)):  # in pieces, as the schedule adds them
            places = np.arange(4)[part]
            total.add(row, candidate[row, part], reference[row, part], 7, 70, places)
    error = total.result()

    difference = candidate.astype(np.float64) - reference
    rms = np.sqrt((difference**2).mean((1, 2)) / (reference**2).mean((1, 2)))
    assert error.max_abs == np.abs(difference).max()
    assert error.relative_rms == pytest.approx(rms.max(), rel=1e-12)
    assert error.scale == np.abs(reference).max()
    assert error.worst is not None
    index = np.unravel_index(np.abs(difference).argmax(), difference.shape)
    assert error.worst.index == index
    assert (error.worst.step, error.worst.tokens_read) == (7, 70)
    assert error.worst.candidate == candidate[index]
    assert error.worst.reference == reference[index]


def test_a_small_row_is_not_hidden_behind_a_large_one() -> None:
    total = TensorSum(2)
    total.add(0, np.array([1000.0, 1000.0]), np.array([1000.0, 1000.0]))
    total.add(1, np.array([0.011, 0.01]), np.array([0.01, 0.01]))
    assert total.result().relative_rms == pytest.approx(0.1 / math.sqrt(2), rel=1e-9)


@pytest.mark.parametrize(("candidate", "expected"), [([0.0, 0.0], 0.0), ([0.0, 1e-30], math.inf)])
def test_a_reference_of_zeros_must_be_met_exactly(candidate: list[float], expected: float) -> None:
    total = TensorSum(1)
    total.add(0, np.array(candidate), np.zeros(2))
    assert total.result().relative_rms == expected


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_what_is_not_finite_is_infinitely_far(wrong: float) -> None:
    total = TensorSum(1)
    total.add(0, np.array([1.0, 3.0]), np.ones(2))
    total.add(0, np.array([1.0, wrong, 1.0]), np.ones(3), step=1)
    total.add(0, np.array([9.0]), np.ones(1), step=2)
    error = total.result()
    assert error.max_abs == error.relative_rms == math.inf
    assert error.worst is not None
    assert (error.worst.step, error.worst.index) == (1, (0, 1))


def test_nothing_compared_is_no_distance() -> None:
    total = TensorSum(2)
    total.add(0, np.zeros((0, 4)), np.zeros((0, 4)))
    assert total.result().worst is None
    assert total.result().max_abs == total.result().relative_rms == 0


def test_whole_numbers_and_scalars_are_compared() -> None:
    total = TensorSum(1)
    total.add(0, np.array(5), np.array(7))
    error = total.result()
    assert error.max_abs == 2
    assert error.worst is not None
    assert error.worst.index == (0,)


def test_prediction_statistics_are_those_of_numpy() -> None:
    rng = np.random.default_rng(1)
    reference = rng.standard_normal((50, 9)) * 2
    candidate = reference + rng.standard_normal((50, 9)) * 0.5
    labels = rng.integers(0, 9, 50)
    total = PredictionSum()
    for part in (slice(0, 20), slice(20, 20), slice(20, 50)):
        total.add(candidate[part], reference[part], labels[part])
    found = total.result()

    p, q = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (reference, candidate))
    divergence = (p * np.log(p / q)).sum(-1)
    token = np.arange(50)
    assert found.tokens == 50
    assert found.kl == pytest.approx(divergence.mean(), rel=1e-12)
    assert found.kl_max == pytest.approx(divergence.max(), rel=1e-12)
    assert found.top1 == (p.argmax(-1) == q.argmax(-1)).mean() < 1
    likely = [np.argsort(x, -1)[:, -5:] for x in (p, q)]
    shared = [len(set(a) & set(b)) / 5 for a, b in zip(*likely, strict=True)]
    assert found.top5 == pytest.approx(np.mean(shared), rel=1e-12)
    assert found.loss == pytest.approx(-np.log(q[token, labels]).mean(), rel=1e-12)
    assert found.reference_loss == pytest.approx(-np.log(p[token, labels]).mean(), rel=1e-12)
    assert found.perplexity == pytest.approx(math.exp(found.loss))
    assert found.reference_perplexity == pytest.approx(math.exp(found.reference_loss))


def test_divergence_is_exact_where_rounding_spoils_the_plain_formula() -> None:
    rng = np.random.default_rng(2)
    reference = rng.standard_normal((20, 2000))
    shift = rng.standard_normal((20, 2000)) * 1e-9
    total = PredictionSum()
    total.add(reference + shift, reference, np.zeros(20, np.int64))
    p = np.exp(log_softmax(reference))
    variance = (p * shift**2).sum(-1) - (p * shift).sum(-1) ** 2
    assert total.result().kl == pytest.approx(variance.mean() / 2, rel=1e-4)  # to second order
    total = PredictionSum()
    total.add(reference, reference, np.zeros(20, np.int64))
    assert total.result().kl == 0


def test_a_loss_beyond_the_range_of_exp_is_an_infinite_perplexity() -> None:
    total = PredictionSum()
    total.add(np.array([[0.0, 2000.0]]), np.array([[0.0, 0.0]]), np.array([0]))
    found = total.result()
    assert found.loss == 2000
    assert found.perplexity == math.inf


def test_log_softmax_of_half_precision_is_computed_in_double() -> None:
    logits = np.array([[60000.0, 0.0], [-3.0, 4.0]], np.float16)
    found = log_softmax(logits)
    assert found.dtype == np.float64
    # A handful of float64 roundings of 1.1e-16 each.
    np.testing.assert_allclose(np.exp(found).sum(-1), 1, rtol=1e-15)
    np.testing.assert_allclose(found[1, 0], -7 - math.log1p(math.exp(-7)), rtol=1e-15)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_differences_are_counted_in_units_of_the_last_place(dtype: type) -> None:
    value = np.array([1.0, 1.5, -3.0, 1e-4, 7.0, 1000.0], dtype)
    unit = np.spacing(np.abs(value)).astype(np.float64)
    for factor, expected in ((0, 0), (0.49, 0), (0.5, 1), (0.99, 1), (1, 2), (3.9, 3), (100, 8)):
        counts = ulp_histogram(factor * unit, value.astype(np.float64), dtype)
        assert counts.argmax() == expected
        assert counts.sum() == counts.max() == 6, (factor, counts)
    assert ulp_histogram(np.zeros(3), np.array([0.0, 1e-320, 1.0]), dtype)[0] == 3
    counts = ulp_histogram(np.array([np.nan, np.inf]), np.ones(2), dtype)
    assert counts[ULP_BINS - 1] == 2
