"""Chat templates: from the messages of a conversation to the token ids that a model reads.

Templates are Jinja programs of a published model, so they run in Jinja's sandbox and see plain data
only. What they render is what transformers renders with `apply_chat_template(messages,
sanitize_control_tokens=True)`: control tokens that the template writes are control tokens, and
those inside a message are text, so nobody can end a turn or speak as the system by typing them.
"""

from __future__ import annotations

import datetime
import functools
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from fwl_export.bundle.text_tokenizer import TextTokenizer
from fwl_export.bundle.tokenizer import run
from fwl_export.bundle.tokenizer_facts import facts
from fwl_export.errors import CheckpointError, ConfigError, TokenError
from fwl_export.json_files import shown

Message = Mapping[str, Any]

_REASONING_NAMES = ("reasoning_content", "thinking", "reasoning")
_PRIVATE_USE = range(0xF0000, 0x10FFFE)


class ChatTemplate:
    """The chat template of a model, together with its tokenizer."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        """Compile the template.

        Args:
          tokenizer: Tokenizer of the model, with its template.

        Raises:
          ConfigError: The model has no chat template.
          CheckpointError: The template is not a Jinja template.
        """
        if tokenizer.chat_template is None:
            raise ConfigError(
                "this model has no chat template, so it was not trained to chat; use `generate`, "
                "or put a `chat_template.jinja` beside its tokenizer.json before you export it"
            )
        self._tokenizer = tokenizer
        self._source = tokenizer.chat_template
        self._compiled = _compile(self._source)

    def render(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """Return the text of a conversation.

        Args:
          messages: The messages, each with "role" and "content".
          add_generation_prompt: Whether the text ends with the head of the assistant's answer.
          variables: More variables of the template, such as "tools".

        Raises:
          ConfigError: The messages are malformed, or the template refuses them.
        """
        import jinja2

        given = {"tools": None, "documents": None, **_plain(variables or {})}
        try:
            return self._compiled.render(
                **self._tokenizer.special_tokens,
                **given,
                messages=[
                    _with_reasoning(_plain(message)) for message in checked_messages(messages)
                ],
                add_generation_prompt=add_generation_prompt,
            )
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError) as error:
            reason = str(error) or type(error).__name__
            raise ConfigError(
                f"the model's chat template refuses these messages: {reason}"
            ) from None

    def encode(
        self, messages: Sequence[Message], variables: Mapping[str, Any] | None = None
    ) -> npt.NDArray[np.int64]:
        """Return the token ids of a conversation, and of the head of the answer to it; [N] int64.

        For the arguments and errors, see `render`.
        """
        marks = self._marks(messages, variables)
        text = self.render(
            marks.mark(checked_messages(messages)), True, marks.mark(variables or {})
        )
        return self._ids(marks, text, begins=True)

    def encode_more(
        self,
        before: Sequence[Message],
        after: Sequence[Message],
        variables: Mapping[str, Any] | None = None,
    ) -> npt.NDArray[np.int64]:
        """Return the ids that follow an answer: its end, new messages, the head of the next answer.

        Args:
          before: The conversation so far; the last message is the answer.
          after: The new messages.
          variables: More variables of the template, such as "tools".

        Raises:
          ConfigError: The messages are malformed, or the template refuses them, or leaves the
            answer out.
        """
        marks = self._marks([*before, *after], variables)
        answer = {**before[-1], "content": marks.answer}
        earlier, new = marks.mark([*before[:-1]]), marks.mark(checked_messages(after))
        marked = [*earlier, answer, *new]
        text = self.render(marked, True, marks.mark(variables or {}))
        parts = text.split(marks.answer)
        if len(parts) != 2:
            raise ConfigError(
                f"the model's chat template repeats the last answer {len(parts) - 1} times; "
                "expected once: begin a new conversation with reset()"
            )
        return self._ids(marks, parts[1], begins=False)

    def _marks(self, messages: Sequence[Message], variables: Mapping[str, Any] | None) -> _Marks:
        data = json.dumps([_plain(messages), _plain(variables or {})], ensure_ascii=False)
        return _Marks(self._control_tokens(), self._source + data)

    def _control_tokens(self) -> list[str]:
        """Return the tokens that are text in messages: the special, and those of the template."""
        literals = _literals(self._source)
        added = self._tokenizer.tokenizer.get_added_tokens_decoder().values()
        return [
            token.content
            for token in added
            if token.special or (token.content in literals and not token.content.isspace())
        ]

    def _ids(self, marks: _Marks, text: str, begins: bool) -> npt.NDArray[np.int64]:
        """Return the ids of rendered text whose control tokens from messages are marked."""
        tokenizer = self._tokenizer.tokenizer
        ids: list[int] = []
        for number, piece in enumerate(marks.split(text)):
            if not piece:
                continue
            if not number and begins:
                ids += run(tokenizer, piece).ids
            elif number % 2:
                ids += _ids_of_text(tokenizer, piece)
            else:
                ids += _ids_in_the_middle(tokenizer, piece)
        return np.array(ids, np.int64)


class _Marks:
    """Private characters around the control tokens of messages, which the messages do not contain.

    Attributes:
      answer: Stands for the last answer.
    """

    def __init__(self, control_tokens: Sequence[str], text: str) -> None:
        used = set(text)
        free = (chr(code) for code in _PRIVATE_USE if chr(code) not in used)
        found = list(itertools.islice(free, 3))
        if len(found) < 3:
            raise ConfigError(
                "the messages contain all private characters; leave three of them out"
            )
        self._start, self._end, self.answer = found
        longest_first = sorted(control_tokens, key=len, reverse=True)
        pattern = "|".join(map(re.escape, longest_first)) or "(?!)"
        self._tokens = re.compile(pattern)
        self._marked = re.compile(f"{self._start}({pattern}){self._end}|[{self._start}{self._end}]")

    def mark(self, data: Any) -> Any:
        """Return data with marks around the control tokens in its strings."""
        if isinstance(data, str):
            return self._tokens.sub(rf"{self._start}\g<0>{self._end}", data)
        if isinstance(data, Mapping):
            return {key: self.mark(value) for key, value in data.items()}
        if isinstance(data, (list, tuple)):
            return [self.mark(value) for value in data]
        return data

    def split(self, text: str) -> list[str | None]:
        """Split rendered text: what the template wrote, a marked token, and so on in turn.

        A template may have separated the two marks of a token. Such a mark is left out, and still
        keeps the text on its two sides apart.
        """
        parts: list[str | None] = self._marked.split(text)
        return parts


def _ids_in_the_middle(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return the ids of text inside of a text, where SentencePiece puts no space in front."""
    newline = run(tokenizer, "\n").ids
    ids: list[int] = run(tokenizer, "\n" + text).ids
    return ids[len(newline) :] if ids[: len(newline)] == newline else run(tokenizer, text).ids


def _ids_of_text(tokenizer: Tokenizer, token: str) -> list[int]:
    """Return the ids of a control token that is to be read as text."""
    ids = _ids_in_the_middle(facts(tokenizer).plain, token)
    if tokenizer.token_to_id(token) in ids:
        raise TokenError(
            f"a message contains {shown(token)}, which the model's tokenizer reads as a control "
            "token in any case; remove it from the message"
        )
    return ids


def checked_messages(messages: object) -> list[Message]:
    """Return messages without the keys whose value is None, as the templates expect them.

    Args:
      messages: What the caller gave.

    Raises:
      ConfigError: They are not a list of mappings with a role, or there are none.
    """
    if not isinstance(messages, (list, tuple)) or not messages:
        raise ConfigError(f"messages are {shown(messages)}; expected a list of messages")
    for message in messages:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ConfigError(
                f"a message is {shown(message)}; expected a mapping such as "
                '{"role": "user", "content": "..."}'
            )
    return [{k: value for k, value in each.items() if value is not None} for each in messages]


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """Return a message with its reasoning under the names that templates read."""
    found = (message[name] for name in _REASONING_NAMES if message.get(name) is not None)
    reasoning = next(found, None)
    if reasoning is None:
        return message
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _plain(value: Any) -> Any:
    """Return data made of plain types alone, since the sandbox does not know what others can do."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)([_plain(item) for item in value])
    for kind in (str, int, float):
        if isinstance(value, kind):
            return kind(value)
    raise ConfigError(
        f"a message contains {shown(value)}; expected text, numbers, lists and mappings"
    )


@functools.lru_cache(maxsize=8)
def _literals(source: str) -> str:
    """Return the texts that a template contains, with zeros between them."""
    import jinja2

    tree = _environment().parse(source)
    texts = [node.data for node in tree.find_all(jinja2.nodes.TemplateData)]
    values = [node.value for node in tree.find_all(jinja2.nodes.Const)]
    return "\0".join([*texts, *(value for value in values if isinstance(value, str))])


@functools.lru_cache(maxsize=8)
def _compile(source: str) -> Any:
    import jinja2

    try:
        return _environment().from_string(source)
    except jinja2.TemplateError as error:
        raise CheckpointError(f"the model's chat template is not a template: {error}") from None


@functools.cache
def _environment() -> Any:
    """Return Jinja's sandbox with what transformers gives to templates."""
    import jinja2
    import jinja2.ext
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        """The block `generation`, which marks answers for training; its content as it is."""

        tags = {"generation"}  # noqa: RUF012 - Jinja reads it as a set

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            call = self.call_method("_content")
            return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

        def _content(self, caller: Any) -> Any:
            return caller()

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[Generation, jinja2.ext.loopcontrols],
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = _now
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Return JSON; unlike Jinja's own filter, it leaves `<` and `&` as they are."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _refuse(message: str) -> NoReturn:
    import jinja2

    raise jinja2.TemplateError(message)


def _now(format: str) -> str:  # noqa: A002 - templates may call it with this name
    return datetime.datetime.now().strftime(format)
