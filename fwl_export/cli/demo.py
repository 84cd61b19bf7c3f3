"""`fwl-export demo`: the whole way on the model that ships, as a newcomer would go it."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from fwl_export.cli.build import build
from fwl_export.cli.check import check
from fwl_export.cli.export import export
from fwl_export.cli.inspect import inspect
from fwl_export.cli.score import score


def demo(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Bundle folder to write; replaced if there.")
    ] = Path("demo-bundle"),
    sm: Annotated[str, typer.Option(help="GPU architectures to build engines for.")] = (
        "80,86,89,120"
    ),
) -> None:
    """Go the whole way on the model that ships.

    Export it, build engines, check parity, and score a play it never saw.

    Example: fwl-export demo
    """
    from fwl_export.demo import HELD_OUT_PLAY

    steps: list[tuple[str, Callable[[], None]]] = [
        (
            f"fwl-export export demo -o {output} --force",
            lambda: export("demo", output, force=True),
        ),
        (f"fwl-export build {output} --sm {sm}", lambda: build(output, sm=sm)),
        (f"fwl-export check {output}", lambda: check(output)),
        (f"fwl-export score {output} {HELD_OUT_PLAY.name}", lambda: score(output, HELD_OUT_PLAY)),
        (f"fwl-export inspect {output}", lambda: inspect(output)),
    ]
    began = time.perf_counter()
    for number, (command, step) in enumerate(steps, 1):
        typer.secho(f"\n[{number}/{len(steps)}] {command}", bold=True)
        step()
    typer.secho(f"\nDone in {time.perf_counter() - began:.0f} s. Next:", bold=True)
    print(f'  fwl-export generate {output} --prompt "LEONTES." --seed 1')
    print(f"  fwl-export score {output} YOUR_TEXT_FILE")
