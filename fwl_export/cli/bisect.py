"""`fwl-export bisect`: which tensor is the first that is not what PyTorch computes?"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from fwl_export.cli.terminal import BundleArgument, JsonOption, print_json, progress_bar

# parity.bisect has these too; --help imports nothing heavy.
DEFAULT_TOKENS = 500
DEFAULT_CASES = "text,mixed"


def bisect(
    bundle: BundleArgument,
    candidate: Annotated[
        str, typer.Option(help="onnxruntime, onnxruntime:no-plugin or onnx-reference.")
    ] = "onnxruntime",
    plugin: Annotated[
        Path | None,
        typer.Option(help="Custom-op library to run in place of the package's own."),
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(help="Text file to read; default: the held-out play of the package."),
    ] = None,
    tokens: Annotated[int, typer.Option(help="How far to read the text.", min=1)] = DEFAULT_TOKENS,
    cases: Annotated[
        str, typer.Option(help="Cases of `check` to read, in turn, until one goes wrong.")
    ] = DEFAULT_CASES,
    seed: Annotated[int, typer.Option(help="Of the sizes and rows of the calls.", min=0)] = 0,
    reproducer: Annotated[
        Path | None,
        typer.Option(help="Folder to write; default: reports/bisect in the bundle."),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Find the cause of what `check` found: the call, the tensor, the module, the ONNX node.

    Reads case after case until a call goes wrong, runs that call with every tensor of the ONNX
    graph as an output, compares them with PyTorch's in float64 by name, and writes the nodes that
    compute the first wrong one as a program of their own. Exit code 0: nothing is wrong; 1: found;
    2: could not run.

    Example: fwl-export bisect demo-bundle --candidate onnxruntime:no-plugin
    """
    from fwl_export.errors import FwlError

    target = reproducer or bundle / "reports" / "bisect"
    try:
        found = _bisect(bundle, candidate, plugin, text, tokens, cases, seed, target, json)
    except FwlError as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
    if found:
        raise typer.Exit(1)


def _bisect(
    bundle: Path,
    candidate: str,
    plugin: Path | None,
    text: Path | None,
    tokens: int,
    cases: str,
    seed: int,
    reproducer: Path,
    json: bool,
) -> bool:
    from fwl_export.bisect import bisect_bundle
    from fwl_export.bundle.manifest import read_bundle
    from fwl_export.bundle.tokenizer import read_ids
    from fwl_export.demo import HELD_OUT_PLAY
    from fwl_export.errors import ConfigError
    from fwl_export.parity.candidates import parse_candidate
    from fwl_export.parity.cases import choose_cases
    from fwl_export.runtimes.text import bundle_tokenizer

    chosen = parse_candidate(candidate)
    if plugin is not None:
        if chosen.runtime != "onnxruntime" or "plugin" in chosen.arguments:
            raise ConfigError(f"--plugin is for candidate onnxruntime; received '{candidate}'")
        chosen = replace(chosen, arguments={**chosen.arguments, "plugin": plugin})
    if (
        reproducer.exists()
        and any(reproducer.iterdir())
        and not (reproducer / "repro.onnx").is_file()
    ):
        raise ConfigError(
            f"'{reproducer}' holds something else than a reproducer; name another folder with "
            "--reproducer"
        )
    opened = read_bundle(bundle)
    source = text or HELD_OUT_PLAY
    ids = read_ids(source, bundle_tokenizer(opened))
    manifest = opened.manifest
    limit = manifest.config.backbone.max_positions
    planned = choose_cases(cases, tokens, manifest.max_tokens, limit)
    with progress_bar("bisect", sum(case.tokens for case in planned)) as advance:
        result = bisect_bundle(
            opened, ids, chosen, tokens, seed, reproducer, source.name, planned, advance=advance
        )
    result = replace(result, cases=cases)
    if json:
        print_json(result.to_dict())
    else:
        print(result.to_text())
        print(f"{result.seconds:.0f} s")
    return result.finding is not None
