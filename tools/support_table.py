"""Write the table of Hugging Face architectures: export, check and build each of them.

python -m tools.support_table            all architectures, about 40 s each; writes the page
python -m tools.support_table Llama OPT  some of them; prints their rows

Tiny random models (tests/backbones.py) stand for the architectures, so nothing is downloaded. What
fails becomes "no" in the table, with the reason on standard error.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from fwl_export.bundle.config import HuggingFaceConfig
from fwl_export.bundle.manifest import Bundle
from fwl_export.engines import build_engines
from fwl_export.errors import FwlError
from fwl_export.export import export_bundle
from fwl_export.files import replaced_file
from fwl_export.model.checkpoint import save_checkpoint
from fwl_export.model.language_model import FWLModel
from fwl_export.parity import check_bundle
from tests.backbones import ARCHITECTURES, LIMIT, VOCABULARY, tiny_pretrained
from tests.bundles import tiny_tokenizer

PAGE = Path(__file__).parents[1] / "docs" / "howto" / "bring-your-model.md"
BEGIN = "<!-- written by python -m tools.support_table -->"
END = "<!-- end of the support table -->"
HEADER = ("architecture", "attention", "reads", "exported", "checked", "RTX SM 89")

_TOKENS = 400
_MAX_TOKENS = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="an architecture of tests/backbones.py"
    )
    names = parser.parse_args().names
    rows = []
    for name in names or ARCHITECTURES:
        rows.append(row(name))
        print(line(rows[-1]), flush=True)
    if not names:
        text = replaced_table(PAGE.read_text(encoding="utf-8"), rows)
        with replaced_file(PAGE) as path:
            path.write_text(text, encoding="utf-8")


def row(name: str) -> tuple[str, ...]:
    """Export, check and build an architecture; return the cells of its row."""
    model = tiny_pretrained(name)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "checkpoint"
        save_checkpoint(checkpoint, model, tiny_tokenizer(VOCABULARY))
        bundles: list[Bundle] = []

        def export() -> bool:
            bundles.append(
                export_bundle(checkpoint, Path(folder) / "bundle", max_tokens=_MAX_TOKENS)
            )
            return True

        exported = _attempt(name, export)
        checked = _attempt(name, lambda: _check(bundles[0])) if bundles else "no"
        built = _attempt(name, lambda: _build(bundles[0])) if bundles else "no"
    return (f"{name} (`{ARCHITECTURES[name][0]}`)", *described(model), exported, checked, built)


def described(model: FWLModel) -> tuple[str, str]:
    """Return which attention the layers have, and how far a session can read."""
    config = model.config.backbone
    assert isinstance(config, HuggingFaceConfig)
    kinds = sorted({kind.removesuffix("_attention") for kind in model.backbone.layer_types})
    if not config.max_positions:
        return " and ".join(kinds), "without end"
    slides = _attempt("", lambda: bool(FWLModel.from_pretrained(_copy(model), slide=True)))
    return " and ".join(kinds), (
        "the context, or any length with `--slide`" if slides == "yes" else "to its last position"
    )


def _copy(model: FWLModel) -> object:
    """Return a language model of transformers with the same architecture."""
    from fwl_export.model.backbones.huggingface import causal_model

    assert isinstance(model.config.backbone, HuggingFaceConfig)
    return causal_model(model.config.backbone.model)


def replaced_table(text: str, rows: Iterable[tuple[str, ...]]) -> str:
    """Return the document with the table between `BEGIN` and `END` replaced."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    lines = [line(HEADER), "|---" * len(HEADER) + "|", *map(line, rows)]
    return "\n".join([before + BEGIN, *lines, END + after])


def line(cells: tuple[str, ...]) -> str:
    """Return a row of the table in Markdown."""
    return "| " + " | ".join(cells) + " |"


def _attempt(name: str, action: Callable[[], bool]) -> str:
    try:
        return "yes" if action() else "no"
    except FwlError as error:
        if name:
            print(f"{name}: {error}", file=sys.stderr)
        return "no"


def _check(bundle: Bundle) -> bool:
    ids = np.random.default_rng(0).integers(0, VOCABULARY, max(_TOKENS, LIMIT) + 1)
    report = check_bundle(bundle, ids, _TOKENS)
    print(*report.problems(), sep="\n", end="", file=sys.stderr)
    return report.passed


def _build(bundle: Bundle) -> bool:
    return len(build_engines(bundle, sms=[89], plugin="none", max_batch=2)) == 1


if __name__ == "__main__":
    main()
