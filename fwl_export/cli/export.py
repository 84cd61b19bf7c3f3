"""`fwl-export export`: checkpoint to bundle."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from fwl_export.cli.terminal import size, spinner


def export(
    output: Annotated[Path, typer.Option("--output", "-o", help="Bundle folder to write.")],
    checkpoint: Annotated[
        str | None,
        typer.Argument(
            help="Checkpoint folder, or 'demo' for the one that ships.", show_default=False
        ),
    ] = None,
    backbone: Annotated[
        Path | None,
        typer.Option(
            help="In place of CHECKPOINT: folder of a Hugging Face language model, with --fwl.",
            show_default=False,
        ),
    ] = None,
    fwl: Annotated[
        Path | None,
        typer.Option(help="Folder of the Fast Weight Layer for --backbone.", show_default=False),
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(
            help="With --backbone: tokens that full attention sees. Default: what the model was "
            "made for, at most 2048 where positions are relative.",
            show_default=False,
        ),
    ] = None,
    slide: Annotated[
        bool,
        typer.Option(
            "--slide", help="With --backbone: let the context slide on instead of ending there."
        ),
    ] = False,
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

    Example: fwl-export export --backbone gpt2 --fwl layer -o gpt2-bundle
    """
    with spinner("export") as say, contextlib.ExitStack() as stack:
        folder = _checkpoint(checkpoint, backbone, fwl, context, slide, output, force, stack, say)
        from fwl_export.export import export_bundle
        from fwl_export.precision.policy import read_policy

        bundle = export_bundle(
            folder,
            output,
            precision=precision,
            opset=opset,
            max_tokens=max_tokens,
            force=force,
            include_checkpoint=not no_checkpoint,
            progress=say,
            policy=read_policy(precision_policy) if precision_policy else None,
        )
    manifest = bundle.manifest
    total = sum(entry["bytes"] for entry in manifest.files.values())
    state = sum(spec.bytes_per_row for spec in manifest.state)
    print(
        f"wrote {output}: {manifest.precision}, opset {manifest.opset}, {manifest.op['nodes']} "
        f"fast-weight updates,\n{size(total)}; state {size(state)} per session"
    )
    if limit := manifest.config.backbone.max_positions:
        print(f"a session ends after {limit} tokens")


def _checkpoint(
    checkpoint: str | None,
    backbone: Path | None,
    fwl: Path | None,
    context: int | None,
    slide: bool,
    output: Path,
    force: bool,
    stack: contextlib.ExitStack,
    say: Callable[[str], None],
) -> Path:
    """Return the checkpoint's folder; one made of backbone and layer lasts as long as `stack`."""
    from fwl_export.demo import checkpoint_folder

    if backbone is None:
        if checkpoint is None:
            raise typer.BadParameter("give a CHECKPOINT, or --backbone and --fwl")
        if fwl is not None or context is not None or slide:
            raise typer.BadParameter("--fwl, --context and --slide go with --backbone")
        return checkpoint_folder(checkpoint)
    if checkpoint is not None or fwl is None:
        raise typer.BadParameter("--backbone takes --fwl, and no CHECKPOINT")
    from fwl_export.export.write_bundle import check_bundle_output
    from fwl_export.model.pretrained import join_checkpoint

    check_bundle_output(output, force)
    say("reading the backbone")
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "checkpoint"
    join_checkpoint(backbone, fwl, folder, context, slide)
    return folder
