"""`fwl-export score`: perplexity of a text, with and without adaptation."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fwl_export.cli.options import (
    BundleArgument,
    JsonOption,
    LearningRateScaleOption,
    NoPluginOption,
    RuntimeOption,
    SpecialOption,
    StateOption,
)
from fwl_export.cli.terminal import counted, print_json, progress_bar, rate, spinner
from fwl_export.cli.texts import shown_name, text_ids

if TYPE_CHECKING:
    from fwl_export.runtimes.text import Score

ADAPTING, OFF = "adapting", "adaptation off"


def score(
    bundle: BundleArgument,
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE", help="Text file to score; - is standard input.", show_default=False
        ),
    ],
    tokens: Annotated[
        int,
        typer.Option(
            help="Largest number of tokens to read, 2 or more, of which all but the first are "
            "scored; 0 means all.",
            min=0,
        ),
    ] = 0,
    special: SpecialOption = False,
    state: StateOption = None,
    learning_rate_scale: LearningRateScaleOption = 1.0,
    runtime: RuntimeOption = "onnxruntime",
    no_plugin: NoPluginOption = False,
    json: JsonOption = False,
) -> None:
    """Measure a text's perplexity with and without adaptation.

    Reads the text twice: once while the fast weights learn from it, once while they stay as they
    are.

    Example:
      fwl-export score demo-bundle play.txt
    """
    plugin = "none" if no_plugin else "auto"
    on, off = score_both(bundle, file, runtime, tokens, plugin, state, learning_rate_scale, special)
    if json:
        print_json({"file": str(file), **to_dict(runtime, on, off)})
        return
    print(f"{shown_name(file)}: {counted(on.tokens)} scored, {runtime}")
    for name, result in ((ADAPTING, on), (OFF, off)):
        print(
            f"  {name:15} perplexity {result.perplexity:7.2f}   "
            f"{rate(result.tokens, result.seconds):>16}"
        )
    change = on.perplexity / off.perplexity - 1
    print(f"  adapting is {abs(change):.1%} {'lower' if change < 0 else 'higher'}")


def score_both(
    bundle: Path,
    file: Path,
    runtime: str,
    tokens: int = 0,
    plugin: str = "auto",
    state: Path | None = None,
    learning_rate_scale: float = 1.0,
    special: bool = False,
) -> tuple[Score, Score]:
    """Score a text with adaptation and without; see `score` for the arguments."""
    from fwl_export.bundle.manifest import read_bundle
    from fwl_export.bundle.text_tokenizer import bundle_text_tokenizer
    from fwl_export.errors import ConfigError
    from fwl_export.runtimes import open_session
    from fwl_export.runtimes.text import score_ids

    if tokens == 1:
        raise ConfigError(
            "--tokens is 1, but the first token is not scored, since nothing predicts it; give 2 "
            "or more, or 0 for the whole text"
        )
    opened = read_bundle(bundle)
    tokenizer = bundle_text_tokenizer(opened)
    results, ids = [], None
    with spinner("opening the model"):
        loaded = open_session(opened, runtime, plugin=plugin)
    for name, weight in ((ADAPTING, 1.0), (OFF, 0.0)):
        session = loaded.another()
        session.learning_rate_scale = learning_rate_scale
        if state is not None:
            session.load_state(state)
        if ids is None:  # only now is known whether the session is fresh
            ids = text_ids(file, tokenizer, session, special, tokens)
        with progress_bar(name, len(ids) - 1) as advance:
            results.append(score_ids(session, ids, weight, advance))
    return results[0], results[1]


def to_dict(runtime: str, on: Score, off: Score) -> dict[str, Any]:
    """Return both results for programs."""
    return {
        "backend": runtime,  # the key's name since the first release
        "tokens": on.tokens,
        "perplexity": {"adapting": on.perplexity, "adaptation_off": off.perplexity},
        "tokens_per_second": {
            "adapting": on.tokens_per_second,
            "adaptation_off": off.tokens_per_second,
        },
    }
