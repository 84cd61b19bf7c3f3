"""`fwl-export import`: checkpoints of the paper's JAX and TensorFlow code."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from fwl_export.cli.terminal import spinner

import_block_group = typer.Typer(name="import", no_args_is_help=True, rich_markup_mode=None)


@import_block_group.callback()
def _group() -> None:
    """Import a Fast Weight Layer from a checkpoint of the paper's code."""


_JAX_HELP = """Import from Flax parameters; needs no JAX.

SOURCE is a msgpack file, an orbax folder, or an .npz file whose names are the paths.

Example: fwl-export import jax params.msgpack -o fwl --loss-normalizer 4088
"""

_TENSORFLOW_HELP = """Import from a TensorFlow 2 checkpoint; needs no TensorFlow.

SOURCE is the checkpoint's folder, its path up to ".index", or an .npz file.

Example: fwl-export import tf model/ckpt-7 -o fwl --loss-normalizer 4088
"""


@import_block_group.command("tf", help=_TENSORFLOW_HELP)
@import_block_group.command("jax", help=_JAX_HELP)
def import_checkpoint(
    context: typer.Context,
    source: Annotated[Path, typer.Argument(help="Checkpoint to import.", show_default=False)],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Checkpoint folder to write.", show_default=False)
    ],
    loss_normalizer: Annotated[
        float | None,
        typer.Option(
            help="N: the sum of the token weights of a training batch, by which the training code "
            "divides the loss. Required.",
            show_default=False,
        ),
    ] = None,
    backbone: Annotated[
        str | None,
        typer.Option(
            help="Checkpoint whose backbone and tokenizer to take; without it the folder holds the "
            "Fast Weight Layer alone.",
            show_default=False,
        ),
    ] = None,
    norm_epsilon: Annotated[
        float | None,
        typer.Option(help="Inside the norm's square root.", show_default="1e-6 in JAX, 0 in TF"),
    ] = None,
    prefix: Annotated[
        str | None,
        typer.Option(
            help="Path of the block, where the source has several.", show_default="find the block"
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace the checkpoint at OUTPUT.")
    ] = False,
) -> None:
    """Import from the framework that the command is named after."""
    from fwl_export.demo import checkpoint_folder
    from fwl_export.importers import import_block, with_backbone
    from fwl_export.model.checkpoint import (
        check_checkpoint_output,
        load_checkpoint,
        save_checkpoint,
    )
    from fwl_export.model.fwl_checkpoint import save_fast_weights

    check_checkpoint_output(output, force)
    framework: Literal["jax", "tf"] = "jax" if context.info_name == "jax" else "tf"
    with spinner("import") as say:
        say(f"reading {source}")
        block = import_block(framework, source, loss_normalizer, norm_epsilon, prefix)
        if backbone is None:
            save_fast_weights(output, block)
        else:
            say(f"putting it on the backbone of {backbone}")
            base = load_checkpoint(checkpoint_folder(backbone))
            save_checkpoint(output, with_backbone(block, base), base.tokenizer)
    config = block.config
    what = "Fast Weight Layer alone" if backbone is None else f"on the backbone of {backbone}"
    unembedding = "no" if block.vocab_size is None else f"a {block.vocab_size}-entry"
    print(
        f"wrote {output}: {what}, {config.input_size} to {config.hidden_size} to "
        f"{config.output_size},\n{unembedding} unembedding, loss normalizer "
        f"{config.loss_normalizer:g}, norm epsilon {config.norm_epsilon:g}"
    )
