"""What `fwl-export check` compares with, other than the bundle's own checkpoint."""

from __future__ import annotations

import shlex
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from fwl_export.cli.terminal import note, print_json, progress_bar, size

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from fwl_export.bundle.manifest import Bundle
    from fwl_export.parity import Report

# Options that mean nothing beside another one, and why.
_WITH_RECORD = (
    *("candidates", "reference", "replay", "baseline", "strict", "tolerances"),
    *("report", "html", "junit", "markdown"),
)
_WITH_AGAINST = ("reference", "cases", "text", "tokens", "seed", "all_ids", "replay", "baseline")
_WHY = {
    "--record": "--record writes a trace and checks nothing",
    "--against": "--against takes the calls and float64's results from its trace",
}


class Request(Protocol):
    """What to check, see `cli.check`."""

    bundle: Bundle
    tokenizer: Tokenizer
    ids: Any
    text: str
    options: dict[str, Any]


def refuse_together(chosen: Mapping[str, Path | None], others: Mapping[str, Any]) -> None:
    """Refuse options that do not go together.

    Args:
      chosen: Values of --record, --against and --checkpoint.
      others: Values of the other options by name; None stands for one that was not given.

    Raises:
      ConfigError: Two of them exclude each other.
    """
    from fwl_export.errors import ConfigError

    given = {key for key, value in others.items() if value is not None}
    if chosen["--record"] and chosen["--against"]:
        raise ConfigError("--record writes a trace and --against reads one; give one of the two")
    if chosen["--against"] and chosen["--checkpoint"]:
        raise ConfigError(
            f"{_WHY['--against']}, not from a checkpoint; give --against or --checkpoint"
        )
    if "fwl" in given and not chosen["--checkpoint"]:
        raise ConfigError("--fwl needs a language model of Hugging Face as --checkpoint")
    for option, excluded in (("--record", _WITH_RECORD), ("--against", _WITH_AGAINST)):
        wrong = [f"--{key.replace('_', '-')}" for key in excluded if key in given]
        if chosen[option] and wrong:
            raise ConfigError(f"{_WHY[option]}; leave out {' and '.join(wrong)}")


def trusted(bundle: Bundle, checkpoint: Path, layer: Path | None, stack: ExitStack) -> Bundle:
    """Return the bundle with the weights of a checkpoint that the user trusts.

    Args:
      bundle: Bundle to check.
      checkpoint: Value of --checkpoint.
      layer: Value of --fwl.
      stack: What is written for the check is removed with it.
    """
    from fwl_export.parity.trusted import same_tokenizer, with_trusted_weights

    scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    found = with_trusted_weights(bundle, checkpoint, layer, scratch)
    if not same_tokenizer(found):
        note(
            "The bundle's tokenizer.json is not that of --checkpoint: it may split texts otherwise."
        )
    return found


def write_record(path: Path, request: Request, json: bool) -> None:
    """Record a trace and say where it is.

    Args:
      path: File to write.
      request: What to record.
      json: Whether to print JSON.
    """
    from fwl_export.parity.cases import ModelLimits, choose_cases
    from fwl_export.parity.record import RECORDED_CASES, record_trace
    from fwl_export.parity.trace import write_trace

    options = request.options
    tokens, seed = options["tokens"], options["seed"]
    limits = ModelLimits.of(request.bundle.manifest)
    all_ids = options.pop("all_ids", False)
    chosen = choose_cases(options.get("cases", RECORDED_CASES), tokens, limits, seed, all_ids)
    path.parent.mkdir(parents=True, exist_ok=True)
    with progress_bar("record", sum(case.tokens for case in chosen)) as advance:
        trace = record_trace(
            request.bundle,
            request.ids,
            tokens,
            seed,
            cases=chosen,
            text=request.text,
            threads=options["threads"],
            advance=advance,
        )
        written = write_trace(path, trace)
    calls = sum(len(traced.calls) for traced in trace.cases)
    if json:
        cases = [f"{traced.case.name}@{traced.case.tokens}" for traced in trace.cases]
        print_json({"trace": str(path), "bytes": written, "calls": calls, "cases": cases})
        return
    command = shlex.join(
        ["fwl-export", "check", str(request.bundle.folder), "--against", str(path)]
    )
    print(f"wrote {path}: {calls} calls in {len(trace.cases)} cases, {size(written)}")
    print(f"next: {command}")


def run_against(
    path: Path, request: Request, command: str, report: Path | None
) -> tuple[Report, Path]:
    """Check against a trace; returns the report and the path to write it to.

    Args:
      path: The trace.
      request: What to check; text and calls come from the trace.
      command: Shell command that repeats the check.
      report: Value of --report.
    """
    from fwl_export.bundle.manifest import REPORTS_FOLDER
    from fwl_export.bundle.paths import inside
    from fwl_export.parity.against import check_against
    from fwl_export.parity.candidates import missing_library, parse_candidates
    from fwl_export.parity.check import default_candidates
    from fwl_export.parity.trace import read_trace

    options = request.options
    candidates = parse_candidates(options.get("candidates") or default_candidates())
    if missing := missing_library(candidates):
        note(missing)
    trace = read_trace(path)
    target = report or inside(request.bundle.folder, f"{REPORTS_FOLDER}/parity.json")
    with progress_bar("check", sum(traced.case.tokens for traced in trace.cases)) as advance:
        result = check_against(
            request.bundle,
            trace,
            candidates,
            strict=options["strict"],
            tolerances=options["tolerances"],
            name=path.name,
            threads=options["threads"],
            decode=lambda token: request.tokenizer.decode([token]),
            command=command,
            advance=advance,
        )
    return result, target
