"""`fwl-export demo`: every step from checkpoint to score, on the model that ships."""

from __future__ import annotations

import contextlib
import json as json_module
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fwl_export.bundle.defaults import DEFAULT_SMS
from fwl_export.cli.build import SMS, build
from fwl_export.cli.check import check
from fwl_export.cli.export import export
from fwl_export.cli.options import JsonOption, list_completion
from fwl_export.cli.score import score_both, to_dict
from fwl_export.cli.terminal import heading, print_json, size

if TYPE_CHECKING:
    from fwl_export.runtimes.text import Score

_STEPS = 4


def demo(
    output: Annotated[
        Path,
        typer.Option("--output", "-o", help="Bundle folder to write; an earlier one is replaced."),
    ] = Path("demo-bundle"),
    sm: Annotated[
        str,
        typer.Option(
            metavar="LIST",
            help="GPU architectures to build engines for, separated by commas.",
            autocompletion=list_completion(map(str, DEFAULT_SMS)),
        ),
    ] = SMS,
    json: JsonOption = False,
) -> None:
    """Try everything on the model that ships.

    Exports it, builds engines, checks that the bundle computes what PyTorch computes, and scores
    a play that the model never saw. Takes about a minute and needs no GPU.

    Example:
      fwl-export demo
    """
    from fwl_export.demo import HELD_OUT_PLAY

    began = time.perf_counter()
    # With --json, what the steps print is progress, so it goes to standard error.
    steps_print_to = sys.stderr if json else sys.stdout
    with contextlib.redirect_stdout(steps_print_to):
        scores = _run_steps(output, sm, HELD_OUT_PLAY)
    seconds = time.perf_counter() - began
    if json:
        print_json(_to_dict(output, HELD_OUT_PLAY, seconds, *scores))
        return
    heading(f"\nSummary, after {seconds:.0f} s")
    for line in _summary(output, HELD_OUT_PLAY, *scores):
        print(f"  {line}")


def _run_steps(output: Path, sm: str, play: Path) -> tuple[Score, Score]:
    _title(1, f"export demo -o {output} --force")
    export(output, "demo", force=True)
    _title(2, f"build {output} --sm {sm}")
    build(output, sm=sm)
    _title(3, f"check {output}")
    check(output)
    _title(4, f"score {output} {play.name}")
    return score_both(output, play, "onnxruntime")


def _title(number: int, command: str) -> None:
    heading(f"\n[{number}/{_STEPS}] fwl-export {command}")


def _read_report(output: Path) -> Any:
    from fwl_export.bundle.manifest import REPORTS_FOLDER

    path = output / REPORTS_FOLDER / "parity.json"
    return json_module.loads(path.read_text(encoding="utf-8"))


def _largest_use(report: Any) -> float:
    """Return the largest share of an error budget that any candidate used."""
    return float(max(candidate["use"] for candidate in report["candidates"]))


def _to_dict(output: Path, play: Path, seconds: float, on: Score, off: Score) -> dict[str, Any]:
    from fwl_export.bundle.manifest import read_bundle

    report = _read_report(output)
    files = read_bundle(output).manifest.files
    return {
        "bundle": str(output),
        "engines": [name for name in files if name.endswith(".engine")],
        "parity": {"passed": report["passed"], "use": _largest_use(report)},
        "score": {"file": play.name, **to_dict("onnxruntime", on, off)},
        "seconds": seconds,
    }


def _summary(output: Path, play: Path, on: Score, off: Score) -> list[str]:
    """Return what the demo showed; the parity figures are those of its report."""
    from fwl_export.bundle.manifest import read_bundle

    manifest = read_bundle(output).manifest
    report = _read_report(output)
    engines = [name for name in manifest.files if name.endswith(".engine")]
    state = sum(spec.bytes_per_row for spec in manifest.state)
    calls = report["coverage"]["calls"]
    return [
        f"bundle    {output}: ONNX opset {manifest.opset}, {manifest.precision}, state "
        f"{size(state)} per text",
        f"engines   {len(engines)} TensorRT-RTX, built here and not run: that takes a GPU",
        f"parity    ONNX Runtime against PyTorch: {calls} calls, logits and every",
        f"          state tensor within {_largest_use(report):.0%} of the error budget",
        f"reading   {play.name}, {on.tokens} tokens it never saw:",
        f"          perplexity {on.perplexity:.2f} adapting, {off.perplexity:.2f} with adaptation "
        "off",
        f"speed     {on.tokens_per_second:.0f} tokens/s adapting, ONNX Runtime on this CPU",
        f"next      fwl-export inspect {output}",
        f'          fwl-export generate {output} --prompt "LEONTES." --seed 1',
        f"          fwl-export score {output} YOUR_TEXT_FILE",
    ]
