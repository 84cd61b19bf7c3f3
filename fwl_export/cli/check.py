"""`fwl-export check`: does the bundle compute what PyTorch computes?"""

from __future__ import annotations

import contextlib
import json as json_module
import shlex
import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fwl_export.cli.options import (
    CANDIDATES,
    CASES,
    OUTPUT,
    BundleArgument,
    JsonOption,
    SpecialOption,
    TextOption,
    list_completion,
)
from fwl_export.cli.terminal import note, print_json, progress_bar
from fwl_export.cli.texts import checked_ids, shown_name
from fwl_export.cli.traces import refuse_together, run_against, trusted, write_record
from fwl_export.printable import indented

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from fwl_export.bundle.manifest import Bundle
    from fwl_export.parity import Report

DEFAULT_TOKENS = 576

_JUDGING = "Options of the verdict"
_WEIGHTS = "What to compare with"


def check(
    bundle: BundleArgument,
    reference: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Runtime to compare the candidates with.",
            show_default="torch:float64",
            autocompletion=list_completion(CANDIDATES),
        ),
    ] = None,
    candidates: Annotated[
        str | None,
        typer.Option(
            metavar="LIST",
            help="Runtimes to check, separated by commas, with their options after colons: "
            "onnxruntime:no-plugin, torch:float32, tensorrt:rtx. onnx-reference@200 reads 200 "
            "tokens only.",
            show_default="onnxruntime, with the plugin and without",
            autocompletion=list_completion(CANDIDATES),
        ),
    ] = None,
    cases: Annotated[
        str | None,
        typer.Option(
            metavar="LIST",
            help=f"Kinds of calls to make, separated by commas: {', '.join(CASES)}; mixed stands "
            "for mixed1 to mixed8. decode@5000 reads 5000 tokens.",
            show_default="all",
            autocompletion=list_completion(CASES),
        ),
    ] = None,
    text: TextOption = None,
    special: SpecialOption = False,
    tokens: Annotated[
        int | None,
        typer.Option(help="Tokens of the text to read.", show_default=str(DEFAULT_TOKENS), min=1),
    ] = None,
    all_ids: Annotated[
        bool,
        typer.Option(
            "--all-ids",
            help="Read every token id, however many there are; case long has 2304 otherwise.",
        ),
    ] = False,
    seed: Annotated[
        int | None,
        typer.Option(
            help="Seed of the random sizes and rows of the calls.", show_default="0", min=0
        ),
    ] = None,
    threads: Annotated[
        int,
        typer.Option(help="Threads per runtime. With 1, results are reproducible.", min=1),
    ] = 1,
    budget: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS",
            help="Time of the calls of a large model, by an estimate; what does not fit is left "
            "out and named. Cases with a number of tokens are always read whole.",
            show_default="110",
            min=1,
        ),
    ] = None,
    memory: Annotated[
        float | None,
        typer.Option(
            metavar="GB", help="Memory that the check may use.", show_default="4", min=0.1
        ),
    ] = None,
    full: Annotated[
        bool,
        typer.Option("--full", help="Leave nothing out for time, and use all free memory."),
    ] = False,
    replay: Annotated[
        Path | None,
        typer.Option(help="Repeat the calls of this report, on the same text."),
    ] = None,
    strict: Annotated[
        bool,
        typer.Option(
            "--strict", help="Allow only half of every error budget.", rich_help_panel=_JUDGING
        ),
    ] = False,
    tolerances: Annotated[
        Path | None,
        typer.Option(
            help="JSON file with other factors or limits, keyed by prefixes of tensor names.",
            rich_help_panel=_JUDGING,
        ),
    ] = None,
    baseline: Annotated[
        Path | None,
        typer.Option(
            help="Compare errors with an earlier report: one that more than doubled is a failure.",
            rich_help_panel=_JUDGING,
        ),
    ] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            help="Compare with these weights, which you trust, not with those in the bundle: a "
            "checkpoint, or a language model of Hugging Face.",
            show_default="the bundle's own",
            rich_help_panel=_WEIGHTS,
        ),
    ] = None,
    fwl: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the Fast Weight Layer on that language model.",
            show_default="a new one",
            rich_help_panel=_WEIGHTS,
        ),
    ] = None,
    record: Annotated[
        Path | None,
        typer.Option(
            help="Check nothing; write inputs and float64 results to this file, a trace.",
            rich_help_panel=_WEIGHTS,
        ),
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option(
            help="Compare with this trace, without PyTorch and without a checkpoint.",
            rich_help_panel=_WEIGHTS,
        ),
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(
            help="JSON report to write.",
            show_default="reports/parity.json in the bundle",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option(
            help="HTML page to write.",
            show_default="next to the report, with suffix .html",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    junit: Annotated[
        Path | None,
        typer.Option(help="JUnit XML file to write, for CI.", rich_help_panel=OUTPUT),
    ] = None,
    markdown: Annotated[
        Path | None,
        typer.Option(help="Markdown file to write, for pull requests.", rich_help_panel=OUTPUT),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Compare runtimes with PyTorch in float64.

    Every candidate reads a text, and calls that streaming models tend to get wrong, twice: with
    its own state (free-running), and from the reference's state before each call
    (teacher-forced). Logits and every state tensor must stay within their error budget.

    Exit code 0: all are within budget; 1: something is outside; 2: something could not run.

    Whoever sends a bundle can change its weights everywhere in it; --checkpoint takes yours. A
    bundle without a checkpoint, or a machine without PyTorch, is checked against a trace.

    Examples:
      fwl-export check demo-bundle --candidates onnxruntime,torch:float32
      fwl-export check demo-bundle --record demo.trace
      fwl-export check demo-bundle --against demo.trace
    """
    given = {"reference": reference, "candidates": candidates, "cases": cases, "seed": seed}
    if all_ids:
        given["all_ids"] = True
    with _errors_of_a_check(), contextlib.ExitStack() as stack:
        chosen = {"--record": record, "--against": against, "--checkpoint": checkpoint}
        others = {**given, "tokens": tokens, "text": text, "replay": replay, "fwl": fwl}
        judged = {"baseline": baseline, "strict": strict or None, "tolerances": tolerances}
        written = {"report": report, "html": html, "junit": junit, "markdown": markdown}
        refuse_together(chosen, others | judged | written)
        request = _request(bundle, {**given, "tokens": tokens}, text, replay, special)
        request.options |= {"strict": strict, "threads": threads}
        request.options["tolerances"] = _read_tolerances(tolerances)
        request.options["baseline"] = _read_baseline(baseline)
        request.options |= _bounds(request, budget, memory, full)
        files = {"--tolerances": tolerances, "--baseline": baseline}
        files |= {"--checkpoint": checkpoint, "--fwl": fwl, "--against": against}
        if checkpoint is not None:
            request.bundle = trusted(request.bundle, checkpoint, fwl, stack)
        if record is not None:
            write_record(record, request, json)
            return
        command = _command(bundle, request, text, files, replay)
        command += " --special" if special else ""
        if against is not None:
            result, target = run_against(against, request, command, report)
        else:
            result, target = _run(request, command, report)
        page = html or target.with_suffix(".html")
        paths = {"json": target, "junit": junit, "markdown": markdown, "html": page}
        _write(result, paths, {report, html, junit, markdown})
        with _errors_of_standard_output():
            _print(result, target, page, json)
    if result.exit_code:
        raise typer.Exit(result.exit_code)


def _bounds(
    request: _Request, budget: float | None, memory: float | None, full: bool
) -> dict[str, float | None]:
    """Return the time and the memory that the check may take, as arguments of `check_bundle`."""
    from fwl_export.errors import ConfigError
    from fwl_export.parity.plan import DEFAULT_BUDGET

    if full and budget is not None:
        raise ConfigError("--full has no --budget; give one of the two")
    cases = request.options.get("cases") or ""
    is_named = any("@" in case for case in ([cases] if isinstance(cases, str) else cases))
    seconds = None if full or (is_named and budget is None) else budget or DEFAULT_BUDGET
    return {"budget": seconds, "memory": memory and memory * 1e9}


@dataclass
class _Request:
    """What to check.

    Attributes:
      bundle: Bundle under check.
      tokenizer: The bundle's tokenizer.
      ids: Token ids of the text, [N] int64.
      text: Name of the text, for the report.
      options: Further arguments of `check_bundle`.
    """

    bundle: Bundle
    tokenizer: Tokenizer
    ids: Any
    text: str
    options: dict[str, Any]


def _request(
    folder: Path, given: Mapping[str, Any], text: Path | None, replay: Path | None, special: bool
) -> _Request:
    """Return what to check: a text, or what a report says was checked."""
    from fwl_export.bundle.manifest import read_bundle
    from fwl_export.demo import HELD_OUT_PLAY
    from fwl_export.runtimes.text import bundle_tokenizer

    bundle = read_bundle(folder)
    tokenizer = bundle_tokenizer(bundle)
    options = {key: value for key, value in given.items() if value is not None}
    if replay is not None:
        return _replayed(bundle, tokenizer, options, text, replay)
    source = text or HELD_OUT_PLAY
    options = {"tokens": DEFAULT_TOKENS, "seed": 0} | options
    ids = checked_ids(source, tokenizer, options["tokens"], options.get("cases", ""), special)
    return _Request(bundle, tokenizer, ids, shown_name(source), options)


def _replayed(
    bundle: Bundle,
    tokenizer: Tokenizer,
    options: Mapping[str, Any],
    text: Path | None,
    replay: Path,
) -> _Request:
    import numpy as np

    from fwl_export.errors import ConfigError, ReportError
    from fwl_export.parity import read_report

    if text is not None or options.keys() & {"cases", "tokens", "seed", "all_ids"}:
        raise ConfigError(
            "--replay takes text, cases, tokens and seed from its report; leave out "
            "--text, --cases, --tokens, --seed and --all-ids"
        )
    data = read_report(replay)
    if data["bundle"]["model_id"] != bundle.manifest.model_id:
        raise ReportError(
            f"report '{replay}' was made with the model {data['bundle']['model_id'][:12]}…, but "
            f"this bundle has the model {bundle.manifest.model_id[:12]}…; give the bundle that the "
            "report was made with"
        )
    keys = ("reference", "candidates", "cases", "tokens", "seed")
    settings = {key: data["settings"][key] for key in keys}
    ids = np.array(data["text"]["ids"], np.int64)
    return _Request(bundle, tokenizer, ids, data["text"]["name"], {**settings, **options})


def _run(request: _Request, command: str, report: Path | None) -> tuple[Report, Path]:
    """Check; returns the report and the path to write it to."""
    from fwl_export.bundle.manifest import REPORTS_FOLDER
    from fwl_export.bundle.paths import place_for
    from fwl_export.parity import check_bundle
    from fwl_export.parity.candidates import REFERENCE, missing_library, parse_candidates
    from fwl_export.parity.cases import ModelLimits, choose_cases
    from fwl_export.parity.check import DEFAULT_CASES, default_candidates
    from fwl_export.parity.plan import plan_check

    options = request.options
    limits = ModelLimits.of_bundle(request.bundle)
    chosen = choose_cases(
        options.get("cases", DEFAULT_CASES),
        options["tokens"],
        limits,
        options["seed"],
        options.pop("all_ids", False),
    )
    named = parse_candidates(options.get("candidates") or default_candidates())
    if missing := missing_library(named):
        note(missing)
    # Before the work, not after it: the path must lie inside the bundle.
    target = report or place_for(request.bundle.folder, f"{REPORTS_FOLDER}/parity.json")
    plan = plan_check(
        request.bundle,
        chosen,
        limits,
        options["seed"],
        named,
        options.get("reference", REFERENCE),
        options.pop("budget"),
        options.pop("memory"),
    )
    with progress_bar("check", plan.tokens) as advance:
        result = check_bundle(
            request.bundle,
            request.ids,
            **(options | {"cases": chosen, "plan": plan}),
            text=request.text,
            decode=lambda token: request.tokenizer.decode([token], skip_special_tokens=False),
            command=command,
            advance=advance,
            say=advance.say,
        )
    return result, target


def _write(
    result: Report, paths: Mapping[str, Path | None], named: Collection[Path | None]
) -> None:
    """Write the report in each format that has a path.

    Args:
      result: The report.
      paths: Path of each format, by its name; None leaves it out.
      named: Paths that the user gave, where a link is followed. In a bundle, which somebody else
        may have made, it is replaced.
    """
    from fwl_export.files import replaced_file
    from fwl_export.parity import to_markdown, write_junit
    from fwl_export.parity.report.html import to_html

    if target := paths["json"]:
        result.write(target, through_link=target in named)
    if target := paths["junit"]:
        write_junit(result, target)
    if target := paths["markdown"]:
        with replaced_file(target) as beside:
            beside.write_text(to_markdown(result), encoding="utf-8")
    if target := paths["html"]:
        with replaced_file(target, through_link=target in named) as beside:
            beside.write_text(to_html(result.to_dict()), encoding="utf-8")


def _print(result: Report, target: Path, page: Path, json: bool) -> None:
    from fwl_export.parity import to_text

    if json:
        print_json(result.to_dict())
    else:
        print(to_text(result))
        name = page.name if page.parent == target.parent else page
        print(f"{result.seconds:.0f} s; page: {name}, report: {target}")
    for problem in result.problems():
        print(f"error: {indented(problem)}", file=sys.stderr)
    if result.exit_code == 1:
        note(_advice(result, target))


def _advice(result: Report, target: Path) -> str:
    """Return what to do about a bundle that is outside its budgets or not finite."""
    bisect = f"`fwl-export bisect BUNDLE --report {target}`"
    wrong = [candidate for candidate in result.candidates if candidate.status == "outside"]
    if all(candidate.leaves_the_range for candidate in wrong):
        return (
            f"PyTorch in {result.precision} is not finite in the same calls: the model's numbers "
            "leave the range of the type, and neither the exporter nor the runtime is at fault. "
            "Export it with --precision fp32, or let `fwl-export precision` choose the parts that "
            f"stay in float32. {bisect} names the first tensor that is not finite"
        )
    if any(candidate.not_finite for candidate in wrong):
        return (
            f"{bisect} names the first tensor that is not finite, and says whether it is too large "
            "for its type, or the file or the runtime is at fault"
        )
    return (
        f"{bisect} finds the first tensor that is wrong, and says whether the file or the runtime "
        "is at fault. If a new export is no better, please report it with the numbers in "
        f"{target}"
    )


def _read_tolerances(path: Path | None) -> Any:
    from fwl_export.errors import ConfigError
    from fwl_export.json_files import read_bounded

    if path is None:
        return {}
    try:
        return json_module.loads(read_bounded(path, ConfigError).decode())
    except (ValueError, RecursionError) as error:
        raise ConfigError(
            f"--tolerances '{path}' is not JSON ({error}); expected an object whose keys are the "
            "prefixes of tensor names"
        ) from None


def _read_baseline(path: Path | None) -> Any:
    from fwl_export.parity import read_report

    return None if path is None else read_report(path)


def _command(
    bundle: Path,
    request: _Request,
    text: Path | None,
    files: Mapping[str, Path | None],
    replay: Path | None,
) -> str:
    """Return what to type to repeat the check."""
    words = ["fwl-export", "check", str(bundle)]
    for key in ("reference", "candidates", "cases", "tokens", "seed", "threads"):
        value = request.options.get(key)
        has_calls = replay is not None or files.get("--against") is not None
        is_in_report = has_calls and key in ("cases", "tokens", "seed")
        if value is not None and not is_in_report:
            words += [f"--{key}", ",".join(value) if isinstance(value, list) else str(value)]
    options = {"--text": text, "--replay": replay, **files}
    for name, path in options.items():
        words += [name, str(path)] if path is not None else []
    bounds = (request.options.get("budget"), request.options.get("memory"))
    words += [] if bounds[0] is None else ["--budget", f"{bounds[0]:g}"]
    words += [] if bounds[1] is None else ["--memory", f"{bounds[1] / 1e9:g}"]
    flags = {"--strict": "strict", "--all-ids": "all_ids"}
    words += [flag for flag, key in flags.items() if request.options.get(key)]
    return shlex.join(words)


@contextmanager
def _errors_of_standard_output() -> Iterator[None]:
    """Name standard output in the error if it leads to a full disk; a closed pipe is no error."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), "standard output") from None


@contextmanager
def _errors_of_a_check() -> Iterator[None]:
    """Turn every error that a user or a machine caused into "the check could not run", exit 2."""
    from fwl_export.errors import CheckError, FwlError

    try:
        yield
    except FwlError as error:
        raise CheckError(str(error)) from None
    except ModuleNotFoundError as error:
        name = (error.name or "").partition(".")[0]
        if name not in ("torch", "onnx", "allpairspy"):
            raise
        raise CheckError(
            f"check needs '{name}', which is not installed; pip install 'fwl-export[export]'"
        ) from None
    except BrokenPipeError:
        raise
    except OSError as error:
        if error.filename is None:
            raise
        raise CheckError(f"{error.strerror or error}: '{error.filename}'") from None
