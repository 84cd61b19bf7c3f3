"""Texts that SmolLM2 has not been trained on: those of packages that were released in 2026.

They come from the packages that `make install` has installed here, so nothing is shipped or
fetched, and with the versions in constraints.txt they are the same everywhere.
"""

from __future__ import annotations

import re
from importlib import metadata
from pathlib import Path

# Packages whose description on the package index is read, and modules whose source is read.
DOCS = (
    "httpcore2",
    "httpx2",
    "huggingface_hub",
    "onnxscript",
    "pydantic",
    "rich",
    "scikit-build-core",
    "torch",
    "transformers",
    "typer",
)
CODE = (
    "httpx2/_urlparse.py",
    "httpx2/websockets/_api.py",
    "huggingface_hub/_buckets.py",
    "huggingface_hub/_upload_pipeline.py",
    "huggingface_hub/cli/_city_game.py",
    "huggingface_hub/utils/_hf_uris.py",
    "onnx_ir/external_data.py",
    "transformers/integrations/gguf/gguf_tokenizer_mapping.py",
)
# The packages of the modules, where they are called otherwise.
_PACKAGES = {"onnx_ir": "onnx-ir"}


# What is no prose in Markdown, and what takes its place.
_NO_PROSE = [
    (re.compile(pattern, flags), replacement)
    for pattern, flags, replacement in (
        (r"^[ >]*(```|~~~).*?^[ >]*\1[^\n]*$", re.MULTILINE | re.DOTALL, ""),  # blocks of code
        (r"<!--.*?-->|<[^>]*>", re.DOTALL, ""),  # HTML
        (r"!\[[^\]]*\](\([^)]*\)|\[[^\]]*\])", 0, ""),  # pictures
        (r"\[([^\]]*)\](\([^)]*\)|\[[^\]]*\])", 0, r"\1"),  # links
        (r"^ *(\||\[[^\]]*\]:).*$", re.MULTILINE, ""),  # tables, addresses
        (r"https?://\S+", 0, ""),
        (r"\n\s*\n", 0, "\n\n"),
    )
]


class MissingTextError(Exception):
    """A package is not installed, or another version of it has no such text."""


def docs(name: str) -> str:
    """Return the prose of an installed package's description: no code, tables, badges or addresses.

    Raises:
      MissingTextError: It is not installed, or has no description.
    """
    text = str(_distribution(name).metadata.get_payload())
    for pattern, replacement in _NO_PROSE:
        text = pattern.sub(replacement, text)
    if not text.strip():
        raise MissingTextError(f"the package {name} has no description")
    return text.strip() + "\n"


def code(module: str) -> str:
    """Return the source of a module of an installed package, e.g. "httpx2/_urls.py".

    Raises:
      MissingTextError: Its package is not installed, or has no such module.
    """
    top = module.partition("/")[0]
    package = _distribution(_PACKAGES.get(top, top))
    path = Path(str(package.locate_file(module)))
    if not path.is_file():
        raise MissingTextError(f"{package.name} {package.version} has no module {module}")
    return path.read_text(encoding="utf-8")


def versions() -> dict[str, str]:
    """Return the versions of the packages whose texts are read, by name."""
    tops = (module.partition("/")[0] for module in CODE)
    names = {*DOCS, *(_PACKAGES.get(top, top) for top in tops)}
    return {name: _distribution(name).version for name in sorted(names)}


def _distribution(name: str) -> metadata.Distribution:
    try:
        return metadata.distribution(name)
    except metadata.PackageNotFoundError:
        raise MissingTextError(
            f"the package {name}, whose text is read, is not installed; run make install"
        ) from None
