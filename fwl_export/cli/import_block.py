"""`fwl-export import`: checkpoints of the paper's JAX and TensorFlow code."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from fwl_export.cli.terminal import spinner

import_block_group = typer.Typer(name="import", no_args_is_help=True, rich_markup_mode=None)

_OutputOption = Annotated[
    Path, typer.Option("--output", "-o", help="Checkpoint folder to write.", show_default=False)
]
_NormalizerOption = Annotated[
    float | None,
    typer.Option(
        help="N: the sum of the token weights of a training batch, by which the training code "
        "divides the loss. Required.",
        show_default=False,
    ),
]
_BackboneOption = Annotated[
    str | None,
    typer.Option(
        help="Checkpoint whose backbone and tokenizer to take; without it the folder holds the "
        "Fast Weight Layer alone.",
        show_default=False,
    ),
]
_EpsilonOption = Annotated[
    float | None,
    typer.Option(help="Inside the norm's square root.", show_default="1e-6 in JAX, 0 in TF"),
]
_PrefixOption = Annotated[
    str | None,
    typer.Option(
        help="Path of the block, where the source has several.", show_default="find the block"
    ),
]
_ForceOption = Annotated[bool, typer.Option("--force", help="Replace the checkpoint at OUTPUT.")]


@import_block_group.callback()
def _group() -> None:
    """Import a Fast Weight Layer from a checkpoint of the paper's code."""


@import_block_group.command("jax")
def import_jax(
    source: Annotated[
        Path,
        typer.Argument(
            help="Flax parameters: msgpack file, orbax folder, or .npz of paths.",
            show_default=False,
        ),
    ],
    output: _OutputOption,
    loss_normalizer: _NormalizerOption = None,
    backbone: _BackboneOption = None,
    norm_epsilon: _EpsilonOption = None,
    prefix: _PrefixOption = None,
    force: _ForceOption = False,
) -> None:
    """Import from Flax parameters, without JAX.

    Example: fwl-export import jax params.msgpack -o fwl --loss-normalizer 4088
    """
    _import("jax", source, output, loss_normalizer, backbone, norm_epsilon, prefix, force)


@import_block_group.command("tf")
def import_tensorflow(
    source: Annotated[
        Path,
        typer.Argument(
            help="TensorFlow 2 checkpoint (folder, or path up to .index), or .npz.",
            show_default=False,
        ),
    ],
    output: _OutputOption,
    loss_normalizer: _NormalizerOption = None,
    backbone: _BackboneOption = None,
    norm_epsilon: _EpsilonOption = None,
    prefix: _PrefixOption = None,
    force: _ForceOption = False,
) -> None:
    """Import from a TensorFlow 2 checkpoint, without TensorFlow.

    Example: fwl-export import tf model/ckpt-7 -o fwl --loss-normalizer 4088
    """
    _import("tf", source, output, loss_normalizer, backbone, norm_epsilon, prefix, force)


def _import(
    framework: Literal["jax", "tf"],
    source: Path,
    output: Path,
    loss_normalizer: float | None,
    backbone: str | None,
    norm_epsilon: float | None,
    prefix: str | None,
    force: bool,
) -> None:
    from fwl_export.demo import checkpoint_folder
    from fwl_export.importers import import_block, with_backbone
    from fwl_export.model.checkpoint import (
        check_checkpoint_output,
        load_checkpoint,
        save_checkpoint,
    )
    from fwl_export.model.fwl_checkpoint import save_fast_weights

    check_checkpoint_output(output, force)
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
