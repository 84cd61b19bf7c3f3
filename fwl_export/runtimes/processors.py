"""Logits processors: what changes a model's logits before a token is drawn from them.

A processor is any callable `(ids, logits) -> logits`: it takes the token ids of the text so far,
[N] int64, and the logits, [V] float64, and returns a changed copy of the logits. A logit of -inf
means "never". Definitions and order are those of transformers' `LogitsProcessorList`.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fwl_export.bundle.state import Array
from fwl_export.errors import ConfigError, ShapeError, TokenError
from fwl_export.runtimes.arguments import checked_list, shown, whole_number

Logits = npt.NDArray[np.float64]
Processor = Callable[[Array, Logits], Any]


@dataclass(frozen=True)
class Temperature:
    """Divides the logits; less than 1 makes likely tokens even more likely.

    They are shifted first so that the largest is 0, which changes no probability and cannot
    overflow.

    Attributes:
      temperature: Divisor of the logits, more than 0.
    """

    temperature: float

    def __post_init__(self) -> None:
        check_number("temperature", self.temperature, above=0)

    def __call__(self, ids: Array, logits: Logits) -> Logits:
        """Return the changed logits, [V]."""
        with np.errstate(over="ignore"):  # near 0 it overflows to -inf: a probability of 0
            return (logits - logits.max()) / self.temperature


@dataclass(frozen=True)
class TopK:
    """Keeps the k most likely tokens, and all that are as likely as the last of them.

    Attributes:
      k: Number of tokens to keep, 1 or more.
    """

    k: int

    def __post_init__(self) -> None:
        check_whole("top_k", self.k, 1)

    def __call__(self, ids: Array, logits: Logits) -> Logits:
        """Return the changed logits, [V]."""
        if self.k >= len(logits):
            return logits
        least = np.partition(logits, len(logits) - self.k)[len(logits) - self.k]
        return np.where(logits < least, -np.inf, logits)


@dataclass(frozen=True)
class TopP:
    """Keeps the fewest most likely tokens whose probabilities add up to p or more.

    Of tokens that are equally likely, those with the lowest ids stay.

    Attributes:
      p: Share of the probability to keep, above 0 and at most 1.
    """

    p: float

    def __post_init__(self) -> None:
        check_number("top_p", self.p, above=0, most=1)

    def __call__(self, ids: Array, logits: Logits) -> Logits:
        """Return the changed logits, [V]."""
        order = np.argsort(-logits, kind="stable")[::-1]  # the least likely first
        below = np.cumsum(softmax(logits[order])) <= 1 - self.p
        below[-1] = False
        result = logits.copy()
        result[order[below]] = -np.inf
        return result


@dataclass(frozen=True)
class MinP:
    """Keeps tokens that are at least p times as likely as the most likely token.

    Attributes:
      p: Smallest ratio of the two probabilities, 0 to 1.
    """

    p: float

    def __post_init__(self) -> None:
        check_number("min_p", self.p, least=0, most=1)

    def __call__(self, ids: Array, logits: Logits) -> Logits:
        """Return the changed logits, [V]."""
        probabilities = softmax(logits)
        return np.where(probabilities < self.p * probabilities.max(), -np.inf, logits)


@dataclass(frozen=True)
class RepetitionPenalty:
    """Makes tokens that occur in the text so far, prompt included, less likely.

    Their logits are divided by the penalty where they are positive, and multiplied where negative.

    Attributes:
      penalty: Strength of the penalty, more than 0; 1 changes nothing, less rewards repetition.
    """

    penalty: float

    def __post_init__(self) -> None:
        check_number("repetition_penalty", self.penalty, above=0)

    def __call__(self, ids: Array, logits: Logits) -> Logits:
        """Return the changed logits, [V]."""
        seen = np.unique(ids)
        result = logits.copy()
        values = logits[seen]
        result[seen] = np.where(values < 0, values * self.penalty, values / self.penalty)
        return result


@dataclass(frozen=True)
class OccurrencePenalty:
    """Lowers the logits of generated tokens, as OpenAI's presence and frequency penalties do.

    Attributes:
      presence: Amount subtracted once from every token that was generated; negative rewards.
      frequency: Amount subtracted for each time that a token was generated; negative rewards.
      prompt_length: Number of ids at the beginning that do not count.
    """

    presence: float = 0.0
    frequency: float = 0.0
    prompt_length: int = 0

    def __post_init__(self) -> None:
        check_number("presence_penalty", self.presence)
        check_number("frequency_penalty", self.frequency)
        check_whole("prompt_length", self.prompt_length, 0)

    def __call__(self, ids: Array, logits: Logits) -> Logits:
        """Return the changed logits, [V]."""
        seen, counts = np.unique(ids[self.prompt_length :], return_counts=True)
        result = logits.copy()
        result[seen] -= self.presence + self.frequency * counts
        return result


class LogitBias:
    """Adds a number to the logits of some tokens.

    Attributes:
      bias: Amount to add, by token id; -inf forbids the token.
    """

    def __init__(self, bias: Mapping[int, Any]) -> None:
        if not isinstance(bias, Mapping):
            raise ConfigError(f"logit_bias is {shown(bias)}; expected a mapping by token id")
        self.bias = {_checked_id("logit_bias", token): value for token, value in bias.items()}
        for token, value in self.bias.items():
            if not (isinstance(value, numbers.Real) and value < math.inf):
                raise ConfigError(
                    f"logit_bias of token id {token} is {shown(value)}; expected a number, or -inf "
                    "to forbid it"
                )
        self._ids = np.array(list(self.bias), np.int64)
        self._values = np.array(list(self.bias.values()), np.float64)

    def __call__(self, ids: Array, logits: Logits) -> Logits:
        """Return the changed logits, [V]."""
        _check_ids("logit_bias", self._ids, logits)
        result = logits.copy()
        result[self._ids] += self._values
        return result


class Forbidden:
    """Lets some tokens never be drawn.

    Attributes:
      ids: Token ids to forbid, in ascending order.
    """

    def __init__(self, ids: Iterable[int]) -> None:
        given = [_checked_id("forbidden", token) for token in checked_list("forbidden", ids)]
        self.ids = np.unique(np.array(given, np.int64))

    def __call__(self, ids: Array, logits: Logits) -> Logits:
        """Return the changed logits, [V]."""
        _check_ids("forbidden", self.ids, logits)
        result = logits.copy()
        result[self.ids] = -np.inf
        return result


class MinNewTokens:
    """Forbids the tokens that end a text until it has a number of new tokens.

    Attributes:
      prompt_length: Number of ids at the beginning that are not new.
      count: Number of new tokens before which the text does not end.
      end_ids: Token ids that end a text.
    """

    def __init__(self, prompt_length: int, count: int, end_ids: Sequence[int]) -> None:
        check_whole("prompt_length", prompt_length, 0)
        check_whole("min_tokens", count, 0)
        self.prompt_length, self.count = prompt_length, count
        self.end_ids = end_ids
        self._forbid = Forbidden(end_ids)

    def __call__(self, ids: Array, logits: Logits) -> Logits:
        """Return the changed logits, [V]."""
        new = len(ids) - self.prompt_length
        return self._forbid(ids, logits) if new < self.count else logits


def run_processors(processors: Iterable[Processor], ids: Array, logits: Array) -> Logits:
    """Return logits after some processors, one after another.

    Args:
      processors: The processors, in order.
      ids: [N] int64 token ids of the text so far.
      logits: [V] floats, finite.

    Returns:
      [V] float64; -inf for tokens that must not be drawn.

    Raises:
      ShapeError: A processor returned something else than V numbers.
      TokenError: A processor returned NaN or +inf, or forbade all tokens.
    """
    wide = logits.astype(np.float64)
    for processor in processors:
        wide = _checked_result(processor, processor(ids, wide), len(logits))
    return wide


def _checked_result(processor: Processor, result: Any, size: int) -> Logits:
    name = getattr(processor, "__name__", type(processor).__name__)
    try:
        values = np.asarray(result, np.float64)
    except (TypeError, ValueError):
        values = np.empty(())
    if values.shape != (size,):
        raise ShapeError(
            f"the logits processor {name} returned {shown(result)}; expected an array of "
            f"{size} logits"
        )
    if not values.max() < np.inf:  # NaN, or +inf
        raise TokenError(
            f"the logits processor {name} returned NaN or +inf; expected finite logits, or -inf "
            "for tokens that must not be drawn"
        )
    if values.max() == -np.inf:
        raise TokenError(
            f"no token is left to draw after the logits processor {name}; forbid fewer tokens"
        )
    return values


def softmax(logits: Logits) -> Logits:
    """Return probabilities, [V] float64."""
    with np.errstate(under="ignore"):
        weights = np.exp(logits - logits.max())
    result: Logits = weights / weights.sum()
    return result


def check_number(
    name: str,
    value: object,
    above: float = -math.inf,
    least: float = -math.inf,
    most: float = math.inf,
) -> None:
    """Check a finite number.

    Args:
      name: Name of the argument in the message.
      value: What the caller gave.
      above: Limit that it must exceed.
      least: Smallest value that is allowed.
      most: Largest value that is allowed.

    Raises:
      ConfigError: It is not a finite number, or out of range.
    """
    number = float(value) if isinstance(value, numbers.Real) else math.nan
    inside = above < number and least <= number <= most
    if isinstance(value, bool) or not (inside and math.isfinite(number)):
        limits = [f"more than {above:g}"] if above > -math.inf else []
        limits += [f"{least:g} or more"] if least > -math.inf else []
        limits += [f"{most:g} at most"] if most < math.inf else []
        raise ConfigError(
            f"{name} is {shown(value)}; expected {' and '.join(limits) or 'a number'}"
        )


def check_whole(name: str, value: object, least: int) -> None:
    """Check a whole number that is not below `least`.

    Args:
      name: Name of the argument in the message.
      value: What the caller gave.
      least: Smallest value that is allowed.

    Raises:
      ConfigError: It is not a whole number, or too small.
    """
    number = whole_number(value)
    if number is None or number < least:
        raise ConfigError(f"{name} is {shown(value)}; expected a whole number of {least} or more")


def _checked_id(name: str, token: object) -> int:
    number = whole_number(token)
    if number is None or number < 0:
        raise TokenError(f"{name} names {shown(token)}; expected token ids, 0 or more")
    return number


def _check_ids(name: str, ids: Array, logits: Logits) -> None:
    if len(ids) and ids.max() >= len(logits):
        raise TokenError(
            f"{name} names token id {ids.max()}, which is out of range; expected 0 to "
            f"{len(logits) - 1}"
        )
