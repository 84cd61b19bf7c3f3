"""Logits processors, compared with those of transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from transformers.generation import logits_process as theirs

from fwl_export.errors import ConfigError, ShapeError, TokenError
from fwl_export.runtimes import Sampler
from fwl_export.runtimes import processors as ours
from fwl_export.runtimes.sampling import Choice

V = 50
IDS = np.array([3, 7, 7, 0, 49, 3])

RANDOM = np.random.default_rng(0).normal(size=V) * 4
LOGITS = {
    "random": RANDOM,
    "ties": np.round(RANDOM / 2),
    "many ties": np.sign(RANDOM),
    "all equal": np.zeros(V),
    "one certain": np.where(np.arange(V) == 7, 800.0, RANDOM),
    "some forbidden": np.where(np.arange(V) % 3 == 0, -np.inf, RANDOM),
    "one left": np.where(np.arange(V) == 49, 2.0, -np.inf),
    "two left, equal": np.where(np.isin(np.arange(V), [3, 9]), -1.0, -np.inf),
}

PAIRS: list[tuple[Callable[[Any, Any], Any], Any]] = [
    *((ours.TopK(k), theirs.TopKLogitsWarper(k)) for k in (1, 2, 5, 17, V, V + 1)),
    *((ours.TopP(p), theirs.TopPLogitsWarper(p)) for p in (1e-9, 0.1, 0.5, 0.9, 0.999, 1.0)),
    *((ours.MinP(p), theirs.MinPLogitsWarper(p)) for p in (0.0, 0.05, 0.5, 1.0)),
    *(
        (ours.RepetitionPenalty(p), theirs.RepetitionPenaltyLogitsProcessor(p))
        for p in (0.5, 1.0, 1.3, 100.0)
    ),
    (ours.Forbidden([]), theirs.SuppressTokensLogitsProcessor([])),
    (ours.Forbidden([0, 7, 49, 7]), theirs.SuppressTokensLogitsProcessor([0, 7, 49])),
    *(
        (ours.MinNewTokens(4, n, [7, 1]), theirs.MinNewTokensLengthLogitsProcessor(4, n, [7, 1]))
        for n in (0, 2, 3)
    ),
    (
        ours.LogitBias({7: -2.5, 0: 3.0, 48: -np.inf}),
        theirs.SequenceBiasLogitsProcessor({(7,): -2.5, (0,): 3.0, (48,): -np.inf}),
    ),
]


def their_result(processor: Any, logits: np.ndarray, ids: np.ndarray = IDS) -> np.ndarray:
    result: np.ndarray = processor(torch.tensor(ids)[None], torch.tensor(logits)[None])[0].numpy()
    return result


@pytest.mark.parametrize("logits", LOGITS.values(), ids=LOGITS)
@pytest.mark.parametrize(("our", "their"), PAIRS, ids=lambda pair: type(pair).__name__)
def test_it_is_that_of_transformers(our: Any, their: Any, logits: np.ndarray) -> None:
    before = logits.copy()
    result = our(IDS, logits)
    assert result.dtype == np.float64
    assert np.array_equal(logits, before), "the caller's logits stay as they are"
    expected = their_result(their, logits)
    if isinstance(our, ours.TopP):  # which of several equal tokens stay depends on torch's sort
        result, expected = np.sort(result), np.sort(expected)
    assert np.array_equal(result, expected)


def test_of_equal_tokens_top_p_keeps_the_lowest_ids() -> None:
    result = ours.TopP(0.5)(IDS, np.zeros(4))
    assert result.tolist() == [0, 0, -np.inf, -np.inf]


@pytest.mark.parametrize("temperature", [0.1, 0.8, 1.0, 3.0])
def test_the_temperature_is_that_of_transformers(temperature: float) -> None:
    their = their_result(theirs.TemperatureLogitsWarper(temperature), RANDOM)
    result = ours.Temperature(temperature)(IDS, RANDOM)
    assert np.allclose(result, their - their.max(), rtol=1e-14, atol=1e-14)
    assert result.max() == 0


def test_a_sampler_applies_them_in_the_order_of_transformers() -> None:
    seen: list[np.ndarray] = []

    def halve(ids: np.ndarray, logits: np.ndarray) -> np.ndarray:
        seen.append(ids)
        return logits / 2

    sampler = Sampler(
        0.7,
        top_k=20,
        top_p=0.9,
        min_p=0.02,
        repetition_penalty=1.3,
        logit_bias={5: 2.0},
        forbidden=[11],
        processors=[halve],
    )
    chain = theirs.LogitsProcessorList(
        [
            theirs.SequenceBiasLogitsProcessor({(5,): 2.0}),
            theirs.RepetitionPenaltyLogitsProcessor(1.3),
            theirs.SuppressTokensLogitsProcessor([11]),
            lambda ids, scores: scores / 2,
            theirs.TemperatureLogitsWarper(0.7),
            theirs.TopKLogitsWarper(20),
            theirs.TopPLogitsWarper(0.9),
            theirs.MinPLogitsWarper(0.02),
        ]
    )
    their = their_result(chain, RANDOM)
    result = ours.run_processors(sampler._processors(0), IDS, RANDOM)
    assert np.array_equal(np.isinf(result), np.isinf(their))
    kept = np.isfinite(result)
    assert 1 < kept.sum() < 20
    assert np.allclose(result[kept], their[kept] - their.max(), rtol=1e-13, atol=1e-13)
    assert np.array_equal(seen[0], IDS)


def test_presence_and_frequency_count_what_was_generated() -> None:
    result = ours.OccurrencePenalty(0.5, 0.25, prompt_length=1)(IDS, np.zeros(V))
    expected = np.zeros(V)
    expected[[0, 3, 49]], expected[7] = -0.75, -1.0
    assert np.array_equal(result, expected)


def test_a_sampler_knows_the_text_so_far() -> None:
    logits = np.array([1.0, 0.9, 0.8])
    choice = Choice(Sampler(frequency_penalty=0.15), [0, 0])
    assert [choice(logits) for _ in range(6)] == [0, 1, 0, 2, 1, 0]
    penalized = Choice(Sampler(repetition_penalty=2.0), [0])
    assert [penalized(logits) for _ in range(3)] == [1, 2, 0]
    seen: list[list[int]] = []

    def look(ids: np.ndarray, logits: np.ndarray) -> np.ndarray:
        seen.append(ids.tolist())
        return logits

    looking = Choice(Sampler(processors=[look]), [5])
    for _ in range(30):
        looking(logits)
    assert seen == [[5] + [0] * n for n in range(30)]


def test_another_callable_gets_the_logits_alone() -> None:
    assert Choice(lambda logits: int(logits.argmin()), [5])(np.array([1.0, 0.0])) == 1


def test_the_same_settings_with_another_seed() -> None:
    sampler = Sampler(1.0, top_k=9, seed=3)
    other = sampler.with_seed(5)
    expected = Sampler(1.0, top_k=9, seed=5)
    assert other.seed == 5
    assert [other(RANDOM) for _ in range(9)] == [expected(RANDOM) for _ in range(9)]


def test_added_processors_have_the_last_word() -> None:
    sampler = Sampler(processors=[lambda ids, logits: np.zeros(V)])
    assert sampler(RANDOM) == 0
    assert sampler.with_processors(ours.Forbidden([0, 1]))(RANDOM) == 2
    assert sampler(RANDOM) == 0


def test_forbidden_tokens_are_never_drawn() -> None:
    sampler = Sampler(5.0, forbidden=range(2, V))
    assert {sampler(RANDOM) for _ in range(200)} == {0, 1}


def test_no_token_is_left() -> None:
    for sampler in (Sampler(forbidden=range(V)), Sampler(1.0, forbidden=range(V))):
        with pytest.raises(
            TokenError, match="no token is left to draw after the logits processor Forb"
        ):
            sampler(RANDOM)


@pytest.mark.parametrize(
    ("returned", "error", "message"),
    [
        (np.zeros(3), ShapeError, r"the logits processor bad returned array\(.*expected an array"),
        (None, ShapeError, "returned None; expected an array of 50 logits"),
        ("x", ShapeError, "returned 'x'; expected an array of 50 logits"),
        (np.full(V, np.nan), TokenError, "the logits processor bad returned NaN or"),
        (np.where(np.arange(V) == 3, np.inf, 0), TokenError, "returned NaN or"),
    ],
)
def test_a_processor_that_returns_nonsense(
    returned: object, error: type[Exception], message: str
) -> None:
    def bad(ids: np.ndarray, logits: np.ndarray) -> object:
        return returned

    with pytest.raises(error, match=message):
        Sampler(processors=[bad])(RANDOM)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min_p": 1.5}, "min_p is 1.5; expected 0 or more and 1 at most"),
        ({"min_p": -0.1}, "min_p is -0.1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0; expected more than 0"),
        ({"presence_penalty": float("nan")}, "presence_penalty is nan; expected a number"),
        ({"frequency_penalty": "1"}, "frequency_penalty is '1'; expected a number"),
        ({"temperature": True}, "temperature is True"),
        ({"top_k": 1.5}, "top_k is 1.5; expected a whole number of 0 or more"),
        ({"logit_bias": [3]}, r"logit_bias is \[3\]; expected a mapping by token id"),
        ({"logit_bias": {3: "x"}}, "logit_bias of token id 3 is 'x'; expected a number"),
        ({"logit_bias": {3: np.inf}}, "logit_bias of token id 3 is inf"),
        ({"processors": [3]}, "processors has 3; expected callables"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Sampler(**settings)


def test_token_ids_out_of_range() -> None:
    with pytest.raises(TokenError, match="forbidden names -1; expected token ids, 0 or more"):
        Sampler(forbidden=[-1])
    with pytest.raises(TokenError, match="logit_bias names 'the'; expected token ids"):
        Sampler(logit_bias={"the": 1.0})  # type: ignore[dict-item]
    with pytest.raises(TokenError, match="forbidden names token id 50, which is out of range"):
        Sampler(forbidden=[50])(RANDOM)
    with pytest.raises(ShapeError, match="forbidden is 7; expected a list of whole numbers"):
        Sampler(forbidden=7)  # type: ignore[arg-type]
