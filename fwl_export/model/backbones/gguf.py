"""Read a language model from a GGUF file, as llama.cpp uses them, with the loader of transformers.

Neither that loader nor the package gguf was made for files of strangers: a wrong count makes them
run out of memory or never end. So `read_header` walks the whole header first, and whatever it
accepts lies within the file.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import logging
import mmap
import struct
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from fwl_export.bundle.config import check_module_counts
from fwl_export.errors import CheckpointError, MissingDependencyError
from fwl_export.filesystem import open_regular
from fwl_export.json_files import brief, shown
from fwl_export.model.backbones.huggingface import import_transformers

_log = logging.getLogger(__name__)

SUFFIX = ".gguf"
_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
# struct's letters by the number of the type of a value; 8 is a string, 9 an array.
_SCALARS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
_STRING, _ARRAY = 8, 9
_MOST_KEYS = 1 << 12
_MOST_TENSORS = 1 << 16
_MOST_DIMENSIONS = 4
_MOST_STRINGS = 1 << 22  # in one array; the largest vocabularies have 0.3 million tokens
_LONGEST_STRING = 1 << 24
_LONGEST_NAME = 1 << 16
_LARGEST_SIZE = 1 << 40

# How a byte-level vocabulary splits text before it merges bytes. What transformers does not know it
# splits like GPT-2; llama.cpp splits these ones like GPT-2, but takes every digit for itself.
_LIKE_GPT2 = ("gpt-2", "phi-2", "mpt", "olmo", "jais")
_SINGLE_DIGITS = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")


@dataclass(frozen=True)
class Tensor:
    """A tensor's place in a file.

    Attributes:
      name: Its name.
      shape: Its sizes, the one that changes fastest first.
      kind: Number of its type, see `gguf.GGMLQuantizationType`.
      offset: Its first byte, counted from the beginning of the data.
    """

    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int


@dataclass(frozen=True)
class Header:
    """What stands before a file's weights.

    Attributes:
      values: The single values by name, e.g. "general.architecture"; no arrays.
      types: Number of tensors by the name of their type, the most frequent first.
      elements: Number of weights in all tensors.
    """

    values: dict[str, Any]
    types: dict[str, int]
    elements: int

    @property
    def types_in_words(self) -> str:
        """The types, e.g. "Q4_1 (210 tensors), F32 (61), Q8_0 (1)"."""
        texts = [f"{name} ({count})" for name, count in self.types.items()]
        return ", ".join(texts).replace(")", " tensors)", 1)


def is_gguf(path: Path) -> bool:
    """Return whether a path names a GGUF file."""
    return path.suffix.lower() == SUFFIX and not path.is_dir()


def load_gguf(path: Path) -> tuple[Any, dict[str, Any]]:
    """Return a language model of transformers in float32, and what its loader says about it.

    Raises:
      CheckpointError: The file is damaged, or transformers cannot load its architecture.
      MissingDependencyError: transformers, gguf or accelerate is not installed.
    """
    transformers = import_transformers()
    _import_gguf()
    header = read_header(path)
    options = {"gguf_file": path.name, "local_files_only": True}
    try:
        config = transformers.AutoConfig.from_pretrained(path.parent, **options)
        _check_config(config, header, path)
        with _without_bar():
            loaded = transformers.AutoModelForCausalLM.from_pretrained(
                path.parent,
                **options,
                trust_remote_code=False,
                dtype=torch.float32,
                attn_implementation="eager",
                output_loading_info=True,
            )
    except CheckpointError:
        raise
    except Exception as error:  # transformers and gguf raise exceptions of many unrelated classes
        raise _unreadable(path, f"transformers {transformers.__version__}", error) from None
    causal, information = loaded
    # What it describes is over: the weights are float32 now.
    del causal.config.quantization_config
    return causal, information


def save_gguf_tokenizer(path: Path, folder: Path) -> None:
    """Write the tokenizer of a GGUF file as transformers makes it: tokenizer.json and its settings.

    Args:
      path: The file.
      folder: Folder to write.

    Raises:
      CheckpointError: The file has no tokenizer that transformers can make.
      MissingDependencyError: transformers or gguf is not installed.
    """
    transformers = import_transformers()
    _import_gguf()
    header = read_header(path)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            path.parent, gguf_file=path.name, local_files_only=True, trust_remote_code=False
        )
        _split_as_the_file_says(tokenizer, header, path)
        tokenizer.save_pretrained(folder)
    except Exception as error:  # transformers and gguf raise exceptions of many unrelated classes
        raise _unreadable(path, "its tokenizer", error) from None


def read_header(path: Path) -> Header:
    """Read the header of a GGUF file, and check that all that it speaks of lies in the file.

    Raises:
      CheckpointError: The file cannot be opened, is truncated, or is no GGUF file.
      MissingDependencyError: The package gguf is not installed.
    """
    gguf = _import_gguf()
    with open_regular(path, CheckpointError) as file:
        size = file.seek(0, 2)
        if size < 24 or _read_start(file) != _MAGIC:
            raise _damaged(path, "it does not begin with 'GGUF'")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            reader = _Reader(path, data)
            values = reader.values()
            tensors = list(reader.tensors())
            start = reader.data_start(values)
    names = Counter(_kind_name(gguf, path, tensor) for tensor in tensors)
    _check_places(gguf, path, tensors, size - start)
    elements = sum(prod(tensor.shape) for tensor in tensors)
    return Header(values, dict(names.most_common()), elements)


def _read_start(file: Any) -> bytes:
    file.seek(0)
    return bytes(file.read(4))


class _Reader:
    """Reads a header front to back."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self._path, self._data = path, data
        self._at = 4
        (version,) = self._take("I")
        if version not in _VERSIONS:
            raise _damaged(path, f"its version is {version}; expected 2 or 3")
        self._tensors, self._keys = self._take("QQ")
        for what, count, most in (
            ("tensors", self._tensors, _MOST_TENSORS),
            ("keys", self._keys, _MOST_KEYS),
        ):
            if count > most:
                raise _damaged(path, f"it claims {count} {what}; expected at most {most}")

    def values(self) -> dict[str, Any]:
        """Return the single values by name, and pass over the arrays."""
        values: dict[str, Any] = {}
        for _ in range(self._keys):
            key = self._string("the name of a key", _LONGEST_NAME)
            if key in values:
                raise _damaged(self._path, f"the key {shown(key)} stands in it twice")
            (kind,) = self._take("I")
            values[key] = self._value(key, kind)
        return values

    def tensors(self) -> Iterator[Tensor]:
        """Return the places of the tensors."""
        names = set()
        for _ in range(self._tensors):
            name = self._string("the name of a tensor", _LONGEST_NAME)
            (dimensions,) = self._take("I")
            if dimensions > _MOST_DIMENSIONS or name in names:
                raise _damaged(
                    self._path,
                    f"tensor {shown(name)} has {dimensions} dimensions"
                    if dimensions > _MOST_DIMENSIONS
                    else f"tensor {shown(name)} stands in it twice",
                )
            names.add(name)
            shape = self._take("Q" * dimensions)
            kind, offset = self._take("IQ")
            if max(prod(shape), offset) > _LARGEST_SIZE:
                raise _damaged(self._path, f"tensor {shown(name)} has the sizes {shape}")
            yield Tensor(name, shape, kind, offset)

    def data_start(self, values: dict[str, Any]) -> int:
        """Return the first byte of the tensors' data."""
        alignment = values.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 1 <= alignment <= 1 << 20:
            raise _damaged(self._path, f"general.alignment is {shown(alignment)}")
        return -(-self._at // alignment) * alignment

    def _value(self, key: str, kind: int) -> Any:
        if kind == _STRING:
            return self._string(shown(key), _LONGEST_STRING)
        if kind == _ARRAY:
            return self._skip_array(key)
        if kind not in _SCALARS:
            raise _damaged(self._path, f"the value of {shown(key)} has the unknown type {kind}")
        return self._take(_SCALARS[kind])[0]

    def _skip_array(self, key: str) -> None:
        kind, count = self._take("IQ")
        if kind in _SCALARS:
            self._skip(count * struct.calcsize(f"<{_SCALARS[kind]}"), shown(key))
        elif kind == _STRING and count <= _MOST_STRINGS:
            for _ in range(count):
                (length,) = self._take("Q")
                self._skip(length, shown(key))
        else:
            raise _damaged(self._path, f"{shown(key)} is an array of {count} values of type {kind}")

    def _string(self, what: str, longest: int) -> str:
        (length,) = self._take("Q")
        if length > longest:
            raise _damaged(self._path, f"{what} is {length} bytes long")
        start = self._at
        self._skip(length, what)
        return self._data[start : self._at].decode("utf-8", "replace")

    def _take(self, letters: str) -> tuple[Any, ...]:
        start = self._at
        self._skip(struct.calcsize(f"<{letters}"), "the header")
        return struct.unpack_from(f"<{letters}", self._data, start)

    def _skip(self, count: int, what: str) -> None:
        if count > len(self._data) - self._at:
            raise _damaged(self._path, f"it is truncated: {what} goes beyond its end")
        self._at += count


def _kind_name(gguf: Any, path: Path, tensor: Tensor) -> str:
    try:
        return str(gguf.GGMLQuantizationType(tensor.kind).name)
    except ValueError:
        raise _damaged(
            path,
            f"tensor {shown(tensor.name)} has the type {tensor.kind}, which gguf does not know",
        ) from None


def _check_places(gguf: Any, path: Path, tensors: list[Tensor], available: int) -> None:
    """Check that the tensors lie in the data, and that no bytes are used again and again."""
    total = 0
    for tensor in tensors:
        per_block, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(tensor.kind)]
        size = -(-prod(tensor.shape) // per_block) * block_bytes
        total += size
        if tensor.offset + size > available:
            raise _damaged(
                path,
                f"it is truncated: tensor {shown(tensor.name)} ends {tensor.offset + size} bytes "
                f"after the header, but the file ends after {max(available, 0)}",
            )
    if total > available:
        raise _damaged(path, "its tensors overlap")


@contextlib.contextmanager
def _without_bar() -> Iterator[None]:
    """Context in which the loader shows no progress bar, which transformers' switch leaves on."""
    loader = importlib.import_module("transformers.modeling_gguf_pytorch_utils")
    bar = getattr(loader, "tqdm", None)
    if bar is not None:
        loader.tqdm = functools.partial(bar, disable=True)  # type: ignore[attr-defined] # see above
    try:
        yield
    finally:
        if bar is not None:
            loader.tqdm = bar  # type: ignore[attr-defined] # see above


def _check_config(config: Any, header: Header, path: Path) -> None:
    """Refuse a configuration of a model that is much larger than the file's weights."""
    transformers = import_transformers()
    settings = json.loads(json.dumps(config.to_dict(), default=str))  # with names as keys
    check_module_counts(settings, str(path))
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    needed = sum(t.numel() for t in (*model.parameters(), *model.buffers()))
    if needed > 2 * header.elements + (1 << 20):
        raise _damaged(
            path,
            f"its keys describe a model of {needed} weights, but its tensors hold "
            f"{header.elements}",
        )


def _split_as_the_file_says(tokenizer: Any, header: Header, path: Path) -> None:
    """Split texts before merging as llama.cpp does where transformers does not know how."""
    from tokenizers import pre_tokenizers

    if header.values.get("tokenizer.ggml.model") != "gpt2":
        return
    name = header.values.get("tokenizer.ggml.pre")
    if name in _SINGLE_DIGITS:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
    elif name not in _LIKE_GPT2 and not _knows_how_to_split(name):
        _log.warning(
            "'%s' says that its tokenizer splits texts like %s, which this transformers does not "
            "know; they are split like GPT-2's. If tokens look wrong, give the folder of the "
            "original model as the backbone",
            path,
            shown(name),
        )


def _knows_how_to_split(name: Any) -> bool:
    try:
        from transformers.integrations.gguf import gguf_tokenizer_mapping as known
    except ImportError:  # before transformers 5.24
        return False
    return name in getattr(known, "GGUF_PRE_TOKENIZER_SPLITS", {})


def _import_gguf() -> Any:
    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingDependencyError(
            f"GGUF files need the package {' and the package '.join(missing)}, which "
            f"{'is' if len(missing) == 1 else 'are'} not installed; pip install 'fwl-export[gguf]'"
        )
    return importlib.import_module("gguf")


def _damaged(path: Path, problem: str) -> CheckpointError:
    return CheckpointError(
        f"'{path}' cannot be read as a GGUF file: {problem}; copy or download it again"
    )


def _unreadable(path: Path, reader: str, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"'{path}': {reader} cannot be loaded from this GGUF file ({type(error).__name__}: "
        f"{brief(error)}); give the folder of the original model as the backbone"
    )
