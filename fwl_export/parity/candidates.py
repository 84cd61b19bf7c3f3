"""Runtimes by name: `runtime[:option[:option]]`, as `check` and `bisect` take them.

onnxruntime                 ONNX Runtime, with our kernel where its library is there
onnxruntime:no-plugin       ... in standard operators; `plugin` insists on the kernel
onnxruntime:cuda            ... on the first CUDA device
onnx-reference@200          ONNX's reference evaluator, slow: for the first 200 tokens only
torch:float64               PyTorch in float64, float32 or float16; `torch` is the bundle's own
tensorrt:rtx                an engine; variants rtx and tensorrt
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fwl_export.bundle.manifest import Bundle
from fwl_export.errors import ConfigError
from fwl_export.machine import installed_versions
from fwl_export.plugins import ONNXRUNTIME, find_plugin
from fwl_export.runtimes import RUNTIMES, Session, open_session

REFERENCE = "torch:float64"


@dataclass(frozen=True)
class Candidate:
    """A runtime that was named.

    Attributes:
      name: as the user wrote it.
      runtime: see `open_session`.
      arguments: for `open_session`, from the options.
      tokens: after how many it need not go on; None: never.
    """

    name: str
    runtime: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    tokens: int | None = None

    def precision(self, bundle: Bundle) -> str:
        """Return "fp16", "fp32" or "fp64": what it computes in."""
        return str(self.arguments.get("precision", bundle.manifest.precision))

    def open(self, bundle: Bundle, batch: int, threads: int | None = None) -> Session:
        """Open the bundle in it.

        Args:
          bundle: that was read.
          batch: number of rows.
          threads: inside one operator, where the runtime has such a number; PyTorch's is one of
            the process, see `torch.set_num_threads`.

        Raises:
          FwlError: see `open_session`.
        """
        arguments = dict(self.arguments)
        if threads is not None and "threads" in RUNTIMES[self.runtime].takes:
            arguments["threads"] = threads
        return open_session(bundle, self.runtime, batch, **arguments)

    def describe(self) -> str:
        """Return in words what runs."""
        versions = [
            f"{p} {v}" for p, v in installed_versions(RUNTIMES[self.runtime].packages).items()
        ]
        words = [versions[0] if versions else self.runtime]
        if self.runtime == "onnxruntime":
            library = find_plugin(ONNXRUNTIME, self.arguments.get("plugin", "auto"))
            words.append(f"plugin {library.name}" if library else "standard operators")
        if self.runtime == "onnx-reference":
            words.append("reference evaluator")
        words += [
            str(self.arguments[key]) for key in ("device", "variant") if key in self.arguments
        ]
        return ", ".join(words)


def parse_candidate(text: str) -> Candidate:
    """Return the runtime of a name such as "onnxruntime:no-plugin" or "onnx-reference@200".

    Raises:
      ConfigError: there is no such runtime or option, or two options exclude each other.
    """
    found = re.fullmatch(r"([^@]*)(?:@(\d+))?", text.strip())
    name, *options = (found[1] if found else text).split(":")
    if found is None or name not in RUNTIMES:
        raise ConfigError(
            f"'{text}' is no runtime; expected {', '.join(RUNTIMES)}, then options after colons "
            "and, to stop it early, a number of tokens, say onnx-reference@200"
        )
    known = RUNTIMES[name].candidate_options
    arguments: dict[str, Any] = {}
    for option in options:
        added = known.get(option)
        if added is None:
            choices = ", ".join(known) or "none"
            raise ConfigError(f"'{text}': {name} has no option '{option}'; it has: {choices}")
        if arguments.keys() & added.keys():
            raise ConfigError(f"'{text}': two of its options say the same thing; give one")
        arguments |= added
    tokens = int(found[2]) if found[2] else None
    if tokens == 0:
        raise ConfigError(f"'{text}': 0 tokens; expected 1 or more after the @")
    return Candidate(text.strip(), name, arguments, tokens)


def parse_candidates(text: str | Sequence[str]) -> list[Candidate]:
    """Return the runtimes of a list of names, or of one text with commas between them.

    Raises:
      ConfigError: the list is empty, names one twice, or see `parse_candidate`.
    """
    names = text.split(",") if isinstance(text, str) else list(text)
    candidates = [parse_candidate(name) for name in names if name.strip()]
    if not candidates:
        raise ConfigError("no candidate was named; expected, say, onnxruntime,torch:float32")
    seen: set[str] = set()
    for candidate in candidates:
        if candidate.name in seen:
            raise ConfigError(f"'{candidate.name}' is named twice; name every runtime once")
        seen.add(candidate.name)
    return candidates
