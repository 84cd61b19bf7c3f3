"""The choice of the next token from logits."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from fwl_export.bundle.state import Array
from fwl_export.errors import ConfigError
from fwl_export.runtimes.arguments import checked_list, shown
from fwl_export.runtimes.processors import (
    Forbidden,
    LogitBias,
    MinP,
    OccurrencePenalty,
    Processor,
    RepetitionPenalty,
    Temperature,
    TopK,
    TopP,
    check_number,
    check_whole,
    run_processors,
)


class Sampler:
    """Chooses a token from logits: greedy, or at random with temperature, top-k, top-p and more.

        sampler = Sampler(temperature=0.8, top_p=0.95, seed=7)
        token = sampler(session.feed(prompt, last_only=True)[0])

    The logits pass, in this order and as transformers defines them: `logit_bias`,
    `repetition_penalty`, the presence and frequency penalties, `forbidden`, `processors`, and,
    unless the temperature is 0, `temperature`, `top_k`, `top_p` and `min_p`; then one of the tokens
    that are left is drawn. The same settings, seed and logits give the same tokens. Each draw
    advances the random generator, so give each text a sampler of its own. Not for use by several
    threads at once.

    Attributes:
      seed: Seed of the random generator.
      greedy: Whether the most likely token is taken always, without chance.
    """

    def __init__(
        self,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        *,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        logit_bias: Mapping[int, float] | None = None,
        forbidden: Iterable[int] = (),
        processors: Sequence[Processor] = (),
    ) -> None:
        """Make a sampler; the default is greedy.

        Args:
          temperature: 0 takes the most likely token, the lowest id among equals. 1 samples from
            the model's own probabilities; less makes likely tokens even more likely.
          top_k: Sample from the k most likely tokens, and those as likely as the last of them; 0
            means all.
          top_p: Sample from the most likely tokens that hold this share of the probability; more
            than 0, and 1 means all.
          seed: Seed of the random generator, 0 or more.
          min_p: Sample from tokens at least this many times as likely as the most likely; 0 to 1,
            and 0 means all.
          repetition_penalty: Divisor of the positive logits of tokens that occur in the prompt or
            in what was generated, and factor of their negative ones; 1 means none.
          presence_penalty: Amount taken off the logits of tokens that were generated before.
          frequency_penalty: Amount taken off them for each time that they were generated.
          logit_bias: Amount to add to the logits of tokens, by token id; -inf forbids them.
          forbidden: Token ids that are never drawn.
          processors: More callables `(ids, logits) -> logits`; see the module
            `fwl_export.runtimes.processors`.

        Raises:
          ConfigError: A value is out of range.
          TokenError: A token id is not a whole number of 0 or more.
        """
        check_number("temperature", temperature, least=0)
        check_whole("top_k", top_k, 0)
        if seed < 0:
            raise ConfigError(f"seed is {seed}; expected 0 or more")
        for processor in checked_list("processors", processors):
            if not callable(processor):
                raise ConfigError(
                    f"processors has {shown(processor)}; expected callables (ids, logits) -> logits"
                )
        # One that changes nothing is made all the same, since it checks its number.
        drawing = [
            *_kept(TopK(top_k or 1), top_k > 0),
            *_kept(TopP(top_p), top_p < 1),
            *_kept(MinP(min_p), min_p > 0),
        ]
        self.seed = seed
        self.greedy = temperature == 0
        self._before: list[Processor] = [
            *_kept(LogitBias({} if logit_bias is None else logit_bias), bool(logit_bias)),
            *_kept(RepetitionPenalty(repetition_penalty), repetition_penalty != 1),
        ]
        self._occurrence = OccurrencePenalty(presence_penalty, frequency_penalty)
        never = Forbidden(forbidden)
        self._after: list[Processor] = [*_kept(never, never.ids.size > 0), *processors]
        self._drawing: list[Processor] = [] if self.greedy else [Temperature(temperature), *drawing]
        self._rng = np.random.default_rng(seed)

    def __call__(self, logits: npt.NDArray[Any], ids: npt.ArrayLike = (), prompt: int = 0) -> int:
        """Return the id of the chosen token.

        Args:
          logits: [V] floats, finite.
          ids: [N] token ids of the text so far, for penalties and processors.
          prompt: Number of ids that are the prompt; presence and frequency do not count them.

        Raises:
          TokenError: All tokens are forbidden, a token id is out of range, or a processor returned
            NaN.
          ShapeError: A processor returned something else than V logits.
        """
        processors = self._processors(prompt)
        if not processors:
            return int(logits.argmax())
        wide = run_processors(processors, np.asarray(ids, np.int64), logits)
        if self.greedy:
            return int(wide.argmax())
        left = np.flatnonzero(wide > -np.inf)
        weights = np.exp(wide[left] - wide.max())
        order = np.argsort(-weights, kind="stable")
        weights = weights[order]
        return int(self._rng.choice(left[order], p=weights / weights.sum()))

    def _processors(self, prompt: int) -> list[Processor]:
        counted = replace(self._occurrence, prompt_length=prompt)
        occurrence = _kept(counted, bool(counted.presence or counted.frequency))
        return self._before + occurrence + self._after + self._drawing

    def with_seed(self, seed: int) -> Sampler:
        """Return a sampler with the same settings, and a random generator that begins at a seed.

        Args:
          seed: Seed of its random generator, 0 or more.
        """
        check_whole("seed", seed, 0)
        other = copy.copy(self)
        other.seed, other._rng = seed, np.random.default_rng(seed)
        return other

    def with_processors(self, *processors: Processor) -> Sampler:
        """Return a sampler with more processors, right before the temperature.

        The two share one random generator: each draw advances both.

        Args:
          *processors: Callables `(ids, logits) -> logits`.
        """
        other = copy.copy(self)
        other._after = [*self._after, *processors]
        return other


class Choice:
    """A sampler that goes through one text: it remembers the ids so far, and takes logits alone.

    Attributes:
      sampler: Sampler that chooses the tokens, or any callable from logits to a token id.
    """

    def __init__(self, sampler: Callable[[Array], int], prompt: npt.ArrayLike) -> None:
        """Begin a text.

        Args:
          sampler: Chooses each token. Only a `Sampler` is told the ids so far.
          prompt: [N] token ids that the text begins with.
        """
        self.sampler = sampler
        self._prompt = prompt
        self._ids = np.zeros(0, np.int64)
        self._count = self._prompt_length = 0

    def __call__(self, logits: Array) -> int:
        """Return the id of the next token.

        Args:
          logits: [V] floats, finite.
        """
        if not isinstance(self.sampler, Sampler):
            return self.sampler(logits)
        if not self._count:  # only now, since the model has checked the prompt
            self._ids = np.asarray(self._prompt, np.int64).ravel()
            self._count = self._prompt_length = self._ids.size
        token = self.sampler(logits, self._ids[: self._count], self._prompt_length)
        if self._count == len(self._ids):
            self._ids = np.resize(self._ids, 2 * self._count + 16)
        self._ids[self._count] = token
        self._count += 1
        return token


def _kept(processor: Processor, wanted: bool) -> list[Processor]:
    return [processor] if wanted else []


def log_softmax(logits: Array) -> npt.NDArray[np.float64]:
    """Return log probabilities in nats, log softmax(logits): [..., V] -> [..., V] float64."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(-1, keepdims=True)
    result: npt.NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return result
