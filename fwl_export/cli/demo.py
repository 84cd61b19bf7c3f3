"""`fwl-export demo`: the whole way on the model that ships, as a newcomer would go it."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fwl_export.cli.build import build
from fwl_export.cli.check import check
from fwl_export.cli.export import export
from fwl_export.cli.score import score_both
from fwl_export.cli.terminal import size

if TYPE_CHECKING:
    from fwl_export.runtimes.text import Score

_STEPS = 4


def demo(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Bundle folder to write; replaced if there.")
    ] = Path("demo-bundle"),
    sm: Annotated[str, typer.Option(help="GPU architectures to build engines for.")] = (
        "80,86,89,120"
    ),
) -> None:
    """Go the whole way on the model that ships.

    Export it, build engines, check parity, and score a play it never saw.

    Example: fwl-export demo
    """
    from fwl_export.demo import HELD_OUT_PLAY

    began = time.perf_counter()
    _title(1, f"export demo -o {output} --force")
    export(output, "demo", force=True)
    _title(2, f"build {output} --sm {sm}")
    build(output, sm=sm)
    _title(3, f"check {output}")
    check(output)
    _title(4, f"score {output} {HELD_OUT_PLAY.name}")
    scores = score_both(output, HELD_OUT_PLAY, "onnxruntime")
    typer.secho(f"\nSummary, after {time.perf_counter() - began:.0f} s", bold=True)
    for line in _summary(output, HELD_OUT_PLAY, *scores):
        print(f"  {line}")


def _title(number: int, command: str) -> None:
    typer.secho(f"\n[{number}/{_STEPS}] fwl-export {command}", bold=True)


def _summary(output: Path, play: Path, on: Score, off: Score) -> list[str]:
    """Return what the demo showed; the parity figures are those of its report."""
    from fwl_export.bundle.manifest import REPORTS_FOLDER, read_bundle

    manifest = read_bundle(output).manifest
    report = json.loads((output / REPORTS_FOLDER / "parity.json").read_text(encoding="utf-8"))
    engines = [name for name in manifest.files if name.endswith(".engine")]
    state = sum(spec.bytes_per_row for spec in manifest.state)
    most = max(candidate["use"] for candidate in report["candidates"])
    read = report["settings"]["tokens"]
    return [
        f"bundle    {output}: ONNX opset {manifest.opset}, {manifest.precision}, state "
        f"{size(state)} per text",
        f"engines   {len(engines)} TensorRT-RTX, built here and not run: that takes a GPU",
        f"parity    ONNX Runtime against PyTorch: {read} tokens, logits and every",
        f"          state tensor within {most:.0%} of the error budget",
        f"reading   {play.name}, {on.tokens} tokens it never saw:",
        f"          perplexity {on.perplexity:.2f} adapting, {off.perplexity:.2f} with adaptation "
        "off",
        f"speed     {on.tokens_per_second:.0f} tokens/s adapting, ONNX Runtime on this CPU",
        f"next      fwl-export inspect {output}",
        f'          fwl-export generate {output} --prompt "LEONTES." --seed 1',
        f"          fwl-export score {output} YOUR_TEXT_FILE",
    ]
