"""The tokenizer of a bundle or a checkpoint, with all that its folder says about reading text.

A published model spreads that over several files. `tokenizer.json` has the vocabulary,
`tokenizer_config.json` names the control tokens and holds the chat template, and
`generation_config.json` and the model's configuration say which tokens end a text. A checkpoint and
a bundle carry copies of these files. Where they disagree with each other, what transformers does
counts.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Required, TypedDict

import numpy as np
import numpy.typing as npt
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing

from fwl_export.bundle.config import HuggingFaceConfig, ModelConfig
from fwl_export.bundle.manifest import TOKENIZER_FILE, Bundle
from fwl_export.bundle.text_decoder import CONTEXT, TextDecoder, clean
from fwl_export.bundle.tokenizer import encode, load_tokenizer
from fwl_export.bundle.tokenizer_facts import facts, start_ids, template_ids
from fwl_export.errors import CheckpointError
from fwl_export.json_files import Name, Text, read_bounded, read_json, shown, typed

CONFIG_FILE = "tokenizer_config.json"
NAMES_FILE = "special_tokens_map.json"
GENERATION_FILE = "generation_config.json"
TEMPLATE_FILE = "chat_template.jinja"
# Files that stand beside tokenizer.json in a checkpoint and in a bundle, where the model has them.
OPTIONAL_FILES = (CONFIG_FILE, NAMES_FILE, GENERATION_FILE, TEMPLATE_FILE)

# Control tokens by which published models end a turn or a text, also where their configuration
# names another or none.
_END_NAMES = frozenset(
    (
        *("</s>", "<eos>", "[EOS]", "<|endoftext|>", "<|end_of_text|>", "<|im_end|>"),
        *("<|eot_id|>", "<|eom_id|>", "<|eot|>", "<end_of_turn>", "<|end_of_turn|>", "<|end|>"),
        *("<EOT>", "<｜end▁of▁sentence｜>"),
    )
)
# The answer of gpt-oss ends with this; its <|end|> ends only a part of an answer.
_RETURN = "<|return|>"

# Of these classes of transformers, the configuration decides about the space before a text.
_PREFIX_SPACE_CLASSES = ("GPT2Tokenizer", "GPT2TokenizerFast")


class _Added(TypedDict, total=False):
    content: Required[Text]
    single_word: bool
    lstrip: bool
    rstrip: bool
    normalized: bool
    special: bool


class _Named(TypedDict):
    name: Name
    template: Text


_Tokens = list[str | _Added] | dict[str, str | _Added] | None


class _Settings(TypedDict, total=False):
    """What is read of tokenizer_config.json, beside the keys that end in "_token"."""

    add_bos_token: bool | None
    add_prefix_space: bool | None
    added_tokens_decoder: dict[str, _Added] | None
    additional_special_tokens: _Tokens
    chat_template: str | list[_Named] | dict[str, str] | None
    clean_up_tokenization_spaces: bool | None
    extra_special_tokens: _Tokens
    tokenizer_class: str | None


class _Generation(TypedDict, total=False):
    eos_token_id: int | list[int] | None


class TextTokenizer:
    """Turns text into token ids and back, as the model was trained to read it.

    Attributes:
      tokenizer: The tokenizer, which reads control tokens in a text as control tokens.
      vocab_size: Number of token ids of the model.
      start_ids: Token ids in front of the text of a fresh session; mostly none or one.
      end_ids: Token ids that end a text.
      chat_template: Jinja template that turns a conversation into text; None if there is none.
      special_tokens: Text of the named control tokens, e.g. "bos_token": "<s>", for templates.
      clean_up_spaces: Whether the tokenizer's settings ask for removing spaces before punctuation
        when decoding.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        vocab_size: int,
        end_ids: frozenset[int] = frozenset(),
        chat_template: str | None = None,
        special_tokens: Mapping[str, str] | None = None,
        clean_up_spaces: bool = False,
    ) -> None:
        """Combine what was read; `bundle_text_tokenizer` and `text_tokenizer` read it.

        For the arguments, see the attributes.
        """
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        self.start_ids, _ = template_ids(tokenizer)
        self.end_ids = end_ids
        self.chat_template = chat_template
        self.special_tokens = dict(special_tokens or {})
        self.clean_up_spaces = clean_up_spaces

    @property
    def bos_id(self) -> int | None:
        """The token in front of a fresh session's text; None if the model was trained without."""
        return self.start_ids[0] if self.start_ids else None

    @functools.cached_property
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
        return encode(text, self.tokenizer, start, special)

    def decode(self, ids: Sequence[int] | npt.NDArray[Any]) -> str:
        """Return the text of token ids; control tokens have none.

        Args:
          ids: [N] token ids.
        """
        text: str = self.tokenizer.decode([int(token) for token in ids])
        return clean(text) if self.clean_up_spaces else text

    def decoder(self, before: Sequence[int] | npt.NDArray[Any] = ()) -> TextDecoder:
        """Return a decoder for tokens that come one by one.

        Args:
          before: Token ids that they continue, such as a prompt.
        """
        last = [int(token) for token in before[-CONTEXT:]]
        return TextDecoder(self.tokenizer, last, self.clean_up_spaces)


def bundle_text_tokenizer(bundle: Bundle) -> TextTokenizer:
    """Return the tokenizer of a bundle.

    Raises:
      BundleError: One of its files is missing or was changed.
      CheckpointError: A file is malformed, or does not fit the model's vocabulary.
    """
    listed = [name for name in OPTIONAL_FILES if name in bundle.manifest.files]
    return text_tokenizer(
        bundle.folder,
        bundle.manifest.config,
        bundle.read_file(TOKENIZER_FILE),
        {name: bundle.read_file(name) for name in listed},
    )


def text_tokenizer(
    folder: Path,
    config: ModelConfig,
    content: bytes | None = None,
    files: Mapping[str, bytes] | None = None,
) -> TextTokenizer:
    """Return the tokenizer of a folder with a tokenizer.json.

    Args:
      folder: Path of the folder.
      config: Configuration of the model.
      content: Content of tokenizer.json, if it was read already.
      files: Content of those of `OPTIONAL_FILES` that are there; None reads them.

    Raises:
      CheckpointError: A file is malformed, or does not fit the model's vocabulary.
    """
    tokenizer = load_tokenizer(folder / TOKENIZER_FILE, config.vocab_size, content=content)
    files = optional_files(folder) if files is None else files
    data = _settings(folder, files)
    settings = typed(data, _Settings, f"{folder / CONFIG_FILE}", CheckpointError)
    tokens = _control_tokens(folder, data)
    names = {key: token["content"] for key, token in tokens.items() if key.endswith("_token")}
    _add_tokens(tokenizer, settings, tokens, folder)
    _set_prefix_space(tokenizer, settings)
    _set_start(tokenizer, settings, names)
    _check_start(tokenizer, config, folder)
    template = _chat_template(folder, settings, files)
    facts(tokenizer).files = dict(files)
    facts(tokenizer).controls = _template_tokens(tokenizer, template)
    ends = _end_ids(tokenizer, config, _generation(folder, files), names.get("eos_token"))
    return TextTokenizer(
        tokenizer,
        config.vocab_size,
        ends | frozenset(template_ids(tokenizer)[1]),
        template,
        names,
        # As in transformers, which ignores it for BPE, where it would change what was written.
        settings.get("clean_up_tokenization_spaces") is True
        and not isinstance(tokenizer.model, models.BPE),
    )


def optional_files(folder: Path) -> dict[str, bytes]:
    """Return the content of those of `OPTIONAL_FILES` that a folder has.

    Raises:
      CheckpointError: A file is too large, or is no regular file.
    """
    there = [name for name in OPTIONAL_FILES if (folder / name).is_file()]
    return {name: read_bounded(folder / name, CheckpointError) for name in there}


def _object(folder: Path, name: str, files: Mapping[str, bytes]) -> dict[str, Any]:
    """Return the content of an optional JSON file, {} if it is not there."""
    if name not in files:
        return {}
    data = read_json(folder / name, CheckpointError, content=files[name], long_integers=True)
    return typed(data, dict[str, Any], f"{folder / name}", CheckpointError)


def _settings(folder: Path, files: Mapping[str, bytes]) -> dict[str, Any]:
    """Return tokenizer_config.json, completed by the older special_tokens_map.json."""
    names, settings = (_object(folder, name, files) for name in (NAMES_FILE, CONFIG_FILE))
    # As in transformers: the older file counts only where the newer one lists no tokens.
    return settings if settings.get("added_tokens_decoder") else settings | names


def _generation(folder: Path, files: Mapping[str, bytes]) -> _Generation:
    data = _object(folder, GENERATION_FILE, files)
    return typed(data, _Generation, f"{folder / GENERATION_FILE}", CheckpointError)


def _control_tokens(folder: Path, data: Mapping[str, Any]) -> dict[str, _Added]:
    """Return the control tokens that the settings name, by their names."""
    found = {key: value for key, value in data.items() if key.endswith("_token")}
    for key in ("additional_special_tokens", "extra_special_tokens"):
        extra = data.get(key) or {}
        if isinstance(extra, list):
            extra = {f"{key}[{number}]": token for number, token in enumerate(extra)}
        found |= extra
    tokens = {
        key: {"content": value} if isinstance(value, str) else value
        for key, value in found.items()
        if value and isinstance(value, str | dict)
    }
    return typed(tokens, dict[str, _Added], f"{folder / CONFIG_FILE}", CheckpointError)


def _add_tokens(
    tokenizer: Tokenizer, settings: _Settings, named: Mapping[str, _Added], folder: Path
) -> None:
    """Add the tokens of the settings that tokenizer.json lacks, as transformers does.

    Raises:
      CheckpointError: A token would have another id than the settings say.
    """
    listed = settings.get("added_tokens_decoder") or {}
    for number, token in sorted(listed.items(), key=lambda entry: entry[0].zfill(20)):
        text = token["content"]
        if tokenizer.token_to_id(text) is None:
            tokenizer.add_tokens([_added(token)])
        if str(found := tokenizer.token_to_id(text)) != number:
            raise CheckpointError(
                f"{folder / CONFIG_FILE} says that {shown(text)} is token {shown(number)}, but "
                f"by {TOKENIZER_FILE} it is token {found}; do both files belong to one model?"
            )
    known = {token.content: token for token in tokenizer.get_added_tokens_decoder().values()}
    for token in named.values():
        text = token["content"]
        if not (text in known and known[text].special):
            flags: _Added = {"normalized": False, **token, "special": True}
            tokenizer.add_special_tokens([known.get(text) or _added(flags)])


def _added(token: _Added) -> AddedToken:
    return AddedToken(**token)


def _set_prefix_space(tokenizer: Tokenizer, settings: _Settings) -> None:
    step = tokenizer.pre_tokenizer
    is_decisive = settings.get("tokenizer_class") in _PREFIX_SPACE_CLASSES
    if is_decisive and isinstance(step, pre_tokenizers.ByteLevel):
        step.add_prefix_space = bool(settings.get("add_prefix_space"))
        tokenizer.pre_tokenizer = step


def _set_start(tokenizer: Tokenizer, settings: _Settings, names: Mapping[str, str]) -> None:
    """Let the post-processor put the first token in front of a text, if the settings ask for it."""
    bos = names.get("bos_token")
    if settings.get("add_bos_token") and bos and not start_ids(tokenizer):
        ids = [(bos, tokenizer.token_to_id(bos))]
        tokenizer.post_processor = TemplateProcessing(single=f"{bos} $A", special_tokens=ids)


def _check_start(tokenizer: Tokenizer, config: ModelConfig, folder: Path) -> None:
    beyond = [token for token in start_ids(tokenizer) if token >= config.vocab_size]
    if beyond:
        raise CheckpointError(
            f"{folder / TOKENIZER_FILE} puts token {beyond[0]} in front of a text, but the model's "
            f"ids end at {config.vocab_size - 1}; is it the tokenizer of another model?"
        )


def _end_ids(
    tokenizer: Tokenizer, config: ModelConfig, generation: _Generation, eos: str | None
) -> frozenset[int]:
    """Return the ids that end a text, by any of the files that say so."""
    found = _listed(generation.get("eos_token_id"))
    if isinstance(config.backbone, HuggingFaceConfig):
        found |= _listed(config.backbone.model.get("eos_token_id"))
    added = tokenizer.get_added_tokens_decoder()
    control = {token.content: number for number, token in added.items() if token.special}
    names = _END_NAMES - {"<|end|>"} if _RETURN in control else _END_NAMES
    return frozenset(found | {control[text] for text in names | {eos, _RETURN} if text in control})


def _listed(value: Any) -> set[int]:
    values = value if isinstance(value, list) else [value]
    return {number for number in values if type(number) is int and number >= 0}


def _chat_template(
    folder: Path, settings: Mapping[str, Any], files: Mapping[str, bytes]
) -> str | None:
    """Return the chat template; the file of its own counts before tokenizer_config.json."""
    if TEMPLATE_FILE in files:
        try:
            return files[TEMPLATE_FILE].decode()
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{folder / TEMPLATE_FILE} is not UTF-8 text: {error}") from None
    found = settings.get("chat_template")
    if isinstance(found, list):
        found = {entry["name"]: entry["template"] for entry in found}
    if isinstance(found, dict):
        found = found.get("default") or next(iter(found.values()), None)
    return found or None


def _template_tokens(tokenizer: Tokenizer, template: str | None) -> frozenset[str]:
    """Return the added tokens that a chat template writes, such as those that begin a turn."""
    added = tokenizer.get_added_tokens_decoder().values()
    texts = (token.content for token in added)
    return frozenset(
        text
        for text in texts
        if template
        and text in template
        and not text.strip().isalnum()
        and text.strip()
        and len(text) > 1
    )
