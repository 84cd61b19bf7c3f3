"""The tokenizer of a bundle or a checkpoint, with all that its folder says about reading text.

A published model spreads that over several files. `tokenizer.json` has the vocabulary,
`tokenizer_config.json` names the control tokens and holds the chat template, and
`generation_config.json` and the model's configuration say which tokens end a text. A checkpoint and
a bundle carry copies of these files. Where they disagree with each other, what transformers does
counts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import AddedToken, Tokenizer
from tokenizers.processors import TemplateProcessing

from fwl_export.bundle.config import HuggingFaceConfig, ModelConfig
from fwl_export.bundle.manifest import TOKENIZER_FILE, Bundle
from fwl_export.bundle.text_decoder import TextDecoder
from fwl_export.bundle.tokenizer import encode, load_tokenizer, template_ids
from fwl_export.errors import CheckpointError, TokenError
from fwl_export.json_files import read_bounded, read_json, shown

CONFIG_FILE = "tokenizer_config.json"
GENERATION_FILE = "generation_config.json"
TEMPLATE_FILE = "chat_template.jinja"
# Files that stand beside tokenizer.json in a checkpoint and in a bundle, where the model has them.
OPTIONAL_FILES = (CONFIG_FILE, "special_tokens_map.json", GENERATION_FILE, TEMPLATE_FILE)

# Names of control tokens by which published chat models end a turn or a text, whatever their
# configuration says.
_END_NAMES = (
    *("</s>", "<eos>", "[EOS]", "<|endoftext|>", "<|end_of_text|>", "<|im_end|>", "<|eot_id|>"),
    *("<|eom_id|>", "<end_of_turn>", "<|end_of_turn|>", "<|end|>", "<|eot|>", "<EOT>"),
    "<｜end▁of▁sentence｜>",
)


class TextTokenizer:
    """Turns text into token ids and back, as the model was trained to read it.

    Attributes:
      tokenizer: The tokenizer, which reads control tokens in a text as control tokens.
      vocab_size: Number of token ids of the model.
      start_ids: Token ids in front of the text of a fresh session; mostly none or one.
      end_ids: Token ids that end a text.
      chat_template: Jinja template that turns a conversation into text; None if there is none.
      special_tokens: Text of the named control tokens, e.g. "bos_token": "<s>", for templates.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        vocab_size: int,
        end_ids: frozenset[int] = frozenset(),
        chat_template: str | None = None,
        special_tokens: Mapping[str, str] | None = None,
    ) -> None:
        """Combine what was read; `bundle_text_tokenizer` and `read_text_tokenizer` read it.

        For the arguments, see the attributes.
        """
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        self.start_ids, _ = template_ids(tokenizer)
        self.end_ids = end_ids
        self.chat_template = chat_template
        self.special_tokens = dict(special_tokens or {})

    @property
    def bos_id(self) -> int | None:
        """The token in front of a fresh session's text; None if the model was trained without."""
        return self.start_ids[0] if self.start_ids else None

    @property
    def unused_ids(self) -> npt.NDArray[np.int64]:
        """Ids of the model that are no token, as in padded embeddings: never generate them; [N]."""
        used = np.zeros(self.vocab_size, bool)
        ids = np.fromiter(self.tokenizer.get_vocab().values(), np.int64)
        used[ids[ids < self.vocab_size]] = True
        return np.flatnonzero(~used)

    def encode(self, text: str, *, start: bool, special: bool = False) -> npt.NDArray[np.int64]:
        """Return the token ids of a text, [N] int64. No token that ends a text is put behind it.

        Args:
          text: Text of any length.
          start: Whether the text begins a fresh session. Then the token that the model was trained
            to see at the beginning comes first, if there is one, and never twice.
          special: Whether control tokens in the text, such as "</s>", are read as control tokens;
            they are plain text otherwise.

        Raises:
          TokenError: The tokenizer fails, or the text has a token that the model does not know.
        """
        ids = encode(text, self.tokenizer, start, special)
        if len(ids) and (largest := int(ids.max())) >= self.vocab_size:
            raise TokenError(
                f"the text contains {shown(self.tokenizer.id_to_token(largest))}, which is token "
                f"{largest} of the tokenizer, but the model's ids end at {self.vocab_size - 1}: it "
                "was added to the tokenizer and never trained; remove it from the text"
            )
        return ids

    def decode(self, ids: Sequence[int] | npt.NDArray[Any]) -> str:
        """Return the text of token ids; control tokens have none.

        Args:
          ids: [N] token ids.
        """
        text: str = self.tokenizer.decode([int(token) for token in ids])
        return text

    def decoder(self, before: Sequence[int] | npt.NDArray[Any] = ()) -> TextDecoder:
        """Return a decoder for tokens that come one by one.

        Args:
          before: Token ids that they continue, such as a prompt.
        """
        return TextDecoder(self.tokenizer, before)


def bundle_text_tokenizer(bundle: Bundle) -> TextTokenizer:
    """Return the tokenizer of a bundle.

    Raises:
      BundleError: One of its files is missing or was changed.
      CheckpointError: A file is malformed, or does not fit the model's vocabulary.
    """

    def read(name: str) -> bytes | None:
        return bundle.read_file(name) if name in bundle.manifest.files else None

    return read_text_tokenizer(bundle.folder, bundle.manifest.config, read)


def read_text_tokenizer(
    folder: Path, config: ModelConfig, read: Callable[[str], bytes | None] | None = None
) -> TextTokenizer:
    """Return the tokenizer of a folder with a tokenizer.json.

    Args:
      folder: Path of the folder.
      config: Configuration of the model.
      read: Function that returns the content of one of its files, or None for a file that it does
        not have; None reads from the folder.

    Raises:
      CheckpointError: A file is malformed, or does not fit the model's vocabulary.
    """

    def content(name: str) -> bytes | None:
        path = folder / name
        return read_bounded(path, CheckpointError) if path.is_file() else None

    read = read or content
    path = folder / TOKENIZER_FILE
    tokenizer = load_tokenizer(path, config.vocab_size, content=read(TOKENIZER_FILE))
    settings = _settings(folder, read)
    names = _names(settings)
    tokens = [AddedToken(text, special=True, normalized=False) for text in names.values()]
    tokenizer.add_special_tokens(tokens)
    _, after = template_ids(tokenizer, path)
    bos = names.get("bos_token")
    if settings.get("add_bos_token") is True and bos and not template_ids(tokenizer, path)[0]:
        ids = [(bos, tokenizer.token_to_id(bos))]
        tokenizer.post_processor = TemplateProcessing(single=f"{bos} $A", special_tokens=ids)
    ends = _end_ids(tokenizer, config, _object(folder, GENERATION_FILE, read), names)
    return TextTokenizer(
        tokenizer,
        config.vocab_size,
        ends | frozenset(after),
        _chat_template(settings, read(TEMPLATE_FILE)),
        names,
    )


def _object(folder: Path, name: str, read: Callable[[str], bytes | None]) -> dict[str, Any]:
    """Return the content of an optional JSON file, {} if it is not there."""
    content = read(name)
    if content is None:
        return {}
    data = read_json(folder / name, CheckpointError, content=content)
    if not isinstance(data, dict):
        raise CheckpointError(f"{folder / name} is {shown(data)}; expected a JSON object")
    return data


def _settings(folder: Path, read: Callable[[str], bytes | None]) -> dict[str, Any]:
    """Return tokenizer_config.json, completed by the older special_tokens_map.json."""
    return _object(folder, "special_tokens_map.json", read) | _object(folder, CONFIG_FILE, read)


def _names(settings: Mapping[str, Any]) -> dict[str, str]:
    """Return the text of the named control tokens."""
    found = {}
    for key, value in settings.items():
        text = value.get("content") if isinstance(value, dict) else value
        if key.endswith("_token") and isinstance(text, str) and text:
            found[key] = text
    return found


def _end_ids(
    tokenizer: Tokenizer,
    config: ModelConfig,
    generation: Mapping[str, Any],
    names: Mapping[str, str],
) -> frozenset[int]:
    """Return the ids that end a text, by any of the files that say so."""
    found: list[Any] = [_ids(generation.get("eos_token_id"))]
    if isinstance(config.backbone, HuggingFaceConfig):
        found.append(_ids(config.backbone.model.get("eos_token_id")))
    added = tokenizer.get_added_tokens_decoder()
    control = {token.content: number for number, token in added.items() if token.special}
    ends = {*_END_NAMES, names.get("eos_token")}
    if "<|return|>" in control:  # of gpt-oss, where <|end|> only ends a part of an answer
        ends.discard("<|end|>")
    found.append([control[text] for text in ends if text in control])
    return frozenset(token for ids in found for token in ids)


def _ids(value: Any) -> list[int]:
    values = value if isinstance(value, list) else [value]
    return [number for number in values if type(number) is int and number >= 0]


def _chat_template(settings: Mapping[str, Any], file: bytes | None) -> str | None:
    """Return the chat template; the file of its own counts before tokenizer_config.json."""
    if file is not None:
        return file.decode()
    found = settings.get("chat_template")
    if isinstance(found, list):
        named = {entry.get("name"): entry.get("template") for entry in found}
        found = named.get("default")
    return found if isinstance(found, str) else None
