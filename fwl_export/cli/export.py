"""`fwl-export export`: checkpoint to bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fwl_export.cli.terminal import size, spinner


def export(
    checkpoint: Annotated[
        str, typer.Argument(help="Checkpoint folder, or 'demo' for the one that ships.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Bundle folder to write.")],
    precision: Annotated[str, typer.Option(help="Type of the activations: fp32 or fp16.")] = "fp32",
    opset: Annotated[int, typer.Option(help="Opset of the ONNX file.")] = 20,
    max_tokens: Annotated[
        int,
        typer.Option(
            help="Largest number of tokens per call, and no more than the model's anchor "
            "interval; longer reads are split."
        ),
    ] = 256,
    force: Annotated[bool, typer.Option("--force", help="Replace what is at OUTPUT.")] = False,
    precision_policy: Annotated[
        Path | None,
        typer.Option(help="Lower some parts only, as `fwl-export precision` chose them."),
    ] = None,
    no_checkpoint: Annotated[
        bool,
        typer.Option(
            "--no-checkpoint",
            help="Leave the PyTorch weights out: a smaller bundle, without `check`.",
        ),
    ] = False,
) -> None:
    """Export a checkpoint to a bundle: ONNX file, tokenizer, manifest.

    Example: fwl-export export demo -o demo-bundle
    """
    from fwl_export.demo import checkpoint_folder
    from fwl_export.export import export_bundle
    from fwl_export.export.precision import read_policy

    policy = read_policy(precision_policy) if precision_policy else None

    with spinner("export") as say:
        bundle = export_bundle(
            checkpoint_folder(checkpoint),
            output,
            precision=precision,
            opset=opset,
            max_tokens=max_tokens,
            force=force,
            include_checkpoint=not no_checkpoint,
            progress=say,
            policy=policy,
        )
    manifest = bundle.manifest
    total = sum(entry["bytes"] for entry in manifest.files.values())
    state = sum(spec.bytes_per_row for spec in manifest.state)
    print(
        f"wrote {output}: {manifest.precision}, opset {manifest.opset}, {manifest.op['nodes']} "
        f"fast-weight updates,\n{size(total)}; state {size(state)} per session"
    )
