"""`fwl-export check`: does the bundle compute what PyTorch does?"""

from __future__ import annotations

import json as json_module
import sys
from pathlib import Path
from typing import Annotated

import typer

from fwl_export.cli.terminal import BundleArgument, JsonOption, print_json, progress_bar


def check(
    bundle: BundleArgument,
    text: Annotated[
        Path | None,
        typer.Option(help="Text file to read; default: the held-out play of the package."),
    ] = None,
    tokens: Annotated[int, typer.Option(help="How far to read.", min=1)] = 2000,
    seed: Annotated[int, typer.Option(help="Of the sizes and rows of the calls.", min=0)] = 0,
    threads: Annotated[int, typer.Option(help="Of each runtime; 1 is repeatable.", min=1)] = 1,
    report: Annotated[
        Path | None,
        typer.Option(help="JSON file to write; default: reports/parity.json in the bundle."),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Check the ONNX file in ONNX Runtime against PyTorch in float32 and float64.

    Reads a text in uneven chunks, each runtime with its own state, and compares logits and
    every tensor of the state. Exit code 1 if one is outside its budget.

    Example: fwl-export check demo-bundle --tokens 2000
    """
    from fwl_export.bundle import REPORTS_FOLDER, inside, read_bundle
    from fwl_export.demo import HELD_OUT_PLAY
    from fwl_export.files import replaced_file
    from fwl_export.parity import check_bundle
    from fwl_export.runtimes.text import bundle_tokenizer
    from fwl_export.text import read_ids

    opened = read_bundle(bundle)
    source = text or HELD_OUT_PLAY
    ids = read_ids(source, bundle_tokenizer(opened))
    target = report or inside(bundle, f"{REPORTS_FOLDER}/parity.json")
    with progress_bar("check", tokens) as advance:
        result = check_bundle(
            opened, ids, tokens, seed=seed, text=source.name, threads=threads, advance=advance
        )
    with replaced_file(target) as path:
        path.write_text(json_module.dumps(result.to_dict(), indent=1) + "\n", encoding="utf-8")
    if json:
        print_json(result.to_dict())
    else:
        print(result.to_text())
        print(f"{result.seconds:.0f} s; report: {target}")
    if not result.passed:
        for problem in result.problems():
            print(f"error: {problem}", file=sys.stderr)
        print(
            "Export the bundle again and repeat the check; if it fails again, the exporter or the "
            f"runtime is at fault: the numbers to report are in {target}",
            file=sys.stderr,
        )
        raise typer.Exit(1)
