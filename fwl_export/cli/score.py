"""`fwl-export score`: perplexity of a text, with and without adaptation."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fwl_export.cli.terminal import (
    BackendOption,
    BundleArgument,
    JsonOption,
    NoPluginOption,
    print_json,
    progress_bar,
)


def score(
    bundle: BundleArgument,
    file: Annotated[Path, typer.Argument(help="Text file to read.", show_default=False)],
    backend: BackendOption = "onnxruntime",
    no_plugin: NoPluginOption = False,
    tokens: Annotated[int, typer.Option(help="Read at most this many; 0 = all.", min=0)] = 0,
    json: JsonOption = False,
) -> None:
    """Print a text's perplexity, with and without adapting.

    Example: fwl-export score demo-bundle play.txt
    """
    from fwl_export.bundle import read_bundle
    from fwl_export.runtimes import open_session
    from fwl_export.runtimes.text import bundle_tokenizer, score_ids
    from fwl_export.text import read_ids

    opened = read_bundle(bundle)
    ids = read_ids(file, bundle_tokenizer(opened))
    ids = ids[: tokens or len(ids)]
    results = {}
    for name, weight in (("adapting", 1.0), ("adaptation off", 0.0)):
        session = open_session(opened, backend, plugin="none" if no_plugin else "auto")
        with progress_bar(name, len(ids) - 1) as advance:
            results[name] = score_ids(session, ids, weight, advance)
    on, off = results["adapting"], results["adaptation off"]
    if json:
        print_json(
            {
                "file": str(file),
                "backend": backend,
                "tokens": on.tokens,
                "perplexity": {"adapting": on.perplexity, "adaptation_off": off.perplexity},
                "tokens_per_second": {
                    "adapting": on.tokens_per_second,
                    "adaptation_off": off.tokens_per_second,
                },
            }
        )
        return
    print(f"{file.name}: {on.tokens} tokens scored, {backend}")
    for name, result in results.items():
        print(
            f"  {name:15} perplexity {result.perplexity:7.2f}   "
            f"{result.tokens_per_second:7.0f} tokens/s"
        )
    print(f"  adapting is {1 - on.perplexity / off.perplexity:+.1%} lower".replace("+", ""))
