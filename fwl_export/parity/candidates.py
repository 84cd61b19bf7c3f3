"""Candidates: runtimes under check, named `runtime[:option...][@tokens]` in `check` and `bisect`.

    onnxruntime               ONNX Runtime, with the plugin's kernel if the library is there
    onnxruntime:no-plugin     ... in standard operators; `:plugin` requires the kernel
    onnxruntime:cuda          ... on the first CUDA device
    onnx-reference@200        ONNX's reference evaluator, which is slow: the first 200 tokens only
    torch:float64             PyTorch in float64, float32 or float16; `torch` alone is the bundle's
    tensorrt:rtx              an engine of the variant rtx (TensorRT-RTX) or tensorrt

The options of each runtime come from the table in `fwl_export.runtimes.registry`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fwl_export.bundle.manifest import Bundle
from fwl_export.deprecations import renamed_attributes
from fwl_export.errors import ConfigError
from fwl_export.machine import installed_versions
from fwl_export.plugins import ONNXRUNTIME, find_plugin
from fwl_export.runtimes import RUNTIMES, Session, open_session

REFERENCE = "torch:float64"


@dataclass(frozen=True)
class Candidate:
    """A runtime under check, with its options.

    Attributes:
      name: Name as the user wrote it.
      runtime: Name of the runtime, see `open_session`.
      arguments: Further arguments of `open_session` that the options stand for.
      tokens: Number of tokens after which it may stop; None means that it reads everything.
    """

    name: str
    runtime: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    tokens: int | None = None

    def precision(self, bundle: Bundle) -> str:
        """Return the precision in which it computes, e.g. "fp32"; by default the bundle's own.

        Args:
          bundle: Bundle to be checked.
        """
        return str(self.arguments.get("precision", bundle.manifest.precision))

    def open(self, bundle: Bundle, batch: int, threads: int | None = None) -> Session:
        """Open a session in this runtime.

        Args:
          bundle: Bundle to be checked.
          batch: Number of rows.
          threads: Threads inside one operator, for runtimes that take such a number. PyTorch's
            number belongs to the process, see `torch.set_num_threads`.

        Raises:
          FwlError: The session cannot be opened; see `open_session` for the classes.
        """
        arguments = dict(self.arguments)
        if threads is not None and "threads" in RUNTIMES[self.runtime].takes:
            arguments["threads"] = threads
        return open_session(bundle, self.runtime, batch, **arguments)

    def describe(self) -> str:
        """Return what runs, in words, e.g. "onnxruntime 1.22.0, plugin libfwl_ort.so"."""
        installed = installed_versions(RUNTIMES[self.runtime].packages)
        versions = [f"{package} {version}" for package, version in installed.items()]
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
    """Return the candidate with a name such as "onnxruntime:no-plugin" or "onnx-reference@200".

    Raises:
      ConfigError: There is no such runtime or option, or two options contradict each other.
    """
    found = re.fullmatch(r"([^@]*)(?:@(\d+))?", text.strip())
    name, *options = (found[1] if found else text).split(":")
    if found is None or name not in RUNTIMES:
        raise ConfigError(
            f"'{text}' is not a runtime; expected {', '.join(RUNTIMES)}, then options after colons "
            "and, to stop it early, a number of tokens, for example onnx-reference@200"
        )
    known = RUNTIMES[name].candidate_options
    arguments: dict[str, Any] = {}
    for option in options:
        added = known.get(option)
        if added is None:
            choices = ", ".join(known) or "none"
            raise ConfigError(f"'{text}': {name} has no option '{option}'; it has: {choices}")
        if arguments.keys() & added.keys():
            raise ConfigError(f"'{text}': two of its options set the same thing; give only one")
        arguments |= added
    tokens = int(found[2]) if found[2] else None
    if tokens == 0:
        raise ConfigError(f"'{text}': the number of tokens is 0; expected 1 or more after the @")
    return Candidate(text.strip(), name, arguments, tokens)


def parse_candidates(text: str | Sequence[str | Candidate]) -> list[Candidate]:
    """Return the candidates of a list of names.

    Args:
      text: Names, as a list or as one string that separates them by commas. Candidates in the list
        stay as they are.

    Raises:
      ConfigError: There are no names, a name occurs twice, or a name is wrong, see
        `parse_candidate`.
    """
    names = text.split(",") if isinstance(text, str) else list(text)
    candidates = [
        name if isinstance(name, Candidate) else parse_candidate(name)
        for name in names
        if isinstance(name, Candidate) or name.strip()
    ]
    if not candidates:
        raise ConfigError(
            "no candidate was named; expected, for example, onnxruntime,torch:float32"
        )
    seen: set[str] = set()
    for candidate in candidates:
        if candidate.name in seen:
            raise ConfigError(f"'{candidate.name}' is named twice; name every candidate once")
        seen.add(candidate.name)
    return candidates


def missing_library(candidates: Sequence[Candidate]) -> str:
    """Return a sentence if a candidate runs without a library that it would use, or "".

    Args:
      candidates: Candidates of a check, of which some may run with the plugin's kernel.
    """
    named = [candidate.name for candidate in candidates if _would_use_plugin(candidate)]
    if not named:
        return ""
    return (
        f"{', '.join(named)}: the update runs in standard operators, since {ONNXRUNTIME}, the "
        "library with our kernel, is not installed; `make plugins` builds it"
    )


def twin(candidate: Candidate, others: Sequence[Candidate]) -> str | None:
    """Return why a candidate would only repeat another one, for want of a library, or None.

    Args:
      candidate: Candidate that was named.
      others: All candidates that were named.
    """
    if not _would_use_plugin(candidate):
        return None
    same = {**candidate.arguments, "plugin": "none"}
    for other in others:
        if other.runtime == candidate.runtime and dict(other.arguments) == same:
            return (
                f"{ONNXRUNTIME}, the library with our kernel, is not installed, so that it would "
                f"be the same as {other.name}; build it with `make plugins`, or leave "
                f"{candidate.name} out"
            )
    return None


def _would_use_plugin(candidate: Candidate) -> bool:
    """Return whether a candidate uses the plugin where its library is installed, and it is not."""
    is_auto = candidate.arguments.get("plugin", "auto") == "auto"
    return candidate.runtime == "onnxruntime" and is_auto and find_plugin(ONNXRUNTIME) is None


__getattr__ = renamed_attributes(
    __name__,
    Backend="Candidate",
    parse_backend="parse_candidate",
    parse_backends="parse_candidates",
)
