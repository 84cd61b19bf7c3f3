"""Text in and out of sessions: scores, losses, and the ids of a prompt."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from fwl_export.bundle.manifest import TOKENIZER_FILE, Bundle
from fwl_export.bundle.state import Array
from fwl_export.bundle.tokenizer import encode, load_tokenizer
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
        """Perplexity per token, exp(loss)."""
        return math.exp(self.loss)

    @property
    def tokens_per_second(self) -> float:
        """Tokens read per second."""
        return self.tokens / self.seconds


def bundle_tokenizer(bundle: Bundle) -> Tokenizer:
    """Return the bundle's tokenizer.

    Raises:
      BundleError: The tokenizer's file is missing or was changed.
      CheckpointError: The file is not a tokenizer, or does not fit the model's vocabulary.
    """
    config = bundle.manifest.config
    return load_tokenizer(
        bundle.folder / TOKENIZER_FILE,
        config.vocab_size,
        config.padded_vocabulary,
        bundle.read_file(TOKENIZER_FILE),
    )


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
      TokenError: The text is too long for the model (raised before anything is read), a token id
        is out of range, or the model's output is not finite.
    """
    room = session.max_positions - session.positions[0]
    if session.max_positions and len(ids) - 1 > room:
        raise TokenError(
            f"the text has {len(ids)} tokens, but this model can read at most {room} more; score "
            f"fewer (`--tokens {room + 1}`)"
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


def prompt_ids(prompt: str, tokenizer: Tokenizer) -> Array:
    """Return the token ids of a prompt, [N] int64.

    Raises:
      TokenError: The prompt has no tokens, or the tokenizer fails.
    """
    ids = encode(prompt, tokenizer)
    if not len(ids):
        raise TokenError("the prompt is empty; expected at least one token")
    return ids
