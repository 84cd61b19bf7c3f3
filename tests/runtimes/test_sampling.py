"""The choice of the next token."""

from __future__ import annotations

import numpy as np
import pytest

from fwl_export.errors import ConfigError
from fwl_export.runtimes import Sampler

PROBABILITIES = np.array([0.1, 0.4, 0.05, 0.3, 0.15])
LOGITS = np.log(PROBABILITIES).astype(np.float32) + 3


def shares(sampler: Sampler, count: int = 4000) -> np.ndarray:
    return np.bincount([sampler(LOGITS) for _ in range(count)], minlength=5) / count


def test_the_default_takes_the_most_likely_token() -> None:
    assert shares(Sampler(), 3).tolist() == [0, 1, 0, 0, 0]
    assert Sampler()(np.array([1.0, 2.0, 2.0])) == 1


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({}, [0, 1, 2, 3, 4]),
        ({"top_k": 2}, [1, 3]),
        ({"top_k": 9}, [0, 1, 2, 3, 4]),
        ({"top_p": 0.39}, [1]),
        ({"top_p": 0.41}, [1, 3]),
        ({"top_p": 0.8}, [1, 3, 4]),
        ({"top_k": 3, "top_p": 0.5}, [1, 3]),
    ],
)
def test_draws_follow_the_probabilities_of_the_allowed_tokens(
    settings: dict[str, float], kept: list[int]
) -> None:
    expected = np.zeros(5)
    expected[kept] = PROBABILITIES[kept] / PROBABILITIES[kept].sum()
    # Four standard deviations of a relative frequency among 4000 draws.
    assert np.abs(shares(Sampler(1.0, **settings)) - expected).max() < 4 * 0.5 / 4000**0.5


def test_temperature_sharpens() -> None:
    expected = PROBABILITIES**2 / (PROBABILITIES**2).sum()
    assert np.abs(shares(Sampler(0.5)) - expected).max() < 4 * 0.5 / 4000**0.5


def test_the_smallest_temperature_takes_the_most_likely_token() -> None:
    with np.errstate(all="raise"):
        assert Sampler(temperature=5e-324)(np.float32([1, 3, 2])) == 1


def test_a_seed_repeats() -> None:
    runs = [[s(LOGITS) for _ in range(20)] for s in (Sampler(1, seed=3), Sampler(1, seed=3))]
    assert runs[0] == runs[1] != [Sampler(1, seed=4)(LOGITS) for _ in range(20)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1.0}, "temperature is -1.0; expected 0 or more"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_p": 0.0}, "top_p is 0.0; expected more than 0"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"seed": -1}, "seed is -1; expected 0 or more"),
    ],
)
def test_settings_out_of_range(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Sampler(**settings)  # type: ignore[arg-type]


def test_seeds_draw_what_they_have_always_drawn() -> None:
    """The tokens of release 0.1, which a change of the sampler must not change."""
    logits = (np.random.default_rng(0).normal(size=300) * 3).astype(np.float32)
    settings = [(0.8, 0, 1.0), (1.5, 0, 0.9), (1.0, 40, 1.0), (1.2, 40, 0.8)]
    samplers = [Sampler(*each, seed=7) for each in settings]
    assert [[sampler(logits) for _ in range(6)] for sampler in samplers] == [
        [270, 211, 247, 219, 219, 259],
        [164, 232, 46, 219, 270, 6],
        [270, 244, 259, 219, 219, 164],
        [270, 79, 259, 219, 219, 211],
    ]
