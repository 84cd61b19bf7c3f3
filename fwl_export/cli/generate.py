"""`fwl-export generate`: continue a prompt."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from fwl_export.cli.read import StateOption, read_tokens
from fwl_export.cli.terminal import (
    BundleArgument,
    LearningRateScaleOption,
    NoPluginOption,
    RuntimeOption,
)


def generate(
    bundle: BundleArgument,
    prompt: Annotated[str, typer.Option(help="Text to continue.")],
    read: Annotated[
        Path | None, typer.Option(help="Text file to read, and learn from, before the prompt.")
    ] = None,
    state: StateOption = None,
    max_new: Annotated[int, typer.Option(help="Tokens to write.", min=1)] = 100,
    temperature: Annotated[float, typer.Option(help="0 = always the likeliest.", min=0)] = 0.8,
    top_k: Annotated[int, typer.Option(help="Only the likeliest; 0 = all.", min=0)] = 0,
    top_p: Annotated[
        float, typer.Option(help="Only the likeliest with this probability together.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the random choice.", min=0)] = 0,
    no_learn: Annotated[
        bool, typer.Option("--no-learn", help="Do not learn from prompt and own output.")
    ] = False,
    learning_rate_scale: LearningRateScaleOption = 1.0,
    runtime: RuntimeOption = "onnxruntime",
    no_plugin: NoPluginOption = False,
) -> None:
    """Continue a prompt, token by token.

    Example: fwl-export generate demo-bundle --prompt "LEONTES." --seed 1
    """
    from fwl_export.bundle.manifest import read_bundle
    from fwl_export.bundle.tokenizer import read_ids
    from fwl_export.runtimes import Sampler, open_session
    from fwl_export.runtimes.text import bundle_tokenizer, prompt_ids

    opened = read_bundle(bundle)
    tokenizer = bundle_tokenizer(opened)
    session = open_session(opened, runtime, plugin="none" if no_plugin else "auto")
    session.learning_rate_scale = learning_rate_scale
    if state is not None:
        session.load_state(state)
    if read is not None:
        read_tokens(session, read_ids(read, tokenizer))
    ids = prompt_ids(prompt, tokenizer)
    sampler = Sampler(temperature, top_k, top_p, seed)
    written: list[int] = []
    shown = ""
    sys.stdout.write(prompt)
    for token in session.generate(ids, max_new, sampler, learn=not no_learn):
        written.append(token)
        text = tokenizer.decode(written)
        if not text.endswith("\ufffd"):  # in the middle of a character
            sys.stdout.write(text[len(shown) :])
            sys.stdout.flush()
            shown = text
    print()
