"""One text that a model writes: which token comes next, what of it is shown, and where it ends."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypedDict

import numpy as np

from fwl_export.bundle.state import Array
from fwl_export.bundle.text_tokenizer import TextTokenizer
from fwl_export.errors import ConfigError, TokenError
from fwl_export.runtimes.arguments import check_types, shown, whole_number
from fwl_export.runtimes.processors import Forbidden, MinNewTokens, check_whole
from fwl_export.runtimes.sampling import Choice, Sampler, log_softmax

FinishReason = Literal["stop", "end", "length"]

DEFAULT_MAX_TOKENS = 256


class TextOptions(TypedDict, total=False):
    """How a text is written; keywords of the methods of `TextSession` that write.

    Attributes:
      stop: Text or texts that end the answer; they are not part of it, not even partly.
      max_tokens: Most tokens to write, 1 or more; 256 by default.
      min_tokens: Tokens to write before an end token may be drawn; 0 by default.
      sampler: Chooses each token: a `Sampler`, or any callable from logits [V] to a token id. None
        takes the most likely token (greedy).
      learn: Whether the session learns from the prompt and from its own text; True by default.
      logprobs: Number of likely tokens whose log probabilities are kept for each token, beside that
        of the token itself. They are the model's own, before any logits processor. None keeps none.
      special: Whether control tokens in the prompt, such as "</s>", are read as control tokens
        instead of as plain text; False by default.
      ignore_end: Whether to go on after a token that ends a text; False by default.
    """

    stop: str | Sequence[str]
    max_tokens: int
    min_tokens: int
    sampler: Callable[[Array], int] | None
    learn: bool
    logprobs: int | None
    special: bool
    ignore_end: bool


@dataclass(frozen=True)
class LikelyToken:
    """How likely a token was at some place.

    Attributes:
      token: Id of the token.
      text: The token as the tokenizer writes it on its own; control tokens are named here.
      logprob: Natural logarithm of its probability by the model.
    """

    token: int
    text: str
    logprob: float


@dataclass(frozen=True)
class TokenLogprob(LikelyToken):
    """How likely the token was that was drawn, and which would have been more likely.

    Attributes:
      top: The most likely tokens at this place, the most likely first.
    """

    top: tuple[LikelyToken, ...] = ()


@dataclass(frozen=True)
class Generation:
    """A text that a model wrote.

    All values are plain, so `json.dumps(dataclasses.asdict(generation))` works.

    Attributes:
      text: The text, without the prompt, the stop string and control tokens.
      tokens: Ids of all tokens that were drawn, those of a stop string or an end token included.
      finish_reason: "stop", a stop string came; "end", an end token came; "length", `max_tokens` or
        the longest text that the model can read was reached; None, the stream was left before.
      prompt_tokens: Number of tokens that were read before the first was drawn.
      logprobs: How likely each of `tokens` was; None if that was not asked for.
    """

    text: str
    tokens: list[int]
    finish_reason: FinishReason | None
    prompt_tokens: int
    logprobs: list[TokenLogprob] | None = None


@dataclass(frozen=True)
class Settings:
    """Checked options; see `TextOptions` for the attributes."""

    stop: str | Sequence[str] = ()
    max_tokens: int = DEFAULT_MAX_TOKENS
    min_tokens: int = 0
    sampler: Callable[[Array], int] | None = None
    learn: bool = True
    logprobs: int | None = None
    special: bool = False
    ignore_end: bool = False

    def __post_init__(self) -> None:
        check_types(sampler=self.sampler, learn=self.learn)
        check_whole("max_tokens", self.max_tokens, 1)
        check_whole("min_tokens", self.min_tokens, 0)
        if self.logprobs is not None:
            check_whole("logprobs", self.logprobs, 0)
        for name in ("special", "ignore_end"):
            if not isinstance(getattr(self, name), (bool, np.bool_)):
                value = shown(getattr(self, name))
                raise ConfigError(f"{name} is {value}; expected True or False")
        _ = self.stops

    @property
    def stops(self) -> list[str]:
        """The stop strings.

        Raises:
          ConfigError: They are not texts, or one is empty.
        """
        given: Any = [self.stop] if isinstance(self.stop, str) else self.stop
        stops = list(given) if isinstance(given, Collection) else [given]
        if not all(isinstance(stop, str) and stop for stop in stops):
            raise ConfigError(f"stop is {shown(self.stop)}; expected texts that are not empty")
        return stops


@dataclass
class StopStrings:
    """Finds stop strings in text that comes in pieces, and shows nothing of them.

    Attributes:
      stops: The strings that end the text.
      found: Whether one has come.
    """

    stops: Sequence[str]
    found: bool = False
    _held: str = field(default="", repr=False)

    def add(self, piece: str) -> str:
        """Return what can be shown now: all but the beginning of what may become a stop string."""
        self._held += piece
        places = [place for stop in self.stops if (place := self._held.find(stop)) >= 0]
        if places:
            self.found = True
            text, self._held = self._held[: min(places)], ""
            return text
        kept = max((self._overlap(stop) for stop in self.stops), default=0)
        cut = len(self._held) - kept
        text, self._held = self._held[:cut], self._held[cut:]
        return text

    def _overlap(self, stop: str) -> int:
        """Return how many characters at the end of the text could begin this stop string."""
        sizes = range(min(len(stop) - 1, len(self._held)), 0, -1)
        return next((size for size in sizes if self._held.endswith(stop[:size])), 0)

    def finish(self) -> str:
        """Return the rest, which became no stop string."""
        rest, self._held = self._held, ""
        return rest


class Writer:
    """One text while it is written.

    Attributes:
      tokens: Token ids so far.
      logprobs: How likely each was, if that was asked for.
      finish_reason: Why the text ended; None while it goes on.
      prompt_tokens: Number of tokens that were read before the first was drawn.
    """

    def __init__(
        self,
        settings: Settings,
        tokenizer: TextTokenizer,
        prompt: Array,
        room: int | None,
        before: Array,
    ) -> None:
        """Begin a text.

        Args:
          settings: How to write it.
          tokenizer: Tokenizer of the model.
          prompt: [N] token ids that it continues.
          room: Most tokens that the model can still read, prompt included; None means any number.
          before: [M] token ids that the text continues, older ones included, for the decoder.
        """
        self.tokens: list[int] = []
        self.logprobs: list[TokenLogprob] | None = None if settings.logprobs is None else []
        self.finish_reason: FinishReason | None = None
        self.prompt_tokens = len(prompt)
        most = settings.max_tokens if room is None else room - len(prompt) + 1
        self.max_tokens = max(1, min(settings.max_tokens, most))  # the last need not be read
        self.end_ids = frozenset() if settings.ignore_end else tokenizer.end_ids
        self._settings, self._tokenizer = settings, tokenizer
        self._stops = StopStrings(settings.stops)
        self._decoder = tokenizer.decoder(before=before)
        self._pieces: list[str] = []
        # Whatever other processors and samplers do, these hold.
        self._limits = (
            Forbidden(tokenizer.unused_ids),
            MinNewTokens(len(prompt), settings.min_tokens, sorted(tokenizer.end_ids)),
        )
        sampler = Sampler() if settings.sampler is None else settings.sampler
        if isinstance(sampler, Sampler):
            sampler = sampler.with_processors(*self._needed_limits())
        self._choice = Choice(sampler, prompt)

    def _needed_limits(self) -> list[Any]:
        never, ends = self._limits
        return [*([never] if never.ids.size else []), *([ends] if ends.count else [])]

    @property
    def text(self) -> str:
        """The text so far, without what may become a stop string."""
        if len(self._pieces) > 1:
            self._pieces = ["".join(self._pieces)]
        return self._pieces[0] if self._pieces else ""

    def draw(self, logits: Array) -> int:
        """Return the id of the next token.

        Args:
          logits: [V] floats, finite.

        Raises:
          TokenError: The sampler returned something else than a token id.
        """
        given = logits
        if not isinstance(self._choice.sampler, Sampler):
            ids = np.zeros(self.prompt_tokens + len(self.tokens), np.int64)
            for limit in self._needed_limits():
                given = limit(ids, given)
        token = whole_number(self._choice(given))
        if token is None or not 0 <= token < len(logits):
            raise TokenError(
                f"the sampler returned {token}; expected a token id, 0 to {len(logits) - 1}"
            )
        if self.logprobs is not None:
            self.logprobs.append(self._logprob(log_softmax(logits), token))
        return token

    def _logprob(self, values: Array, token: int) -> TokenLogprob:
        likely = _most_likely(values, self._settings.logprobs or 0)
        top = tuple(LikelyToken(each, self._name(each), float(values[each])) for each in likely)
        return TokenLogprob(token, self._name(token), float(values[token]), top)

    def _name(self, token: int) -> str:
        text = self._tokenizer.decode([token])
        return text or self._tokenizer.tokenizer.id_to_token(token) or ""

    def add(self, token: int) -> str:
        """Take the next token, and return what of the text can be shown now.

        Args:
          token: Id of the token, as `draw` returned it.
        """
        self.tokens.append(token)
        if token in self.end_ids:
            self.finish_reason = "end"
            piece = self._stops.add(self._decoder.finish())
        else:
            piece = self._stops.add(self._decoder.add(token))
            if not self._stops.found and len(self.tokens) == self.max_tokens:
                self.finish_reason = "length"
                piece += self._stops.add(self._decoder.finish())
        if self._stops.found:
            self.finish_reason = "stop"
        elif self.finish_reason is not None:
            piece += self._stops.finish()
        if piece:
            self._pieces.append(piece)
        return piece

    def generation(self) -> Generation:
        """Return the text as it is now, with all that is known about it."""
        logprobs = None if self.logprobs is None else list(self.logprobs)
        return Generation(
            self.text, list(self.tokens), self.finish_reason, self.prompt_tokens, logprobs
        )


def _most_likely(values: Array, count: int) -> list[int]:
    """Return the ids of the largest values, the largest first, the lowest ids among equals."""
    if not count:
        return []
    least = np.partition(values, -count)[-count] if count < len(values) else -np.inf
    found = np.flatnonzero(values >= least)  # sorting these alone is far faster than sorting all
    order: list[int] = found[np.argsort(-values[found], kind="stable")][:count].tolist()
    return order
