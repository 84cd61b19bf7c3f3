"""`fwl-export bisect`: which tensor is the first that differs from what PyTorch computes?"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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
from fwl_export.cli.texts import checked_ids, shown_name
from fwl_export.runtimes.registry import RUNTIMES

if TYPE_CHECKING:
    from fwl_export.bisect import Bisection
    from fwl_export.bundle.manifest import Bundle
    from fwl_export.parity import Candidate

# Repeated here because `fwl_export.bisect` loads NumPy; a test compares the two.
DEFAULT_TOKENS = 576
DEFAULT_CASES = ",".join(CASES)

_GRAPH_RUNTIMES = tuple(name for name, runtime in RUNTIMES.items() if runtime.runs_graph)


def bisect(
    bundle: BundleArgument,
    candidate: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Runtime to search, with its options after colons: onnxruntime, "
            "onnxruntime:no-plugin or onnx-reference.",
            show_default="those of `check`",
            autocompletion=completion(*_GRAPH_RUNTIMES, "onnxruntime:no-plugin"),
        ),
    ] = None,
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
            help="Cases of `check`, separated by commas, read in turn until it fails.",
            show_default="those of `check`",
            autocompletion=list_completion(CASES),
        ),
    ] = DEFAULT_CASES,
    seed: SeedOption = 0,
    report: Annotated[
        Path | None,
        typer.Option(
            help="Report of a check that failed, whose calls are made again in place of a new "
            "check. Its text, tokens, cases and seed are taken.",
        ),
    ] = None,
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

    Runs `check` until a case fails, and makes the calls of that case one by one until one goes
    wrong. That call is repeated with every tensor of the ONNX graph as an output, and each is
    compared with PyTorch in float64. The nodes that compute the first wrong tensor are written as a
    program of their own, the reproducer. If the graph is right, the session is searched.

    If `check` passes but the bundle's reports/parity.json says that it failed, the calls of that
    report are made again.

    Exit code 0: nothing is wrong; 1: a fault was found; 2: the search could not run; 3: a check
    failed, and bisect cannot explain it.

    Example:
      fwl-export bisect demo-bundle --candidate onnxruntime:no-plugin
    """
    from fwl_export.errors import CheckError, FwlError

    target = reproducer or bundle / "reports" / "bisect"
    try:
        chosen = _candidate(candidate, plugin)
        _check_folder(target)
        found = _search(bundle, chosen, text, tokens, cases, seed, report, target)
    except FwlError as error:
        raise CheckError(str(error)) from None
    if json:
        print_json(found.to_dict())
    else:
        print("\n".join(map(_wrapped, found.to_text().splitlines())))
        print(f"{found.seconds:.0f} s")
    if found.exit_code:
        raise typer.Exit(found.exit_code)


def _wrapped(line: str) -> str:
    """Return a line of the result at most 80 columns wide; a command stays whole."""
    if line.startswith("reproduce"):
        return line
    indent = " " * 11  # the width of the labels
    return textwrap.fill(line, COLUMNS, subsequent_indent=indent, break_on_hyphens=False)


def _candidate(name: str | None, plugin: Path | None) -> Candidate | None:
    from fwl_export.errors import ConfigError
    from fwl_export.parity.candidates import parse_candidate

    if name is None and plugin is None:
        return None
    chosen = parse_candidate(name or "onnxruntime")
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
    candidate: Candidate | None,
    text: Path | None,
    tokens: int,
    cases: str,
    seed: int,
    report: Path | None,
    reproducer: Path,
) -> Bisection:
    from fwl_export.bisect import bisect_bundle
    from fwl_export.bundle.manifest import read_bundle
    from fwl_export.demo import HELD_OUT_PLAY
    from fwl_export.parity.cases import ModelLimits, choose_cases
    from fwl_export.parity.report.data import read_report
    from fwl_export.runtimes.text import bundle_tokenizer

    opened = read_bundle(bundle)
    source = text or HELD_OUT_PLAY
    ids = checked_ids(source, bundle_tokenizer(opened), tokens, cases)
    if report is not None:
        return bisect_bundle(
            opened, ids, candidate, reproducer=reproducer, report=read_report(report)
        )
    planned = choose_cases(cases, tokens, ModelLimits.of(opened.manifest), seed)
    with progress_bar("bisect", sum(case.tokens for case in planned)) as advance:
        found = bisect_bundle(
            opened,
            ids,
            candidate,
            tokens,
            seed,
            reproducer,
            shown_name(source),
            planned,
            advance=advance,
        )
    earlier = None if found.check else _failed_earlier(opened, candidate)
    if earlier is not None:
        return bisect_bundle(opened, ids, candidate, reproducer=reproducer, report=earlier)
    return replace(found, cases=cases)


def _failed_earlier(bundle: Bundle, candidate: Candidate | None) -> Mapping[str, Any] | None:
    """Return the bundle's report of a check if a candidate that can be searched failed in it."""
    from fwl_export.bisect.reported import first_reported
    from fwl_export.bundle.manifest import REPORTS_FOLDER
    from fwl_export.errors import FwlError
    from fwl_export.parity.report.data import read_report

    path = bundle.folder / REPORTS_FOLDER / "parity.json"
    if not path.is_file():
        return None
    try:
        report = read_report(path)
        names = [candidate.name] if candidate else [*report["settings"]["candidates"]]
        names = [name for name in names if name.partition(":")[0] in _GRAPH_RUNTIMES]
        same = report["bundle"]["model_id"] == bundle.manifest.model_id
        return report if same and first_reported(report, names) else None
    except FwlError:  # a report of something else is none of this one
        return None
