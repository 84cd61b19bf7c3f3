"""`fwl-export chat`: talk with a model that was trained for it."""

from __future__ import annotations

import contextlib
import itertools
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fwl_export.cli.options import (
    BundleArgument,
    JsonOption,
    LearningRateScaleOption,
    NoPluginOption,
    RuntimeOption,
    StateOption,
)
from fwl_export.cli.terminal import note, print_generated, print_json
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
    from fwl_export.runtimes import TextSession

_INTRODUCTION = "Ctrl-C ends an answer, Ctrl-D the chat. The model learns from both sides."


def chat(
    bundle: BundleArgument,
    system: Annotated[
        str | None, typer.Option(help="Message of the system, ahead of the first of yours.")
    ] = None,
    read: ReadOption = None,
    state: StateOption = None,
    save_state: Annotated[
        Path | None, typer.Option(help="State file to write when the chat ends.")
    ] = None,
    max_new: Annotated[
        int, typer.Option(help="Largest number of tokens of an answer.", min=1)
    ] = 500,
    stop: StopOption = None,
    temperature: TemperatureOption = 0.7,
    top_k: TopKOption = 0,
    top_p: TopPOption = 0.95,
    min_p: MinPOption = 0.0,
    repetition_penalty: RepetitionPenaltyOption = 1.0,
    seed: SeedOption = 0,
    no_learn: Annotated[
        bool, typer.Option("--no-learn", help="Do not learn from the messages and answers.")
    ] = False,
    learning_rate_scale: LearningRateScaleOption = 1.0,
    runtime: RuntimeOption = "onnxruntime",
    no_plugin: NoPluginOption = False,
    json: JsonOption = False,
) -> None:
    """Talk with a model, by its chat template.

    Each line that you type is a message. What the model learned stays between the messages. Where
    standard input is no terminal, each of its lines is a message, and --json prints one line for
    each answer.

    Example:
      fwl-export chat my-bundle --system "Answer in one sentence."
    """
    from fwl_export.errors import ConfigError
    from fwl_export.runtimes import Sampler

    sampler = Sampler(
        temperature, top_k, top_p, seed, min_p=min_p, repetition_penalty=repetition_penalty
    )
    options = {
        "stop": [typed_text(each) for each in stop or []],
        "max_tokens": max_new,
        "sampler": sampler,
        "learn": not no_learn,
    }
    text = open_text(bundle, runtime, no_plugin, learning_rate_scale, state, read)
    text.check_chat()
    if sys.stdin is None:
        raise ConfigError("standard input is closed; expected messages, one in each line")
    interactive = sys.stdin.isatty() and not json
    if interactive:
        note(_INTRODUCTION)
    for message in _typed_lines() if interactive else _lines():
        asked = _messages(text, system and typed_text(system), message)
        if json:
            _answer_as_json(text, asked, message, options)
        elif interactive:
            _answer_on_a_terminal(text, asked, options)
        else:
            _answer(text, asked, options)
    if save_state is not None:
        text.save_state(save_state)
        note(f"wrote {save_state}")


def _messages(text: TextSession, system: str | None, message: str) -> list[dict[str, Any]]:
    """Return the whole conversation, ending with a message of the user."""
    before = text.messages
    if not before and system is not None:
        before = [{"role": "system", "content": system}]
    return [*before, {"role": "user", "content": message}]


def _lines() -> Iterator[str]:
    """Yield the lines of standard input that are not empty, as they come.

    Raises:
      TokenError: A line is not UTF-8.
    """
    for number, line in enumerate(iter(sys.stdin.buffer.readline, b"")):
        if (text := _decoded(line, number)).strip():
            yield text


def _decoded(line: bytes, number: int) -> str:
    from fwl_export.errors import TokenError

    try:
        return line.decode("utf-8" if number else "utf-8-sig").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise TokenError(f"line {number + 1} of standard input is no text: {error}") from None


def _typed_lines() -> Iterator[str]:
    """Yield what the user types, line by line, until Ctrl-D."""
    from fwl_export.errors import TokenError

    for number in itertools.count():
        print_generated("> ")
        try:
            line = sys.stdin.buffer.readline()
            text = _decoded(line, number)
        except KeyboardInterrupt:
            print_generated("\n")
            continue
        except TokenError as error:
            note(f"error: {error}")
            continue
        if not line:
            print_generated("\n")
            return
        if text.strip():
            yield text


def _answer(text: TextSession, asked: list[dict[str, Any]], options: dict[str, Any]) -> None:
    for piece in text.stream_chat(asked, **options):
        print_generated(piece)
    print_generated("\n")


def _answer_as_json(
    text: TextSession, asked: list[dict[str, Any]], message: str, options: dict[str, Any]
) -> None:
    from dataclasses import asdict

    answer = asdict(text.chat(asked, **options))
    print_json({"message": message, **answer}, indent=None)


def _answer_on_a_terminal(
    text: TextSession, asked: list[dict[str, Any]], options: dict[str, Any]
) -> None:
    """Show an answer that Ctrl-C ends; a message that the model cannot read ends nothing."""
    from fwl_export.errors import FwlError

    stream = text.stream_chat(asked, **options)
    try:
        with _interrupt() as interrupted:
            for piece in stream:
                print_generated(piece)
                if interrupted.is_set():
                    break
        stream.close()
    except FwlError as error:
        note(f"error: {error}")
    print_generated("\n")


@contextlib.contextmanager
def _interrupt() -> Iterator[threading.Event]:
    """Let Ctrl-C set the event that is yielded, instead of ending the program in mid-call."""
    interrupted = threading.Event()
    before = signal.signal(signal.SIGINT, lambda number, frame: interrupted.set())
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, before)
