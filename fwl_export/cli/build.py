"""`fwl-export build`: TensorRT engines from a bundle."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from fwl_export.bundle.defaults import DEFAULT_MAX_BATCH, DEFAULT_SMS
from fwl_export.cli.options import (
    BundleArgument,
    JsonOption,
    PluginOption,
    completion,
    list_completion,
)
from fwl_export.cli.terminal import print_json, size, spinner, table

if TYPE_CHECKING:
    from fwl_export.engines import EngineMetadata

# Seconds between lines where progress cannot be drawn in place.
_LINE_EVERY = 10

SMS = ",".join(map(str, DEFAULT_SMS))

_ENGINE = "Engine options"


def build(
    bundle: BundleArgument,
    variant: Annotated[
        str,
        typer.Option(
            "--variant",
            metavar="NAME",
            help="rtx: TensorRT-RTX, builds without a GPU; tensorrt: builds for the GPU that is "
            "present.",
            autocompletion=completion("rtx", "tensorrt"),
        ),
    ] = "rtx",
    sm: Annotated[
        str | None,
        typer.Option(
            metavar="LIST",
            help="GPU architectures (compute capabilities) to build for, separated by commas.",
            show_default=f"{SMS} for rtx, the GPU that is present for tensorrt",
            autocompletion=list_completion(map(str, DEFAULT_SMS)),
        ),
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="fp32 or fp16. The bundle's precision decides; another one is an error.",
            show_default="the bundle's",
            autocompletion=completion("fp32", "fp16"),
        ),
    ] = None,
    chunk: Annotated[
        int | None,
        typer.Option(help="Largest number of tokens per call.", show_default="as exported"),
    ] = None,
    max_batch: Annotated[
        int, typer.Option(help="Largest number of rows (independent texts) per call.")
    ] = DEFAULT_MAX_BATCH,
    plugin: PluginOption = "auto",
    in_place_state: Annotated[
        bool,
        typer.Option(
            "--in-place-state",
            help="Let updates overwrite their state, which saves memory. Triton Inference Server "
            "cannot run such engines.",
            rich_help_panel=_ENGINE,
        ),
    ] = False,
    embed_plugin: Annotated[
        bool,
        typer.Option(
            "--embed-plugin",
            help="Store the plugin library inside the engines.",
            rich_help_panel=_ENGINE,
        ),
    ] = False,
    json: JsonOption = False,
) -> None:
    """Build TensorRT engines into a bundle.

    Builds one engine per GPU architecture. It runs on GPUs of that architecture only.

    Example:
      fwl-export build demo-bundle --sm 86,89
    """
    from fwl_export.bundle.manifest import read_bundle
    from fwl_export.engines import build_engines

    sms = None if sm is None else parse_sms(sm)
    with spinner("build") as say:
        built = build_engines(
            read_bundle(bundle),
            variant,
            sms,
            precision,
            chunk,
            max_batch,
            plugin,
            in_place_state,
            embed_plugin,
            _paced(say),
        )
    if json:
        print_json([engine.to_dict() for engine in built])
    else:
        print(_report(built))


def parse_sms(text: str) -> list[int]:
    """Read a list of GPU architectures.

    Args:
      text: List such as "80,86" or "sm80, 8.6".

    Raises:
      EngineError: A part of the list is not an architecture.
    """
    from fwl_export.errors import EngineError

    sms = []
    for part in text.split(","):
        digits = part.strip().lower().removeprefix("sm").removeprefix("_").replace(".", "", 1)
        if not (digits.isascii() and digits.isdigit() and len(digits) in (2, 3)):
            raise EngineError(
                f"--sm '{text}': '{part.strip()}' is not a GPU architecture; expected numbers "
                "such as 80,86,89,120"
            )
        sms.append(int(digits))
    return sms


def _paced(say: Callable[[str], None]) -> Callable[[str], None]:
    """Thin out the messages that come every second, where each one would be a line."""
    if sys.stderr.isatty():
        return say
    shown = 0.0

    def paced(message: str) -> None:
        nonlocal shown
        is_repeated = ", " in message
        if not is_repeated or time.monotonic() - shown >= _LINE_EVERY:
            say(message)
            shown = time.monotonic()

    return paced


def _report(built: Sequence[EngineMetadata]) -> str:
    from fwl_export.plugins import TENSORRT

    rows = [
        (
            engine.name,
            engine.update_path,
            size(engine.engine_bytes),
            str(engine.layers),
            str(engine.plugin_layers),
            f"{engine.build_seconds:.1f} s",
        )
        for engine in built
    ]
    text = table(("engine", "path built", "size", "layers", "plugins", "build"), rows)
    prefill = built[0].profiles[-1].inputs["input_ids"]["max"]
    text += f"\n\nProfiles: decode, 1 token; prefill, 1 to {prefill[1]}; 1 to {prefill[0]} rows."
    if any(engine.update_path == "function body" for engine in built):
        text += (
            "\nThe fast-weight updates run in standard operators, the op's function body."
            "\n`make plugins` builds their plugin; --plugin required insists on it."
        )
    elif not built[0].plugin_embedded:
        text += f"\nTo run these engines, the plugin library {TENSORRT} must be loaded."
    return text
