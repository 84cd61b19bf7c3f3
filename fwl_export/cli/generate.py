"""`fwl-export generate`: continue a prompt."""

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
from fwl_export.cli.terminal import heading, print_generated, print_json
from fwl_export.cli.texts import typed_text
from fwl_export.cli.writing import (
    MinPOption,
    ReadOption,
    RepetitionPenaltyOption,
    SeedOption,
    StopOption,
    TemperatureOption,
    TopKOption,
    TopPOption,
    open_text,
)

if TYPE_CHECKING:
    from fwl_export.runtimes import Generation, Sampler, TextSession


def generate(
    bundle: BundleArgument,
    prompt: Annotated[
        str | None,
        typer.Option(help="Text to continue; - reads it from standard input.", show_default=False),
    ] = None,
    prompt_file: Annotated[
        Path | None, typer.Option(help="Text file to continue, in place of --prompt.")
    ] = None,
    read: ReadOption = None,
    state: StateOption = None,
    max_new: Annotated[int, typer.Option(help="Number of tokens to generate.", min=1)] = 100,
    stop: StopOption = None,
    samples: Annotated[
        int, typer.Option("-n", "--samples", help="Number of texts, with one seed each.", min=1)
    ] = 1,
    temperature: TemperatureOption = 0.8,
    top_k: TopKOption = 0,
    top_p: TopPOption = 1.0,
    min_p: MinPOption = 0.0,
    repetition_penalty: RepetitionPenaltyOption = 1.0,
    seed: SeedOption = 0,
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
    logprobs: Annotated[
        int | None,
        typer.Option(
            help="With --json, log probabilities of each token and of the N most likely.",
            min=0,
            show_default=False,
        ),
    ] = None,
) -> None:
    """Continue a prompt, token by token.

    The text ends at a token by which the model ends texts, at a --stop string, or after --max-new
    tokens; --json says which. A line end at the end of a prompt from a file or from standard input
    is left out. On a terminal, control characters in the text are shown as escapes; a file or a
    pipe gets the text as it is.

    Example:
      fwl-export generate demo-bundle --prompt "LEONTES." --seed 1
    """
    from fwl_export.runtimes import Sampler

    begin = _prompt(prompt, prompt_file)
    sampler = Sampler(
        temperature, top_k, top_p, seed, min_p=min_p, repetition_penalty=repetition_penalty
    )
    options: dict[str, Any] = {
        "stop": [typed_text(each) for each in stop or []],
        "max_tokens": max_new,
        "sampler": sampler,
        "learn": not no_learn,
        "logprobs": logprobs,
        "special": special,
        "ignore_end": ignore_end,
    }
    text = open_text(bundle, runtime, no_plugin, learning_rate_scale, state, read, special)
    if samples > 1:
        _print_all(begin, text.generate(begin, samples, **options), sampler, json)
    elif json:
        print_json({"prompt": begin, **_to_dict(text.generate(begin, **options))})
    else:
        _print_stream(text, begin, options)


def _prompt(prompt: str | None, file: Path | None) -> str:
    """Return the prompt: as it was given, from a file, or from standard input."""
    from fwl_export.bundle.text_file import read_text
    from fwl_export.errors import ConfigError

    if (prompt is None) == (file is None):
        given = "neither" if prompt is None else "both"
        raise ConfigError(f"{given} of --prompt and --prompt-file was given; expected one of them")
    if prompt is not None and prompt != "-":
        return typed_text(prompt)
    text = read_text(file or Path("-"))
    return text.removesuffix("\n").removesuffix("\r")


def _print_stream(text: TextSession, prompt: str, options: dict[str, Any]) -> None:
    stream = text.stream(prompt, **options)
    pieces = iter(stream)
    first = next(pieces, "")  # the prompt is shown once the model has read it without an error
    print_generated(prompt + first)
    for piece in pieces:
        print_generated(piece)
    print_generated("\n")


def _print_all(prompt: str, texts: list[Generation], sampler: Sampler, json: bool) -> None:
    if json:
        print_json({"prompt": prompt, "samples": [_to_dict(each) for each in texts]})
        return
    for number, each in enumerate(texts):
        heading(f"sample {number + 1}, seed {sampler.seed + number}")
        print_generated(f"{prompt}{each.text}\n")


def _to_dict(generation: Generation) -> dict[str, Any]:
    """Return a text for programs."""
    from dataclasses import asdict

    data = asdict(generation)
    return data if generation.logprobs is not None else data | {"logprobs": None}
