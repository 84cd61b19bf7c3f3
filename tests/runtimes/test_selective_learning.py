"""Selective learning: which tokens a session learns from, which it only reads, what it forgets."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from fwl_export.runtimes import Session, open_session
from tests.bundles import VOCABULARY
from tests.tolerances import assert_close

# More than any rounding error, less than any effect of learning from 12 tokens.
LEARNED = 0.01

Ids = npt.NDArray[np.int64]


def ids(seed: int, length: int) -> Ids:
    return np.random.default_rng(seed).integers(0, VOCABULARY, length)


@pytest.fixture(scope="module", params=["onnxruntime", "torch"])
def runtime(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def session(tiny_bundle: Path, runtime: str) -> Session:
    return open_session(tiny_bundle, runtime)


def weights(session: Session) -> dict[str, npt.NDArray[np.float32]]:
    """Return the fast weights of a session, by name."""
    return {name: a for name, a in session.state.items() if name.startswith("fast.")}


def test_a_prompt_is_read_without_learning(session: Session) -> None:
    document, prompt = ids(0, 20), ids(1, 12)
    session.feed(document)
    learned, position = weights(session), session.state["position"]
    logits = session.feed(prompt, np.zeros(12))
    for name, now in weights(session).items():
        np.testing.assert_array_equal(now, learned[name], name)
        assert np.abs(now).max() > 0, name
    assert session.state["position"] == position + 12, "it was read, and attention sees it"
    following = session.feed([3], [0.0])

    other = session.another()
    other.feed(document)
    taught = other.feed(prompt)
    # The first logits hardly depend on learning from the prompt, the later ones do.
    assert np.abs(taught[0, 4:] - logits[0, 4:]).max() > LEARNED
    assert np.abs(other.feed([3], [0.0]) - following).max() > LEARNED


def test_a_conversation_learns_only_from_the_users_document(session: Session) -> None:
    system, document, question = ids(2, 9), ids(3, 24), ids(4, 7)
    parts = np.concatenate([system, document, question])
    mask = np.concatenate([np.zeros(9), np.ones(24), np.zeros(7)])
    # One call with a mask and one call per part give the same result.
    together = session.feed(parts, mask)
    in_parts = session.another()
    logits = [
        in_parts.feed(tokens, np.full(len(tokens), weight))
        for tokens, weight in ((system, 0.0), (document, 1.0), (question, 0.0))
    ]
    assert_close("runtime.float32", np.concatenate(logits, 1), together)
    for name, learned in weights(session).items():
        assert_close("runtime.float32", weights(in_parts)[name], learned, name)

    # Reading the part that the mask leaves out changes no weights at all.
    silent = session.another()
    silent.feed(system, np.zeros(9))
    assert all(not a.any() for a in weights(silent).values())
    all_of_it = session.another()
    everything = all_of_it.feed(parts)
    assert np.abs(everything[0, 12:] - together[0, 12:]).max() > LEARNED


def test_the_weight_of_a_token_scales_learning_to_predict_it(session: Session) -> None:
    tokens = ids(5, 10)
    mask = np.zeros(10)
    mask[6] = 1
    logits = session.feed(tokens, mask)
    off = session.another().feed(tokens, np.zeros(10))
    # Token 6 is the label of position 5, so the model learns from it on reading token 6.
    assert_close("runtime.float32", logits[:, :6], off[:, :6])
    assert np.abs(logits[0, 6] - off[0, 6]).max() > LEARNED / 10


def test_a_reset_concerns_one_row_only(tiny_bundle: Path, runtime: str) -> None:
    session = open_session(tiny_bundle, runtime, batch=2)
    session.feed(np.stack([ids(6, 20), ids(7, 20)]))
    kept = {name: a[0].copy() for name, a in session.state.items()}
    session.reset([1])
    for name, now in session.state.items():
        np.testing.assert_array_equal(now[0], kept[name], name)
        assert not now[1].any(), name
    again = session.feed(np.stack([ids(8, 5), ids(8, 5)]))
    fresh = open_session(tiny_bundle, runtime).feed(ids(8, 5))
    assert_close("runtime.float32", again[1], fresh[0])
    assert np.abs(again[0] - fresh[0]).max() > LEARNED


def test_a_learned_document_is_kept_while_conversations_come_and_go(session: Session) -> None:
    session.feed(ids(9, 24))
    document = session.state
    first = session.feed(ids(10, 8))
    session.feed(ids(11, 15))
    session.state = document  # forget the conversation, but not the document
    assert_close("runtime.float32", session.feed(ids(10, 8)), first)


def test_step_sizes_are_scaled_at_run_time(tiny_bundle: Path, runtime: str) -> None:
    session = open_session(tiny_bundle, runtime, batch=3)
    session.learning_rate_scale = [0.0, 0.5, 1.0]
    tokens = np.tile(ids(12, 2), (3, 1))
    session.feed(tokens)
    state = session.state
    for name, learned in weights(session).items():
        assert not state[name][0].any(), "with a scale of 0 nothing is learned"
        # There was one gradient, at the slow weights, so the update is proportional to the scale.
        assert_close("runtime.float32", learned[1], 0.5 * learned[2], name)
        assert np.abs(learned[2]).max() > 0, name
    session.learning_rate_scale = 0.0
    before = weights(session)["fast.up.kernel"]
    session.feed(np.tile(ids(13, 6), (3, 1)))
    after = weights(session)["fast.up.kernel"]
    # A row that learns nothing still forgets: by exp(-6/30) over six tokens with a horizon of 30.
    assert_close("runtime.float32", after, before * np.exp(-6 / 30).astype(np.float32))


def test_scale_and_weight_together(session: Session, tiny_bundle: Path, runtime: str) -> None:
    tokens, weighted = ids(14, 2), open_session(tiny_bundle, runtime)
    session.learning_rate_scale = 0.25
    session.feed(tokens)
    weighted.feed(tokens, np.full(2, 0.25))
    # A fresh state has nothing to forget, so scale and weight have the same effect on one gradient.
    for name, learned in weights(session).items():
        assert_close("runtime.float32", learned, weights(weighted)[name], name)
