"""`fwl-export check`: does the bundle compute what PyTorch does?"""

from __future__ import annotations

import json as json_module
import shlex
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fwl_export.cli.terminal import BundleArgument, JsonOption, print_json, progress_bar

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from fwl_export.bundle.manifest import Bundle
    from fwl_export.parity import Report


def check(
    bundle: BundleArgument,
    reference: Annotated[
        str | None, typer.Option(help="Runtime that counts as right; default: torch:float64.")
    ] = None,
    candidates: Annotated[
        str | None,
        typer.Option(
            help="Runtimes to check, with commas: onnxruntime, onnxruntime:no-plugin, "
            "onnx-reference@200, torch:float32, tensorrt ...; default: onnxruntime."
        ),
    ] = None,
    cases: Annotated[
        str | None,
        typer.Option(
            help="With commas; default: text,mixed,repeat,long,decode. Thousands of steps of one "
            "token: decode@5000."
        ),
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(help="Text file to read; default: the held-out play of the package."),
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(help="How far to read the text; default: 2000.", min=1)
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Of the sizes and rows of the calls; default: 0.", min=0)
    ] = None,
    threads: Annotated[int, typer.Option(help="Of each runtime; 1 is repeatable.", min=1)] = 1,
    strict: Annotated[bool, typer.Option("--strict", help="Halve every budget.")] = False,
    tolerances: Annotated[
        Path | None,
        typer.Option(help="JSON file: by prefix of tensors' names, other factors or limits."),
    ] = None,
    baseline: Annotated[
        Path | None,
        typer.Option(help="Report of before: an error that grew more than twofold is a failure."),
    ] = None,
    replay: Annotated[
        Path | None, typer.Option(help="Report whose calls are to be made again.")
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(help="JSON file to write; default: reports/parity.json in the bundle."),
    ] = None,
    junit: Annotated[Path | None, typer.Option(help="JUnit XML file to write, for CI.")] = None,
    markdown: Annotated[
        Path | None, typer.Option(help="Markdown file to write, for pull requests.")
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option(help="HTML file to write; default: parity.html beside the report."),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Check runtimes against PyTorch in float64, over text and over what streams go wrong with.

    Every runtime reads with its own state, and again from the reference's state before each
    call; logits and every tensor of the state are compared. Exit code 0: all within budget; 1:
    something is outside; 2: something could not run.

    Example: fwl-export check demo-bundle --candidates onnxruntime,onnx-reference@200
    """
    given = {"reference": reference, "candidates": candidates, "cases": cases, "seed": seed}
    with _what_cannot_run():
        wish = _wish(bundle, {**given, "tokens": tokens}, text, replay)
        wish.options |= {"strict": strict, "threads": threads}
        wish.options["tolerances"] = _read_tolerances(tolerances)
        wish.options["baseline"] = _read_baseline(baseline)
        files = {"--tolerances": tolerances, "--baseline": baseline}
        command = _command(bundle, wish, text, files, replay)
        result, target = _checked(wish, command, report)
        _write(result, target, junit, markdown)
        page = html or target.with_suffix(".html")
        _write_html(result, page)
    _print(result, target, page, json)
    if result.exit_code:
        raise typer.Exit(result.exit_code)


@dataclass
class _Wish:
    """What is to be checked: the bundle, the ids of the text and its name, and all options."""

    bundle: Bundle
    tokenizer: Tokenizer
    ids: Any
    text: str
    options: dict[str, Any]


def _wish(folder: Path, given: Mapping[str, Any], text: Path | None, replay: Path | None) -> _Wish:
    import numpy as np

    from fwl_export.bundle.manifest import read_bundle
    from fwl_export.bundle.tokenizer import read_ids
    from fwl_export.demo import HELD_OUT_PLAY
    from fwl_export.errors import ConfigError, ReportError
    from fwl_export.parity import read_report
    from fwl_export.runtimes.text import bundle_tokenizer

    bundle = read_bundle(folder)
    tokenizer = bundle_tokenizer(bundle)
    options = {key: value for key, value in given.items() if value is not None}
    if replay is None:
        source = text or HELD_OUT_PLAY
        ids = read_ids(source, tokenizer)
        return _Wish(bundle, tokenizer, ids, source.name, {"tokens": 2000, "seed": 0} | options)
    if text is not None or options.keys() & {"cases", "tokens", "seed"}:
        raise ConfigError(
            "--replay takes text, cases, tokens and seed from its report; leave out "
            "--text, --cases, --tokens and --seed"
        )
    data = read_report(replay)
    if data["bundle"]["model_id"] != bundle.manifest.model_id:
        raise ReportError(
            f"report '{replay}' is of the model {data['bundle']['model_id'][:12]}…, but the "
            f"bundle's is {bundle.manifest.model_id[:12]}…; give the bundle it was made of"
        )
    settings = data["settings"]
    keys = ("reference", "candidates", "cases", "tokens", "seed")
    replayed = {key: settings[key] for key in keys}
    ids = np.array(data["text"]["ids"], np.int64)
    return _Wish(bundle, tokenizer, ids, data["text"]["name"], replayed | options)


def _checked(wish: _Wish, command: str, report: Path | None) -> tuple[Report, Path]:
    """Return the report, and where it is to be written."""
    from fwl_export.bundle.manifest import REPORTS_FOLDER, inside
    from fwl_export.parity import check_bundle
    from fwl_export.parity.cases import choose_cases
    from fwl_export.parity.check import DEFAULT_CASES

    chosen = choose_cases(
        wish.options.get("cases", DEFAULT_CASES),
        wish.options["tokens"],
        wish.bundle.manifest.max_tokens,
        wish.bundle.manifest.config.backbone.max_positions,
    )
    target = report or inside(wish.bundle.folder, f"{REPORTS_FOLDER}/parity.json")
    with progress_bar("check", sum(case.tokens for case in chosen)) as advance:
        result = check_bundle(
            wish.bundle,
            wish.ids,
            **(wish.options | {"cases": chosen}),
            text=wish.text,
            decode=lambda token: wish.tokenizer.decode([token]),
            command=command,
            advance=advance,
        )
    return result, target


def _write(result: Report, target: Path, junit: Path | None, markdown: Path | None) -> None:
    from fwl_export.files import replaced_file
    from fwl_export.parity import to_markdown, write_junit

    result.write(target)
    if junit:
        write_junit(result, junit)
    if markdown:
        with replaced_file(markdown) as path:
            path.write_text(to_markdown(result), encoding="utf-8")


def _write_html(result: Report, path: Path) -> None:
    from fwl_export.files import replaced_file
    from fwl_export.parity.report.html import to_html

    with replaced_file(path) as beside:
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
        print(f"error: {problem}", file=sys.stderr)
    if result.exit_code == 1:
        print(
            "Export the bundle again and repeat the check; if it fails again, the exporter or the "
            f"runtime is at fault: the numbers to report are in {target}",
            file=sys.stderr,
        )


def _read_tolerances(path: Path | None) -> Any:
    from fwl_export.errors import ConfigError

    if path is None:
        return {}
    try:
        return json_module.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(
            f"'{path}' is not JSON ({error}); expected tolerances by prefix"
        ) from None


def _read_baseline(path: Path | None) -> Any:
    from fwl_export.parity import read_report

    return None if path is None else read_report(path)


def _command(
    bundle: Path,
    wish: _Wish,
    text: Path | None,
    files: Mapping[str, Path | None],
    replay: Path | None,
) -> str:
    """Return what to type to repeat the check."""
    words = ["fwl-export", "check", str(bundle)]
    for key in ("reference", "candidates", "cases", "tokens", "seed", "threads"):
        value = wish.options.get(key)
        replayed = replay is not None and key in ("cases", "tokens", "seed")
        if value is not None and not replayed:
            words += [f"--{key}", value if isinstance(value, str) else _joined(value)]
    options = {"--text": text, "--replay": replay, **files}
    for name, path in options.items():
        words += [name, str(path)] if path is not None else []
    return shlex.join([*words, *(["--strict"] if wish.options["strict"] else [])])


def _joined(value: Any) -> str:
    return ",".join(value) if isinstance(value, list) else str(value)


@contextmanager
def _what_cannot_run() -> Iterator[None]:
    """Make errors of a user or a machine end with the exit code of a check that could not run."""
    from fwl_export.errors import CheckError, FwlError

    try:
        yield
    except FwlError as error:
        raise CheckError(str(error)) from None
    except ModuleNotFoundError as error:
        name = (error.name or "").partition(".")[0]
        if name not in ("torch", "onnx"):
            raise
        raise CheckError(
            f"check needs '{name}', which is not installed; pip install 'fwl-export[export]'"
        ) from None
    except OSError as error:
        if error.filename is None:
            raise
        raise CheckError(f"{error.strerror or error}: '{error.filename}'") from None
