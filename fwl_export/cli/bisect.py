"""`fwl-export bisect`: which tensor is the first that differs from what PyTorch computes?"""

from __future__ import annotations

import textwrap
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fwl_export.cli.options import (
    CASES,
    OUTPUT,
    BundleArgument,
    JsonOption,
    SeedOption,
    TextOption,
    completion,
    list_completion,
)
from fwl_export.cli.terminal import COLUMNS, print_json, progress_bar
from fwl_export.runtimes.registry import RUNTIMES

if TYPE_CHECKING:
    from fwl_export.bisect import Bisection
    from fwl_export.parity import Candidate

# Repeated here because `fwl_export.bisect` loads NumPy; a test compares the two.
DEFAULT_TOKENS = 500
DEFAULT_CASES = "text,mixed"

_GRAPH_RUNTIMES = tuple(name for name, runtime in RUNTIMES.items() if runtime.runs_graph)


def bisect(
    bundle: BundleArgument,
    candidate: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="Runtime to search, with its options after colons: onnxruntime, "
            "onnxruntime:no-plugin or onnx-reference.",
            autocompletion=completion(*_GRAPH_RUNTIMES, "onnxruntime:no-plugin"),
        ),
    ] = "onnxruntime",
    plugin: Annotated[
        Path | None,
        typer.Option(
            help="Plugin library to run in place of the package's own.",
            show_default="the package's own",
        ),
    ] = None,
    text: TextOption = None,
    tokens: Annotated[int, typer.Option(help="Tokens of the text to read.", min=1)] = (
        DEFAULT_TOKENS
    ),
    cases: Annotated[
        str,
        typer.Option(
            metavar="LIST",
            help="Cases of `check`, separated by commas, read in turn until a call goes wrong.",
            autocompletion=list_completion(CASES),
        ),
    ] = DEFAULT_CASES,
    seed: SeedOption = 0,
    reproducer: Annotated[
        Path | None,
        typer.Option(
            help="Folder to write the reproducer to.",
            show_default="reports/bisect in the bundle",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Find the tensor in which a failed check began.

    Reads case after case until a call goes wrong, then repeats that call with every tensor of the
    ONNX graph as an output and compares each with PyTorch in float64. The nodes that compute the
    first wrong tensor are written as a program of their own, the reproducer.

    Exit code 0: nothing is wrong; 1: a fault was found; 2: the search could not run.

    Example:
      fwl-export bisect demo-bundle --candidate onnxruntime:no-plugin
    """
    from fwl_export.errors import CheckError, FwlError

    target = reproducer or bundle / "reports" / "bisect"
    try:
        chosen = _candidate(candidate, plugin)
        _check_folder(target)
        found = _search(bundle, chosen, text, tokens, cases, seed, target)
    except FwlError as error:
        raise CheckError(str(error)) from None
    if json:
        print_json(found.to_dict())
    else:
        print("\n".join(map(_wrapped, found.to_text().splitlines())))
        print(f"{found.seconds:.0f} s")
    if found.finding is not None:
        raise typer.Exit(1)


def _wrapped(line: str) -> str:
    """Return a line of the result at most 80 columns wide; a command stays whole."""
    if line.startswith("reproduce"):
        return line
    indent = " " * 11  # the width of the labels
    return textwrap.fill(line, COLUMNS, subsequent_indent=indent, break_on_hyphens=False)


def _candidate(name: str, plugin: Path | None) -> Candidate:
    from fwl_export.errors import ConfigError
    from fwl_export.parity.candidates import parse_candidate

    chosen = parse_candidate(name)
    if plugin is None:
        return chosen
    if chosen.runtime != "onnxruntime" or "plugin" in chosen.arguments:
        raise ConfigError(f"--plugin works only with candidate onnxruntime, not '{name}'")
    return replace(chosen, arguments={**chosen.arguments, "plugin": plugin})


def _check_folder(reproducer: Path) -> None:
    """Refuse to replace a folder that is not an earlier reproducer."""
    from fwl_export.errors import ConfigError

    is_filled = reproducer.exists() and any(reproducer.iterdir())
    if is_filled and not (reproducer / "repro.onnx").is_file():
        raise ConfigError(
            f"'{reproducer}' contains files that are not a reproducer; choose another folder with "
            "--reproducer"
        )


def _search(
    bundle: Path,
    candidate: Candidate,
    text: Path | None,
    tokens: int,
    cases: str,
    seed: int,
    reproducer: Path,
) -> Bisection:
    from fwl_export.bisect import bisect_bundle
    from fwl_export.bundle.manifest import read_bundle
    from fwl_export.bundle.tokenizer import read_ids
    from fwl_export.demo import HELD_OUT_PLAY
    from fwl_export.parity.cases import ModelLimits, choose_cases
    from fwl_export.runtimes.text import bundle_tokenizer

    opened = read_bundle(bundle)
    source = text or HELD_OUT_PLAY
    ids = read_ids(source, bundle_tokenizer(opened))
    planned = choose_cases(cases, tokens, ModelLimits.of(opened.manifest), seed)
    with progress_bar("bisect", sum(case.tokens for case in planned)) as advance:
        found = bisect_bundle(
            opened, ids, candidate, tokens, seed, reproducer, source.name, planned, advance=advance
        )
    return replace(found, cases=cases)
