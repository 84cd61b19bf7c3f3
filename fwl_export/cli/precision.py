"""`fwl-export precision`: which parts of a model can be quantized?"""

from __future__ import annotations

import math
import shlex
import tempfile
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fwl_export.bundle.defaults import DEFAULT_MAX_TOKENS, DEFAULT_OPSET
from fwl_export.cli.logs import is_quiet
from fwl_export.cli.options import JsonOption, TextOption, complete_checkpoint, completion
from fwl_export.cli.terminal import COLUMNS, print_json, spinner, table
from fwl_export.cli.texts import checked_ids

if TYPE_CHECKING:
    from fwl_export.parity import Report
    from fwl_export.parity.precision_search import Distance, Exploration, Limits
    from fwl_export.precision.policy import PrecisionPolicy
    from fwl_export.runtimes import Session


# Repeated here because `precision.policy` loads PyTorch; a test compares the two.
TARGETS = ("fp16", "bf16", "int8w")


_LIMITS = "Limits of the error"

_REJECTED = 3  # policies that were not confirmed and are shown


def precision(
    source: Annotated[
        str,
        typer.Argument(
            help="Bundle or checkpoint folder, or 'demo'.",
            show_default=False,
            autocompletion=complete_checkpoint,
        ),
    ],
    target: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="fp16; int8w, int8 weights with float32 arithmetic; or bf16, which can be "
            "measured in PyTorch but not exported.",
            autocompletion=completion(*TARGETS),
        ),
    ] = "fp16",
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Policy file to write, for `export`.")
    ] = Path("policy.json"),
    text: TextOption = None,
    tokens: Annotated[
        int, typer.Option(help="Tokens to read in each run of the search.", min=1)
    ] = 300,
    confirm_tokens: Annotated[
        int, typer.Option(help="Tokens to read in the final run, which confirms the policy.", min=1)
    ] = 2000,
    max_kl: Annotated[
        float,
        typer.Option(
            help="Mean KL divergence from float64, in nats per token.", rich_help_panel=_LIMITS
        ),
    ] = 1e-4,
    max_perplexity_increase: Annotated[
        float,
        typer.Option(
            help="Increase over float64's perplexity; 0.001 means 0.1 %.", rich_help_panel=_LIMITS
        ),
    ] = 1e-3,
    max_state_error: Annotated[
        float,
        typer.Option(
            help="Relative RMS error of the state tensor that is furthest off.",
            rich_help_panel=_LIMITS,
        ),
    ] = 0.02,
    json: JsonOption = False,
) -> None:
    """Find the parts that must stay in float32.

    Quantizes each part of the model alone, then excludes the most sensitive parts until the
    others together stay within the limits, and confirms that over a longer text, for fp16 and
    int8w in ONNX Runtime too, where the model must also pass `check` with its default cases. The
    result is a policy file for `fwl-export export`.

    Example:
      fwl-export precision demo --target int8w -o policy.json
    """
    from fwl_export.errors import ConfigError
    from fwl_export.parity.precision_search import Limits
    from fwl_export.precision.policy import write_policy

    if target not in TARGETS:
        raise ConfigError(f"target is '{target}'; expected {' or '.join(TARGETS)}")
    limits = Limits(max_kl, max_perplexity_increase, max_state_error)
    folder = _checkpoint_of(source)
    found = _search(folder, target, text, tokens, confirm_tokens, limits)
    write_policy(output, found.policy)
    if json:
        print_json(found.policy.to_dict())
        return
    print(_summary(found, limits, confirm_tokens))
    print(f"wrote {output}")
    if not is_quiet():
        print(_next_step(target, source, folder, output))


def _search(
    folder: Path, target: str, text: Path | None, tokens: int, confirm_tokens: int, limits: Limits
) -> Exploration:
    from fwl_export.demo import HELD_OUT_PLAY
    from fwl_export.model.checkpoint import load_checkpoint
    from fwl_export.parity.precision_search import Explorer

    checkpoint = load_checkpoint(folder)
    interval = checkpoint.config.fast_weights.anchor_interval
    max_tokens = min(DEFAULT_MAX_TOKENS, interval or DEFAULT_MAX_TOKENS)
    longest = max(tokens, confirm_tokens)
    ids = checked_ids(text or HELD_OUT_PLAY, checkpoint.tokenizer, longest)
    with spinner("precision") as say, tempfile.TemporaryDirectory() as scratch:

        def in_onnx_runtime(policy: PrecisionPolicy) -> Mapping[str, Session]:
            return {} if target == "bf16" else _onnx_runtime(folder, Path(scratch), policy)

        def checked(policy: PrecisionPolicy) -> Report | None:
            return None if target == "bf16" else _checked(Path(scratch), ids)

        explorer = Explorer(checkpoint, ids, target, limits, max_tokens, say)
        return explorer.search(tokens, confirm_tokens, in_onnx_runtime, checked)


def _checked(scratch: Path, ids: Any) -> Report:
    """Check the bundle that `_onnx_runtime` has exported last, as `check` does by default."""
    from fwl_export.bundle.manifest import read_bundle
    from fwl_export.bundle.repetition import LENGTH
    from fwl_export.parity.cases import ENDLESS
    from fwl_export.parity.check import DEFAULT_CASES, DEFAULT_TOKENS, check_bundle
    from fwl_export.runtimes.text import bundle_tokenizer

    bundle = read_bundle(scratch / "bundle")
    cases = [name if name != ENDLESS else f"{name}@{LENGTH}" for name in DEFAULT_CASES.split(",")]
    tokenizer = bundle_tokenizer(bundle)
    return check_bundle(
        bundle,
        ids,
        min(DEFAULT_TOKENS, len(ids) - 1),
        cases=cases,
        decode=lambda token: tokenizer.decode([token], skip_special_tokens=False),
    )


def _checkpoint_of(source: str) -> Path:
    """Return the checkpoint folder: a bundle's, or the source itself."""
    from fwl_export.bundle.manifest import bundle_checkpoint, is_bundle
    from fwl_export.demo import checkpoint_folder
    from fwl_export.model import source as sources

    folder = checkpoint_folder(source)
    if is_bundle(folder):
        return bundle_checkpoint(folder)
    found = sources.what_is(folder)
    if found.kind in (sources.CHECKPOINT, sources.OTHER):
        return folder  # whoever loads it says what is missing
    raise found.refusal("source", "export it, and give the bundle")


def _onnx_runtime(folder: Path, scratch: Path, policy: PrecisionPolicy) -> Mapping[str, Session]:
    """Export the model under a policy and open it for the final run."""
    from fwl_export.export import export_bundle
    from fwl_export.parity.schedule import ROWS
    from fwl_export.runtimes import open_session

    bundle = export_bundle(folder, scratch / "bundle", force=True, policy=policy)
    return {"ONNX Runtime": open_session(bundle, "onnxruntime", ROWS, threads=1)}


def _summary(found: Exploration, limits: Limits, tokens: int) -> str:
    policy = found.policy
    ranked = sorted(found.alone, key=lambda name: found.alone[name].kl, reverse=True)
    rows = [
        [name, *_cells(found.alone[name]), "float32" if name in policy.excluded else policy.target]
        for name in ranked
    ]
    rows.append(["all quantized", *_cells(found.everything), ""])
    rows += [
        [f"policy, {tokens} tokens, {name}", *_cells(distance), ""]
        for name, distance in found.confirmed.items()
    ]
    limit = (limits.max_kl, limits.max_perplexity_increase, limits.max_state_error)
    rows.append(["limit", *(f"{value:.1e}" for value in limit), ""])
    header = ("quantized alone", "KL, nats", "perplexity", "state", "policy")
    excluded = textwrap.fill(
        f"{len(policy.quantized)} of {len(ranked)} parts in {policy.target}; float32 stays: "
        f"{', '.join(policy.excluded) or 'nothing'}",
        COLUMNS,
        break_on_hyphens=False,
    )
    rejected = "".join(
        f"\n{textwrap.fill(f'not confirmed: {line}', COLUMNS, break_on_hyphens=False)}"
        for line in found.rejected[:_REJECTED]
    )
    if len(found.rejected) > _REJECTED:
        rejected += f"\nand {len(found.rejected) - _REJECTED} more policies not confirmed"
    return f"{table(header, rows)}\n\n{excluded}{rejected}{_of_check(found)}"


def _of_check(found: Exploration) -> str:
    """Return a sentence about the check of the policy, or "" if there was none."""
    if found.checked is None:
        return ""
    use = max(candidate.use for candidate in found.checked.candidates)
    cases = len(found.checked.cases)
    return f"\npasses check in its {cases} cases, at {use:.0%} of a budget at most"


def _next_step(target: str, source: str, folder: Path, output: Path) -> str:
    """Return what to do with the policy.

    Args:
      target: Precision of the quantized parts.
      source: Source as the user gave it.
      folder: Folder of its checkpoint.
      output: Policy file.
    """
    if target == "bf16":
        return (
            "bf16 was computed in PyTorch: ONNX Runtime's CPU provider has no bf16 kernels,\n"
            "and `export` takes no bf16 policy."
        )
    exported = "demo" if source == "demo" else str(folder)
    command = ["fwl-export", "export", exported, "-o", "BUNDLE", "--precision-policy", str(output)]
    return f"next: {shlex.join([*command, *_other_calls(source)])}"


def _other_calls(source: str) -> list[str]:
    """Return the options of `export` with which a bundle's calls have its size and its opset."""
    from fwl_export.bundle.manifest import is_bundle, read_bundle

    if source == "demo" or not is_bundle(Path(source)):
        return []
    manifest = read_bundle(Path(source)).manifest
    limits = (
        manifest.config.fast_weights.anchor_interval,
        manifest.config.backbone.max_positions,
        DEFAULT_MAX_TOKENS,
    )
    words = []
    if manifest.max_tokens != min(limit for limit in limits if limit):
        words += ["--max-tokens", str(manifest.max_tokens)]
    if manifest.opset != DEFAULT_OPSET:
        words += ["--opset", str(manifest.opset)]
    return words


def _cells(distance: Distance) -> tuple[str, str, str]:
    if not math.isfinite(distance.kl):
        return ("failed", "", "")
    return (
        f"{distance.kl:.1e}",
        f"{distance.perplexity_increase:+.1e}",
        f"{distance.state_error:.1e}",
    )
