"""`fwl-export build`: TensorRT engines from a bundle."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from fwl_export.cli.terminal import (
    BundleArgument,
    JsonOption,
    print_json,
    size,
    spinner,
    table,
)

if TYPE_CHECKING:
    from fwl_export.engines import EngineMetadata

# Seconds between lines where progress cannot be drawn in place.
_LINE_EVERY = 10


def build(
    bundle: BundleArgument,
    variant: Annotated[
        str,
        typer.Option(
            "--variant",
            "--flavour",
            help="rtx (needs no GPU) or tensorrt (for the GPU that is present).",
        ),
    ] = "rtx",
    sm: Annotated[
        str | None,
        typer.Option(
            help="GPU architectures, e.g. 80,89. Default: 80,86,89,120 for rtx; the GPU that is "
            "present for tensorrt.",
            show_default=False,
        ),
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(help="fp32 or fp16; must be the bundle's.", show_default=False),
    ] = None,
    chunk: Annotated[
        int | None,
        typer.Option(
            help="Largest number of tokens per call. Default: as exported.", show_default=False
        ),
    ] = None,
    max_batch: Annotated[int, typer.Option(help="Largest number of rows per call.")] = 8,
    plugin: Annotated[
        str,
        typer.Option(
            help="The fast-weight updates' plugin library: auto (if it is there), none, required, "
            "or a path."
        ),
    ] = "auto",
    in_place_state: Annotated[
        bool,
        typer.Option(
            "--in-place-state",
            help="Updates write over their state. Not for Triton Inference Server.",
        ),
    ] = False,
    embed_plugin: Annotated[
        bool,
        typer.Option("--embed-plugin", help="Put the plugin library into the engines."),
    ] = False,
    json: JsonOption = False,
) -> None:
    """Build one TensorRT engine per GPU architecture into a bundle.

    Example: fwl-export build demo-bundle --sm 86,89
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
        print_json([facts.to_dict() for facts in built])
    else:
        print(_report(built))


def parse_sms(text: str) -> list[int]:
    """Read a list of GPU architectures.

    Args:
      text: such as "80,86" or "sm80, 8.6".

    Raises:
      EngineError: a part of it is none.
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
    """Thin out the messages of every second where each one would become a line."""
    if sys.stderr.isatty():
        return say
    shown = 0.0

    def paced(message: str) -> None:
        nonlocal shown
        goes_on = ", " in message
        if not goes_on or time.monotonic() - shown >= _LINE_EVERY:
            say(message)
            shown = time.monotonic()

    return paced


def _report(built: Sequence[EngineMetadata]) -> str:
    from fwl_export.plugins import TENSORRT

    rows = [
        (
            facts.name,
            facts.update_path,
            size(facts.engine_bytes),
            str(facts.layers),
            str(facts.plugin_layers),
            f"{facts.build_seconds:.1f} s",
        )
        for facts in built
    ]
    text = table(("engine", "path built", "size", "layers", "plugins", "build"), rows)
    prefill = built[0].profiles[-1].inputs["input_ids"]["max"]
    text += f"\n\nProfiles: decode, 1 token; prefill, 1 to {prefill[1]}; 1 to {prefill[0]} rows."
    if any(facts.update_path == "function body" for facts in built):
        text += (
            "\nThe fast-weight updates run in standard operators, the op's function body."
            "\nTheir plugin is built by `make plugins`; --plugin required insists on it."
        )
    elif not built[0].plugin_embedded:
        text += f"\nThese engines run where the plugin library {TENSORRT} is loaded."
    return text
