"""Text sessions: text in, text out, and no token ids in between."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, Unpack, overload

import numpy as np

from fwl_export.bundle.manifest import Bundle, read_bundle
from fwl_export.bundle.state import Array
from fwl_export.bundle.state_file import SavedState
from fwl_export.bundle.text_tokenizer import TextTokenizer, bundle_text_tokenizer
from fwl_export.errors import ConfigError, ShapeError, StateError, TokenError
from fwl_export.runtimes.arguments import check_types, checked_list, shown, whole_number
from fwl_export.runtimes.chat_template import ChatTemplate, Message, checked_messages
from fwl_export.runtimes.opening import open_session
from fwl_export.runtimes.sampling import Sampler
from fwl_export.runtimes.session import Session
from fwl_export.runtimes.text_writer import (
    FinishReason,
    Generation,
    Settings,
    TextOptions,
    Writer,
)

_Texts = list[str] | tuple[str, ...]

_CONTEXT = 16  # ids before a text that decide how it begins, such as with a space or not


class _Prompt(NamedTuple):
    """What is read before a text is written.

    Attributes:
      ids: Token ids, [N] int64.
      conversation: Messages that the text answers; empty outside of a chat.
      ends_answer: Whether the ids end the last answer themselves, so that an end token that the
        model wrote, and that was not read yet, is left out.
    """

    ids: Array
    conversation: list[dict[str, Any]]
    ends_answer: bool = False


def open_text_session(
    bundle: str | Path | Bundle, runtime: str = "onnxruntime", **options: Any
) -> TextSession:
    """Open a bundle to read and write text.

        text = open_text_session("demo-bundle")
        text.read("TO RESET THE DEVICE, HOLD THE BUTTON.")
        print(text.generate("TO RESET THE DEVICE,", stop=".", max_tokens=20).text)

    Args:
      bundle: Folder of the bundle, or what `read_bundle` returned.
      runtime: Runtime that runs the model, see `open_session`.
      **options: More arguments of `open_session`, except `batch`: a text session has one text.

    Raises:
      CheckpointError: The tokenizer does not fit the model.
      ConfigError: `batch` was given. For the other errors, see `open_session`.
    """
    if "batch" in options:
        raise ConfigError(
            "a text session has one row, so it takes no `batch`; give several prompts to "
            "`generate`, or open more text sessions"
        )
    check_types(bundle=bundle)
    opened = bundle if isinstance(bundle, Bundle) else read_bundle(Path(bundle))
    tokenizer = bundle_text_tokenizer(opened)
    return TextSession(open_session(opened, runtime, **options), tokenizer)


class TextSession:
    r"""One text that a model reads, continues, and learns from.

        text = open_text_session("demo-bundle")
        for piece in text.stream("LEONTES.", stop=["\n\n"], max_tokens=100):
            print(piece, end="", flush=True)

    This is a class beside `Session`, and not a part of it, because text needs a tokenizer, goes to
    one row, and leaves a last token that was shown but not read yet.

    The token that begins a text is read once, where the session is fresh; what comes after `read`,
    `load_state` or another call continues the text. What a call wrote counts as read: the session
    reads the last token, which may be an end token or complete a stop string, with the next call.
    A stream that is left (`break`, an error, a cancelled task) has read and written what it showed;
    the session can be used at once, and the stream itself cannot go on once it was.

    Threads may share a text session: its methods run one at a time, a stream step by step.

    Attributes:
      session: The session beneath, with one row: limits, `learned()`, `learning_rate_scale`. If it
        is moved behind the back of this object, the conversation, and the last token that was
        shown but not read, are forgotten.
      tokenizer: Tokenizer of the model.
    """

    def __init__(self, session: Session, tokenizer: TextTokenizer) -> None:
        """Put a tokenizer on a session; `open_text_session` opens both.

        Args:
          session: Session of one row, which continues from its state.
          tokenizer: Tokenizer of the session's model.

        Raises:
          ShapeError: The session has more than one row.
          ConfigError: The tokenizer is that of another vocabulary.
        """
        if session.batch != 1:
            raise ShapeError(
                f"a text session needs a session of one row; this one has {session.batch} rows"
            )
        if tokenizer.vocab_size != session.vocab_size:
            raise ConfigError(
                f"the tokenizer is for {tokenizer.vocab_size} token ids, but the session's model "
                f"has {session.vocab_size}; is it the tokenizer of another model?"
            )
        self.session = session
        self.tokenizer = tokenizer
        self._lock = threading.RLock()
        self._template: ChatTemplate | None = None
        self._stream: TextStream | None = None
        self._position = session.positions[0]
        self._unread: list[int] = []  # the last token that was written, or none
        self._unread_learn = True
        self._logits: Array | None = None  # [V] after what was read, if nothing was written since
        self._context: list[int] = []  # the last ids that were read, for the decoder
        self._messages: list[dict[str, Any]] = []

    def __repr__(self) -> str:
        return f"<TextSession at token {self._position + len(self._unread)}: {self.session!r}>"

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The conversation so far, as `chat` read and wrote it; empty before the first `chat`."""
        with self._lock:
            return [dict(message) for message in self._messages]

    def read(self, text: str, learn: bool = True, special: bool = False) -> int:
        """Read a text, and learn from it. Nothing is read on an error.

        Args:
          text: Text of any length.
          learn: Whether the session learns from it.
          special: Whether control tokens in the text are read as such instead of as plain text.

        Returns:
          Number of tokens that were read.

        Raises:
          TokenError: The text is longer than the model can read, or has a token that the model
            does not know; see `Session.feed` for other errors.
        """
        check_types(learn=learn)
        with self._lock:
            self._begin()
            ids = self._encode(text, special)
            if len(ids):
                self._messages = []
                self._feed(ids, learn)
            return len(ids)

    def flush(self) -> None:
        """Read the last token that was written, instead of with the next call."""
        with self._lock:
            self._begin()
            self._feed(np.zeros(0, np.int64), True)

    def stream(self, prompt: str = "", **options: Unpack[TextOptions]) -> TextStream:
        r"""Read a prompt, and write what follows piece by piece.

            stream = text.stream("LEONTES.", stop=["\n"], sampler=Sampler(0.8))
            for piece in stream:
                print(piece, end="", flush=True)
            print(stream.finish_reason)

        The prompt is read when the first piece is asked for. In asyncio, iterate with `async for`.

        Args:
          prompt: Text to continue; "" continues what was read or written before.
          **options: How to write, see `TextOptions`.

        Raises:
          ConfigError: An option is out of range, or has the wrong type.
        """
        _check_text("prompt", prompt)
        settings = Settings(**options)
        return TextStream(
            self, settings, lambda: _Prompt(self._encode(prompt, settings.special), [])
        )

    def astream(self, prompt: str = "", **options: Unpack[TextOptions]) -> TextStream:
        """Write like `stream`, for `async for`.

            async for piece in text.astream("LEONTES."):
                print(piece, end="", flush=True)

        The model runs in a thread, so other tasks go on. A task that is cancelled waits for the
        call of the model that has begun, and leaves the session as a stream does that is left.

        Args:
          prompt: Text to continue; "" continues what was read or written before.
          **options: How to write, see `TextOptions`.

        Raises:
          ConfigError: An option is out of range, or has the wrong type.
        """
        return self.stream(prompt, **options)

    @overload
    def generate(
        self, prompt: str = "", n: None = None, **options: Unpack[TextOptions]
    ) -> Generation: ...

    @overload
    def generate(self, prompt: str, n: int, **options: Unpack[TextOptions]) -> list[Generation]: ...

    @overload
    def generate(
        self, prompt: _Texts, n: int | None = None, **options: Unpack[TextOptions]
    ) -> list[Generation]: ...

    def generate(
        self, prompt: str | _Texts = "", n: int | None = None, **options: Any
    ) -> Generation | list[Generation]:
        """Continue a prompt; or several prompts, or one prompt in several ways, in one batch.

        With one prompt and without `n`, the session goes on with what it wrote. Otherwise each
        prompt, and each of its `n` continuations, gets a copy of the session's state, and the
        session itself stays as it is: choose a continuation, and `read` it. Text number i, counted
        through, is drawn as with a sampler whose seed is larger by i; another callable than a
        `Sampler` draws them all.

        Args:
          prompt: Text to continue, or a list of texts; "" continues what was read before.
          n: Number of continuations of each prompt.
          **options: How to write, see `TextOptions`.

        Returns:
          What was written; for several texts a list, prompt after prompt.

        Raises:
          ConfigError: An option is out of range, or `n` is more than 1 with a sampler that always
            takes the most likely token.
          ShapeError: There are more texts than the runtime or the memory takes.
          TokenError: A prompt is empty, too long, or cannot be read.
        """
        if isinstance(prompt, str) and n is None:
            return self.stream(prompt, **options).result()
        count = 1 if n is None else whole_number(n)
        if count is None or count < 1:
            raise ConfigError(f"n is {shown(n)}; expected 1 or more continuations, or None")
        prompts = [prompt] if isinstance(prompt, str) else checked_list("prompt", prompt)
        for each in prompts:
            _check_text("prompt", each)
        if not prompts:
            raise ConfigError("there are no prompts; expected one or more texts")
        return self._generate_rows(prompts, count, Settings(**options))

    def chat(
        self,
        message: str | Message | Sequence[Message],
        variables: Mapping[str, Any] | None = None,
        **options: Unpack[TextOptions],
    ) -> Generation:
        """Answer a message of a conversation; see `stream_chat`."""
        return self.stream_chat(message, variables, **options).result()

    def stream_chat(
        self,
        message: str | Message | Sequence[Message],
        variables: Mapping[str, Any] | None = None,
        **options: Unpack[TextOptions],
    ) -> TextStream:
        """Answer a message of a conversation piece by piece, by the model's chat template.

            for piece in text.stream_chat("Who is Leontes?", sampler=Sampler(0.7)):
                print(piece, end="", flush=True)

        The session reads what is new since its last answer, and remembers the conversation in
        `messages`. `read` and `generate` end it: the next message begins a new one, of a model that
        has read and learned more. Control tokens inside a message are read as text.

        Args:
          message: What the user says; or a message, {"role": ..., "content": ...}; or a list with
            the whole conversation, as transformers takes it, which begins with `messages`.
          variables: More variables of the template, such as "tools".
          **options: How to write, see `TextOptions`.

        Raises:
          ConfigError: The model has no chat template, the template refuses the messages, or they
            do not continue the conversation.
        """
        self.check_chat()
        settings = Settings(**options)
        if settings.special:
            raise ConfigError("special is True; in a chat, control tokens in messages are text")
        return TextStream(self, settings, lambda: self._chat_prompt(message, variables))

    def check_chat(self) -> None:
        """Check that the model can chat.

        Raises:
          ConfigError: It has no chat template.
          CheckpointError: Its chat template is malformed.
        """
        if self._template is None:
            self._template = ChatTemplate(self.tokenizer)

    def reset(self) -> None:
        """Forget all that was read and learned; the next text starts afresh."""
        with self._lock:
            self._begin()
            self.session.reset()
            self._forget()

    def save_state(self, path: str | Path, compress: str = "none") -> SavedState:
        """Save what was read and learned to a file, from which any runtime can continue.

        The last token that was written is read first. The conversation is not in the file: what
        the model knows of it is.

        Args:
          path: File to write, see `Session.save_state`.
          compress: Compression of the file, see `Session.save_state`.

        Raises:
          ConfigError: There is no such compression, or an argument has the wrong type.
          OSError: The file cannot be written; what was at `path` is as before.
        """
        with self._lock:
            self.flush()
            return self.session.save_state(path, compress=compress)

    def load_state(self, path: str | Path) -> None:
        """Continue from a file that `save_state` or `fwl-export read` wrote.

        Args:
          path: File to read, see `Session.load_state`.

        Raises:
          StateError: The file cannot be used. Nothing has changed.
          OSError: The file cannot be read.
        """
        with self._lock:
            self._begin()
            self.session.load_state(path)
            self._forget()

    def _begin(self) -> None:
        """Leave the stream that is under way, and notice if the session was moved by others."""
        if self._stream is not None:
            self._stream._leave()
        if self.session.positions[0] != self._position:
            self._forget()

    def _forget(self) -> None:
        self._position = self.session.positions[0]
        self._unread, self._context, self._logits, self._messages = [], [], None, []

    @property
    def _fresh(self) -> bool:
        return not self._position and not self._unread

    def _encode(self, text: str, special: bool) -> Array:
        _check_text("text", text)
        return self.tokenizer.encode(text, start=self._fresh, special=special)

    def _room(self) -> int | None:
        """Return how many more tokens the model can read, or None for any number."""
        most = self.session.max_positions
        return most - self._position if most else None

    def _feed(self, ids: Array, learn: bool) -> None:
        """Read the token that was not read yet, and then these ids."""
        both = np.concatenate([np.array(self._unread, np.int64), ids])
        if not len(both):
            return
        weights = np.full(len(both), float(learn), np.float32)
        weights[: len(self._unread)] = self._unread_learn
        logits = self.session.feed(both, weights, last_only=True)[0]
        self._have_read(both, logits)

    def _have_read(self, ids: Array, logits: Array) -> None:
        self._position = self.session.positions[0]
        self._context = [*self._context, *ids[-_CONTEXT:].tolist()][-_CONTEXT:]
        self._unread, self._logits = [], logits

    def _tokens(self, ids: Array, writer: Writer, learn: bool) -> Iterator[int]:
        """Read some ids, and yield the tokens that follow, while the books are kept."""
        reading, left = ids, writer.max_tokens

        def draw(logits: Array) -> int:
            nonlocal reading
            self._have_read(reading, logits)
            token = writer.draw(logits)
            self._unread, self._unread_learn, self._logits = [token], learn, None
            reading = np.array([token])
            return token

        if not len(ids):
            if self._logits is None:
                raise TokenError("the prompt is empty; expected at least one token")
            token = draw(self._logits)
            yield token
            ids, left = np.array([token]), left - 1
        ends = sorted(writer.end_ids)
        yield from self.session.generate(ids, left, draw, ends, learn)

    def _joined(self, ids: Array, learn: bool) -> Array:
        """Return ids to read, the unread token first; read it here if it learns otherwise."""
        if self._unread and self._unread_learn != learn:
            self._feed(np.zeros(0, np.int64), learn)
        return np.concatenate([np.array(self._unread, np.int64), ids])

    def _generate_rows(self, prompts: list[str], n: int, settings: Settings) -> list[Generation]:
        sampler = settings.sampler
        if n > 1 and (sampler is None or (isinstance(sampler, Sampler) and sampler.greedy)):
            raise ConfigError(
                f"n is {n}, but the sampler always takes the most likely token, so all would be "
                "the same; give a sampler with a temperature"
            )
        with self._lock:
            self._begin()
            rows = _Rows(self, prompts, n, settings)
        return rows.run()

    def _chat_prompt(
        self, message: str | Message | Sequence[Message], variables: Mapping[str, Any] | None
    ) -> _Prompt:
        assert self._template is not None
        before = self._messages
        new = _new_messages(message, before)
        conversation = [*before, *map(dict, checked_messages(new))]
        if before:
            ids = self._template.encode_more(before, new, variables)
            return _Prompt(ids, conversation, ends_answer=True)
        ids = self._template.encode(new, variables)
        start = self.tokenizer.start_ids
        if not self._fresh and start and tuple(ids[: len(start)].tolist()) == start:
            ids = ids[len(start) :]  # it stands at the beginning of what was read before
        return _Prompt(ids, conversation)


class TextStream:
    """Text that comes piece by piece, from `TextSession.stream` or `stream_chat`.

    Iterate over it with `for`, or with `async for` in asyncio. Pieces are never empty, and their
    characters are whole.
    """

    def __init__(
        self, owner: TextSession, settings: Settings, prompt: Callable[[], _Prompt]
    ) -> None:
        """Prepare a stream; `TextSession` makes them.

        Args:
          owner: Session that writes.
          settings: How to write.
          prompt: Function that returns what to read first.
        """
        self._owner, self._settings = owner, settings
        self._writer: Writer | None = None
        self._pieces = self._run(prompt)
        self._begun = self._left = False

    def __repr__(self) -> str:
        tokens = len(self._writer.tokens) if self._writer else 0
        return f"<TextStream: {tokens} tokens, finish_reason={self.finish_reason!r}>"

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why the text ended: "stop", "end" or "length", see `Generation`; None before that."""
        return self._writer.finish_reason if self._writer else None

    @property
    def generation(self) -> Generation:
        """What was written so far."""
        return self._writer.generation() if self._writer else Generation("", [], None, 0)

    def result(self) -> Generation:
        """Write the rest of the text, and return all of it."""
        for _ in self:
            pass
        return self.generation

    def close(self) -> None:
        """Leave the text as it is; the session can go on from there."""
        with self._owner._lock:
            self._leave()

    def __iter__(self) -> TextStream:
        return self

    def __next__(self) -> str:
        with self._owner._lock:
            if not self._begun:
                self._owner._begin()
                self._owner._stream, self._begun = self, True
            elif self._left and not self.finish_reason:
                raise StateError(
                    "this stream was left: it was closed, or the session has read or written "
                    "something else since; begin a new one"
                )
            return next(self._pieces)

    def _leave(self) -> None:
        self._begun = self._left = True
        self._pieces.close()
        if self._owner._stream is self:
            self._owner._stream = None

    def _run(self, prompt: Callable[[], _Prompt]) -> Generator[str, None, None]:
        owner, learn = self._owner, self._settings.learn
        given = prompt()
        unread, position = owner._unread, owner._position
        if given.ends_answer and set(unread) & owner.tokenizer.end_ids:
            owner._unread = []
        try:
            ids = owner._joined(given.ids, learn)
            before = np.array([*owner._context, *ids], np.int64)
            self._writer = writer = Writer(
                self._settings, owner.tokenizer, ids, owner._room(), before
            )
            for token in owner._tokens(ids, writer, learn):
                if piece := writer.add(token):
                    yield piece
                if writer.finish_reason:
                    return
        finally:
            if owner._position == position and not self.generation.tokens:
                owner._unread = unread  # nothing was read
            else:
                answer = {"role": "assistant", "content": self.generation.text}
                owner._messages = [*given.conversation, answer] if given.conversation else []

    def __aiter__(self) -> TextStream:
        return self

    async def __anext__(self) -> str:
        step = asyncio.get_running_loop().run_in_executor(None, next, self, None)
        try:
            piece = await asyncio.shield(step)
        except asyncio.CancelledError:
            # The model's call cannot be interrupted. Nobody waits for its piece any more.
            step.add_done_callback(lambda done: done.cancelled() or done.exception())
            with contextlib.suppress(Exception):
                await asyncio.shield(step)
            await asyncio.shield(asyncio.to_thread(self.close))
            raise
        if piece is None:
            raise StopAsyncIteration
        return piece

    async def aclose(self) -> None:
        """Leave the text as it is, see `close`."""
        await asyncio.to_thread(self.close)


class _Rows:
    """Several texts that are written in one batch, all from copies of one state."""

    def __init__(
        self, owner: TextSession, prompts: Sequence[str], n: int, settings: Settings
    ) -> None:
        """Copy the state, and turn the prompts into ids.

        Args:
          owner: Session to copy.
          prompts: Texts to continue.
          n: Number of continuations of each.
          settings: How to write.
        """
        self._settings, self._n = settings, n
        self._logits = owner._logits
        self._unread, self._unread_learn = owner._unread, owner._unread_learn
        self._ids = [
            np.array([*owner._unread, *owner._encode(prompt, settings.special)], np.int64)
            for prompt in prompts
        ]
        if self._logits is None and not all(map(len, self._ids)):
            raise TokenError("a prompt is empty; expected at least one token")
        self._session = owner.session.another(len(prompts))
        self._session.learning_rate_scale = owner.session.learning_rate_scale[0]
        self._copy(owner.session.state, len(prompts))
        self._writers = [
            Writer(
                settings_of_row(settings, row),
                owner.tokenizer,
                ids,
                owner._room(),
                np.array([*owner._context, *ids], np.int64),
            )
            for row, ids in enumerate(each for each in self._ids for _ in range(n))
        ]

    def _copy(self, state: Mapping[str, Array], count: int) -> None:
        rows = {name: np.repeat(array, count, 0) for name, array in state.items()}
        self._session.state = rows

    def run(self) -> list[Generation]:
        """Write all texts to their ends."""
        logits = np.repeat(self._read_prompts(), self._n, 0)
        if self._n > 1:
            state = self._session.state
            many = self._session.another(len(self._writers))
            many.learning_rate_scale = self._session.learning_rate_scale[0]
            self._session = many
            self._copy(state, self._n)
        while (lengths := self._write(logits)).any():
            tokens = [[writer.tokens[-1]] for writer in self._writers]
            weights = np.full((len(tokens), 1), float(self._settings.learn))
            logits = self._session.feed(tokens, weights, lengths, last_only=True)
        return [writer.generation() for writer in self._writers]

    def _write(self, logits: Array) -> Array:
        """Draw a token for each text that goes on; return 1 where one must be read, else 0."""
        for writer, row in zip(self._writers, logits, strict=True):
            if not writer.finish_reason:
                writer.add(writer.draw(row))
        return np.array([not writer.finish_reason for writer in self._writers], np.int64)

    def _read_prompts(self) -> Array:
        """Return the logits after each prompt, [P, V]."""
        lengths = np.array([len(ids) for ids in self._ids])
        tokens = np.zeros((len(lengths), max(lengths.max(), 1)), np.int64)
        weights = np.full(tokens.shape, float(self._settings.learn), np.float32)
        for row, ids in enumerate(self._ids):
            tokens[row, : len(ids)] = ids
        weights[:, : len(self._unread)] = float(self._unread_learn)
        logits = self._session.feed(tokens, weights, lengths, last_only=True)
        if self._logits is not None:
            logits[lengths == 0] = self._logits
        return logits


def settings_of_row(settings: Settings, row: int) -> Settings:
    """Return the settings of one of several texts: a sampler of its own, with a seed of its own."""
    sampler = settings.sampler
    if not isinstance(sampler, Sampler):
        return settings
    return replace(settings, sampler=sampler.with_seed(sampler.seed + row))


def _check_text(name: str, text: object) -> None:
    if not isinstance(text, str):
        raise ConfigError(f"{name} is {shown(text)}; expected text")


def _new_messages(
    message: str | Message | Sequence[Message], before: Sequence[Message]
) -> list[Message]:
    """Return what a caller of `chat` says that the session has not read yet."""
    if isinstance(message, str):
        return [{"role": "user", "content": message}]
    if isinstance(message, Mapping):
        return [message]
    messages = checked_messages(message)
    for number, (given, known) in enumerate(zip(messages, before, strict=False)):
        if not _same(given, known):
            raise ConfigError(
                f"message {number} of the list is {shown(given)}, but the session has read "
                f"{shown(known)}, and cannot unread it; give the conversation that it has read "
                "(`messages`) and what is new, or call reset() first"
            )
    if len(messages) <= len(before):
        raise ConfigError(
            f"the list has {len(messages)} messages, and the session has read {len(before)}; "
            "expected these and a new one"
        )
    return messages[len(before) :]


def _same(given: Message, known: Message) -> bool:
    """Return whether two messages are the same; space around an answer does not count."""
    texts = [dict(given), dict(known)]
    for text in texts:
        if text.get("role") == "assistant" and isinstance(text.get("content"), str):
            text["content"] = text["content"].strip()
    return texts[0] == texts[1]
