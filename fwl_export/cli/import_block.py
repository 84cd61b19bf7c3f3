"""`fwl-export import`: checkpoints of the paper's JAX and TensorFlow code."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from fwl_export.cli.commands import add_verb, new_application
from fwl_export.cli.options import ForceOption, JsonOption, complete_checkpoint
from fwl_export.cli.terminal import print_json, spinner

if TYPE_CHECKING:
    from fwl_export.model.fwl_checkpoint import FastWeightsCheckpoint

import_block_group = new_application(
    name="import", help="Import a Fast Weight Layer from the paper's code."
)

_JAX_HELP = """Import Flax parameters; needs no JAX.

SOURCE is a msgpack file, an orbax folder, or an .npz file whose names are the paths.

Example:
  fwl-export import jax params.msgpack -o fwl --loss-normalizer 4088
"""

_TENSORFLOW_HELP = """Import a TensorFlow 2 checkpoint; needs no TensorFlow.

SOURCE is the checkpoint's folder, its path up to ".index", or an .npz file.

Example:
  fwl-export import tf model/ckpt-7 -o fwl --loss-normalizer 4088
"""


def import_checkpoint(
    context: typer.Context,
    source: Annotated[Path, typer.Argument(help="Checkpoint to import.", show_default=False)],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Checkpoint folder to write.", show_default=False)
    ],
    loss_normalizer: Annotated[
        float | None,
        typer.Option(
            metavar="N",
            help="Sum of the token weights of one training batch, by which the training code "
            "divides the loss; SOURCE does not say it. Required.",
            show_default=False,
        ),
    ] = None,
    backbone: Annotated[
        str | None,
        typer.Option(
            metavar="CHECKPOINT",
            help="Checkpoint folder, or 'demo', to take backbone and tokenizer from.",
            show_default="none, write the Fast Weight Layer alone",
            autocompletion=complete_checkpoint,
        ),
    ] = None,
    norm_epsilon: Annotated[
        float | None,
        typer.Option(
            help="Epsilon under the square root of the layer's norm.",
            show_default="1e-6 for jax, 0 for tf",
        ),
    ] = None,
    prefix: Annotated[
        str | None,
        typer.Option(
            help="Path of the layer in SOURCE, if SOURCE holds several.",
            show_default="search for it",
        ),
    ] = None,
    force: ForceOption = False,
    json: JsonOption = False,
) -> None:
    """Import from the framework that the command is named after."""
    from dataclasses import asdict

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
            say(f"joining it to the backbone of {backbone}")
            base = load_checkpoint(checkpoint_folder(backbone))
            save_checkpoint(output, with_backbone(block, base), base.tokenizer)
    if json:
        found = {"checkpoint": str(output), "backbone": backbone, "vocab_size": block.vocab_size}
        print_json({**found, "fast_weights": asdict(block.config)})
    else:
        print(_report(output, block, backbone))


add_verb(import_block_group, import_checkpoint, "jax", help_text=_JAX_HELP)
add_verb(import_block_group, import_checkpoint, "tf", help_text=_TENSORFLOW_HELP)


def _report(output: Path, block: FastWeightsCheckpoint, backbone: str | None) -> str:
    config = block.config
    what = "Fast Weight Layer alone" if backbone is None else f"on the backbone of {backbone}"
    unembedding = "no" if block.vocab_size is None else f"a {block.vocab_size}-entry"
    return (
        f"wrote {output}: {what}, {config.input_size} to {config.hidden_size} to "
        f"{config.output_size},\n{unembedding} unembedding, loss normalizer "
        f"{config.loss_normalizer:g}, norm epsilon {config.norm_epsilon:g}"
    )
