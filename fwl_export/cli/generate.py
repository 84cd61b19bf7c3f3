"""`fwl-export generate`: continue a prompt."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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
from fwl_export.cli.read import read_tokens
from fwl_export.cli.terminal import print_generated, print_json
from fwl_export.cli.texts import text_ids, typed_text

if TYPE_CHECKING:
    from fwl_export.bundle.text_decoder import TextDecoder

_SAMPLING = "Sampling options"


def generate(
    bundle: BundleArgument,
    prompt: Annotated[str, typer.Option(help="Text to continue.", show_default=False)],
    read: Annotated[
        Path | None, typer.Option(help="Text file to read, and learn from, before the prompt.")
    ] = None,
    state: StateOption = None,
    max_new: Annotated[int, typer.Option(help="Number of tokens to generate.", min=1)] = 100,
    temperature: Annotated[
        float,
        typer.Option(
            help="Sampling temperature; 0 always takes the most likely token.",
            min=0,
            rich_help_panel=_SAMPLING,
        ),
    ] = 0.8,
    top_k: Annotated[
        int,
        typer.Option(
            help="Sample from the k most likely tokens; 0 means all.",
            min=0,
            rich_help_panel=_SAMPLING,
        ),
    ] = 0,
    top_p: Annotated[
        float,
        typer.Option(
            help="Sample from the fewest tokens whose probabilities add up to p; 1 means all.",
            rich_help_panel=_SAMPLING,
        ),
    ] = 1.0,
    seed: Annotated[
        int,
        typer.Option(
            help="Seed of the random choice; the same seed gives the same text.",
            min=0,
            rich_help_panel=_SAMPLING,
        ),
    ] = 0,
    no_learn: Annotated[
        bool,
        typer.Option(
            "--no-learn", help="Do not learn from the prompt and from the generated text."
        ),
    ] = False,
    ignore_end: Annotated[
        bool,
        typer.Option("--ignore-end", help="Go on after a token that ends a text."),
    ] = False,
    special: SpecialOption = False,
    learning_rate_scale: LearningRateScaleOption = 1.0,
    runtime: RuntimeOption = "onnxruntime",
    no_plugin: NoPluginOption = False,
    json: JsonOption = False,
) -> None:
    """Continue a prompt, token by token.

    On a terminal, control characters in the text are shown as escapes; a file or a pipe gets the
    text as it is.

    Example:
      fwl-export generate demo-bundle --prompt "LEONTES." --seed 1
    """
    from fwl_export.bundle.manifest import read_bundle
    from fwl_export.bundle.text_tokenizer import bundle_text_tokenizer
    from fwl_export.runtimes import Sampler, open_session
    from fwl_export.runtimes.text import prompt_ids

    prompt = typed_text(prompt)
    opened = read_bundle(bundle)
    tokenizer = bundle_text_tokenizer(opened)
    session = open_session(opened, runtime, plugin="none" if no_plugin else "auto")
    session.learning_rate_scale = learning_rate_scale
    if state is not None:
        session.load_state(state)
    if read is not None:
        read_tokens(session, text_ids(read, tokenizer, session, special))
    ids = prompt_ids(prompt, tokenizer, not session.positions[0], special)
    sampler = Sampler(temperature, top_k, top_p, seed)
    ends = () if ignore_end else sorted(tokenizer.end_ids)
    tokens = session.generate(ids, max_new, sampler, ends, learn=not no_learn)
    decoder = tokenizer.decoder(before=ids)
    if json:
        generated = [int(token) for token in tokens]
        text = "".join(_texts(generated, decoder))
        print_json({"prompt": prompt, "text": text, "tokens": generated})
        return
    print_generated(prompt)
    for text in _texts(tokens, decoder):
        print_generated(text)
    print_generated("\n")


def _texts(tokens: Iterable[int], decoder: TextDecoder) -> Iterator[str]:
    """Yield what each token adds to the text, once its characters are complete."""
    for text in chain(map(decoder.add, tokens), (decoder.finish() for _ in range(1))):
        if text:
            yield text
