"""Scores and losses of texts, and the tokenizer of a bundle."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from fwl_export.bundle.manifest import Bundle
from fwl_export.bundle.state import Array
from fwl_export.bundle.text_tokenizer import bundle_text_tokenizer
from fwl_export.errors import TokenError
from fwl_export.runtimes.sampling import log_softmax
from fwl_export.runtimes.session import Session


@dataclass(frozen=True)
class Score:
    """How well a model predicted a text.

    Attributes:
      tokens: Number of predicted tokens: all of the text but the first.
      loss: Mean negative log probability per predicted token, in nats.
      seconds: Wall-clock time spent in the session.
    """

    tokens: int
    loss: float
    seconds: float

    @property
    def perplexity(self) -> float:
        """Perplexity per token, exp(loss); infinite where float64 cannot hold it."""
        try:
            return math.exp(self.loss)
        except OverflowError:
            return math.inf

    @property
    def tokens_per_second(self) -> float:
        """Tokens read per second; infinite if the clock has not moved meanwhile."""
        return self.tokens / self.seconds if self.seconds > 0 else math.inf


def bundle_tokenizer(bundle: Bundle) -> Tokenizer:
    """Return the bundle's tokenizer; `bundle_text_tokenizer` returns all that reading text needs.

    Raises:
      BundleError: The tokenizer's file is missing or was changed.
      CheckpointError: The file is not a tokenizer, or does not fit the model's vocabulary.
    """
    return bundle_text_tokenizer(bundle).tokenizer


def score_ids(
    session: Session,
    ids: Array,
    label_weight: float = 1.0,
    advance: Callable[[int], None] = lambda tokens: None,
) -> Score:
    """Read a text and score the prediction of each token but the first.

    Args:
      session: Session of one row, which continues from its state.
      ids: [N] int64 token ids of the text, N of 2 or more. The last is predicted, not read.
      label_weight: How much to learn from each token; 0 turns adaptation off.
      advance: Called with the number of tokens just read, for a progress bar.

    Raises:
      TokenError: The text has fewer than 2 tokens or is too long for the model (raised before
        anything is read), a token id is out of range, or the model's output is not finite.
    """
    if len(ids) < 2:
        raise TokenError(
            f"the text has {len(ids)} tokens; expected 2 or more: all but the first are scored"
        )
    room = session.max_positions - session.positions[0]
    if session.max_positions and len(ids) - 1 > room:
        fewer = f"score fewer (`--tokens {room + 1}`)" if room > 0 else "begin with a fresh state"
        raise TokenError(
            f"the text has {len(ids)} tokens, but this model can read at most {room} more; {fewer}"
        )
    total, seconds = 0.0, 0.0
    inputs, labels = ids[:-1], ids[1:]
    for start in range(0, len(inputs), session.max_tokens):
        part = slice(start, start + session.max_tokens)
        began = time.perf_counter()
        logits = session.feed(inputs[part], np.full(len(inputs[part]), label_weight))
        seconds += time.perf_counter() - began
        total += float(token_losses(logits[0], labels[part]).sum())
        advance(len(inputs[part]))
    return Score(len(labels), total / len(labels), seconds)


def token_losses(logits: Array, labels: Array) -> npt.NDArray[np.float64]:
    """Return the loss of each prediction in nats, -log softmax(logits)[label].

    Args:
      logits: [T, V] floats.
      labels: [T] token ids that were to be predicted.

    Returns:
      [T] float64.
    """
    losses: npt.NDArray[np.float64] = -log_softmax(logits)[np.arange(len(labels)), labels]
    return losses
