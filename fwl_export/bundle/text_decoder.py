"""From token ids to text, as they come: only what is complete, and in linear time."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

_REPLACEMENT = "\ufffd"
# Tokens of the text before that decide how the next token is written, such as with a space or not.
CONTEXT = 16
# A character has at most 4 bytes, so more tokens than these hold no unfinished one.
_LONGEST_WAIT = 8
# What cleaning joins to the word behind it, as in "do n ' t".
_JOINED = (" '", " n")


class TextDecoder:
    """Turns tokens into text one by one.

        decoder = tokenizer.decoder(before=prompt_ids)
        for token in session.generate(prompt_ids, 100):
            print(decoder.add(token), end="", flush=True)
        print(decoder.finish())

    The pieces joined are the text of all tokens, without the text of the tokens before them.
    Control tokens have no text.
    """

    def __init__(
        self, tokenizer: Tokenizer, before: Sequence[int] = (), clean_up_spaces: bool = False
    ) -> None:
        """Begin a text.

        Args:
          tokenizer: The tokenizer.
          before: Token ids that the text continues, such as a prompt; the last few count.
          clean_up_spaces: Whether spaces before punctuation are removed, see `clean`. Words then
            come a few tokens later.
        """
        self._clean = clean_up_spaces
        self._unclean = ""
        self._tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder()
        self._hidden = {token for token, entry in added.items() if entry.special}
        self._pending: list[int] = []
        last = [int(token) for token in before[-CONTEXT:] if int(token) not in self._hidden]
        done = len(last)
        while done and len(last) - done < 4 and self._text(last[:done]).endswith(_REPLACEMENT):
            done -= 1  # these tokens end inside a character, which those that follow complete
        self._restart(last[:done])
        for token in last[done:]:
            self._next(token)

    def _text(self, tokens: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(list(tokens))
        return text

    def _restart(self, context: list[int]) -> None:
        """Forget what was decoded, except that it ended with these tokens."""
        self._context = context
        self._stream = DecodeStream(ids=context, skip_special_tokens=True)

    def add(self, token: int) -> str:
        """Return what became complete with the next token; "" if nothing did.

        Args:
          token: Id of the token; control tokens, and ids that are no token, have no text.
        """
        text = self._next(token)
        return self._cleaned(text) if self._clean else text

    def _cleaned(self, text: str) -> str:
        """Return what can be cleaned now: all but the last word, and what it may be joined to."""
        self._unclean += text
        end = self._unclean.rfind(" ")
        while end > 0 and self._unclean.endswith(_JOINED, 0, end):
            end = self._unclean.rfind(" ", 0, end)
        end = max(end, 0)
        done, self._unclean = self._unclean[:end], self._unclean[end:]
        return clean(done)

    def _next(self, token: int) -> str:
        if token in self._hidden or self._tokenizer.id_to_token(token) is None:
            return ""
        self._pending.append(token)
        try:
            text: str | None = self._stream.step(self._tokenizer, token)
        except Exception:  # what was shown is not how the text begins any more: see `finish`
            return self._flush()
        if text is None:
            return self._flush() if len(self._pending) > _LONGEST_WAIT else ""
        self._context = (self._context + self._pending)[-CONTEXT:]
        self._pending = []
        return text

    def finish(self) -> str:
        """Return the rest of the text; an unfinished character is shown as U+FFFD."""
        rest = self._unclean + self._flush()
        rest, self._unclean = clean(rest) if self._clean else rest, ""
        return rest.rstrip(_REPLACEMENT) + _REPLACEMENT if rest.endswith(_REPLACEMENT) else rest

    def _flush(self) -> str:
        """Return the text of the tokens that wait, complete or not."""
        if not self._pending:
            return ""
        before, both = self._text(self._context), self._text(self._context + self._pending)
        text = both[len(before) :] if both.startswith(before) else self._text(self._pending)
        self._restart((self._context + self._pending)[-CONTEXT:])
        self._pending = []
        return text


def clean(text: str) -> str:
    """Return a text without spaces before punctuation and shortened words.

    The replacements are those of transformers, `clean_up_tokenization`, in its order.

    Args:
      text: The text.
    """
    for word in (" .", " ?", " !", " ,"):
        text = text.replace(word, word[1:])
    text = text.replace(" ' ", "'")
    for word in (" n't", " 'm", " 's", " 've", " 're"):
        text = text.replace(word, word[1:])
    return text
