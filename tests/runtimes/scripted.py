"""A model that says what a test wants, and remembers in its state all that it has read.

It makes tests of what happens around a model exact: which ids were read, with which weights, and
what becomes of the text that the model writes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing

from fwl_export.bundle.state import Array, State, TensorSpec, zeros
from fwl_export.bundle.text_tokenizer import TextTokenizer
from fwl_export.errors import NotFiniteError
from fwl_export.runtimes import Session, SessionSpec
from fwl_export.runtimes.base import Call, Rows, index
from fwl_export.runtimes.text_session import TextSession

LONGEST = 4000  # ids that a row can remember
SPECS = [
    TensorSpec("position", (), "int64"),
    TensorSpec("ids", (LONGEST,), "int64"),
    TensorSpec("weights", (LONGEST,), "float32"),
]

Script = Callable[[list[int]], "int | Array"]


class ScriptedRunner:
    """Runs a script in place of a model.

    Attributes:
      script: From the ids that a row has read, the next token id, or logits [V].
      broken: Raise `NotFiniteError` at this many more calls, once it is 1 or more.
      gate: Each call waits for this event.
    """

    def __init__(self, script: Script, vocab_size: int) -> None:
        self.script, self.vocab_size = script, vocab_size
        self.broken = 0
        self.calls = 0
        self.gate = threading.Event()
        self.gate.set()

    def another(self) -> ScriptedRunner:
        return self

    def new_buffers(self, batch: int) -> State:
        return zeros(SPECS, batch)

    def run(self, call: Call, past: State, present: State) -> Array:
        self.calls += 1
        self.gate.wait()
        if self.broken:
            self.broken -= 1
            if not self.broken:
                raise NotFiniteError("the model's output is not finite")
        for name in past:
            present[name][:] = past[name]
        logits = np.zeros((*call.logit_positions.shape, self.vocab_size), np.float32)
        for row, length in enumerate(call.lengths):
            start = int(past["position"][row])
            present["ids"][row, start : start + length] = call.input_ids[row, :length]
            present["weights"][row, start : start + length] = call.label_weights[row, :length]
            present["position"][row] = start + length
            for column, place in enumerate(call.logit_positions[row]):
                if place < length:
                    read = present["ids"][row, : start + place + 1].tolist()
                    logits[row, column] = self._logits(self.script(read))
        return logits

    def _logits(self, wanted: int | Array) -> Array:
        if isinstance(wanted, np.ndarray):
            return wanted
        logits = np.linspace(0, 1, self.vocab_size, dtype=np.float32)
        logits[wanted] = 9
        return logits

    def read(self, buffers: State, rows: Rows) -> State:
        return {name: array[index(rows)] for name, array in buffers.items()}

    def write(self, buffers: State, state: Mapping[str, Array], rows: Sequence[int]) -> None:
        for name, array in buffers.items():
            array[list(rows)] = state[name]

    def release(self, buffers: State) -> None:
        pass


def scripted(
    script: Script, tokenizer: TextTokenizer, max_positions: int = LONGEST, max_tokens: int = 7
) -> TextSession:
    """Return a text session whose model follows a script."""
    size = tokenizer.vocab_size
    spec = SessionSpec(SPECS, size, max_tokens, model_id="ab" * 32, max_positions=max_positions)
    return TextSession(Session(ScriptedRunner(script, size), spec), tokenizer)


def runner(text: TextSession) -> ScriptedRunner:
    """Return what runs the script."""
    found = text.session._runner
    assert isinstance(found, ScriptedRunner)
    return found


def read_ids(text: TextSession) -> list[int]:
    """Return all ids that the session has read."""
    state = text.session.state
    ids: list[int] = state["ids"][0, : int(state["position"][0])].tolist()
    return ids


def read_weights(text: TextSession) -> list[float]:
    """Return the weight with which each was read."""
    state = text.session.state
    weights: list[float] = state["weights"][0, : int(state["position"][0])].tolist()
    return weights


def saying(tokenizer: TextTokenizer, *answers: str) -> Script:
    """Return a script that writes these texts one after another, whatever it reads between them.

    It goes on with an answer whose beginning it has just read, and else begins the first answer
    that it has not read, up to its last token. Control tokens in the texts are written as such.
    """
    written = [tokenizer.encode(answer, start=False, special=True).tolist() for answer in answers]

    def script(read: list[int]) -> int:
        ahead = [each for each in written if not _contains(read, each[:-1] or each)]
        for size in range(len(read), 0, -1):
            for answer in [*ahead, *written]:
                if size < len(answer) and read[-size:] == answer[:size]:
                    return int(answer[size])
        return int(ahead[0][0]) if ahead else 0

    return script


def _contains(text: list[int], part: list[int]) -> bool:
    places = range(len(text) - len(part) + 1)
    return any(text[place : place + len(part)] == part for place in places)


def byte_tokenizer(
    special: Sequence[str] = ("<|start|>", "<|end|>"),
    bos: str | None = None,
    end: str | None = "<|end|>",
    chat_template: str | None = None,
    padding: int = 0,
    names: Mapping[str, str] | None = None,
) -> TextTokenizer:
    """Return a tokenizer of bytes, like those of GPT-2 and Llama 3 without their merges.

    Args:
      special: Control tokens.
      bos: The one that begins a text, if any.
      end: The one that ends a text, if any.
      chat_template: Template of a conversation.
      padding: Ids of the model that are no token.
      names: Control tokens by the names that templates use.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _finished(tokenizer, special, bos, end, chat_template, padding, names)


def sentencepiece_tokenizer(
    chat_template: str | None = None, names: Mapping[str, str] | None = None
) -> TextTokenizer:
    """Return a tokenizer like Llama 2's: a space in front of a text, and bytes as well."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    letters = [chr(code) for code in range(33, 127)]
    words = ["th", "the", "▁the", "▁t", "in", "▁k", "ki", "er"]
    vocabulary = {piece: number for number, piece in enumerate([*pieces, *letters, *words])}
    merges = [("▁", "t"), ("t", "h"), ("th", "e"), ("▁", "the"), ("i", "n"), ("▁", "k")]
    merges += [("k", "i"), ("e", "r")]
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    given = names or {"bos_token": "<s>", "eos_token": "</s>"}
    return _finished(tokenizer, ("<s>", "</s>"), "<s>", "</s>", chat_template, 0, given)


def _finished(
    tokenizer: Tokenizer,
    special: Sequence[str],
    bos: str | None,
    end: str | None,
    chat_template: str | None,
    padding: int,
    names: Mapping[str, str] | None,
) -> TextTokenizer:
    tokens = [AddedToken(text, special=True, normalized=False) for text in special]
    tokenizer.add_special_tokens(tokens)
    if bos is not None:
        tokenizer.post_processor = TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    ends = frozenset() if end is None else frozenset([tokenizer.token_to_id(end)])
    size = tokenizer.get_vocab_size() + padding
    return TextTokenizer(tokenizer, size, ends, chat_template, names)
