"""`fwl-export export`: from a checkpoint to a bundle."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fwl_export.bundle.defaults import DEFAULT_MAX_TOKENS, DEFAULT_OPSET
from fwl_export.cli.options import ForceOption, JsonOption, complete_checkpoint, completion
from fwl_export.cli.terminal import print_json, size, spinner

if TYPE_CHECKING:
    from fwl_export.bundle import Bundle

_BACKBONE = "Options for a backbone of Hugging Face, in place of CHECKPOINT"


def export(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Bundle folder to write.", show_default=False)
    ],
    checkpoint: Annotated[
        str | None,
        typer.Argument(
            help="Checkpoint folder, or 'demo' for the model that ships. A language model of "
            "Hugging Face is taken as --backbone.",
            show_default=False,
            autocompletion=complete_checkpoint,
        ),
    ] = None,
    precision: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="Type that the model computes in: fp32 or fp16.",
            autocompletion=completion("fp32", "fp16"),
        ),
    ] = "fp32",
    precision_policy: Annotated[
        Path | None,
        typer.Option(
            help="Policy file of `fwl-export precision`: quantize only the parts that it lists.",
        ),
    ] = None,
    opset: Annotated[int, typer.Option(help="Opset of the ONNX file.")] = DEFAULT_OPSET,
    max_tokens: Annotated[
        int,
        typer.Option(
            help="Largest number of tokens per call; longer reads are split. At most the model's "
            "anchor interval.",
        ),
    ] = DEFAULT_MAX_TOKENS,
    no_checkpoint: Annotated[
        bool,
        typer.Option(
            "--no-checkpoint",
            help="Leave out the PyTorch weights. The bundle is smaller, but cannot be checked.",
        ),
    ] = False,
    backbone: Annotated[
        Path | None,
        typer.Option(
            help="Folder of a Hugging Face language model, or a GGUF file.",
            rich_help_panel=_BACKBONE,
        ),
    ] = None,
    fwl: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the Fast Weight Layer to put on the backbone.",
            show_default="a new layer, which needs no training",
            rich_help_panel=_BACKBONE,
        ),
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(
            help="Number of tokens that full attention sees.",
            show_default="what the backbone was made for; at most 2048 if positions are relative",
            rich_help_panel=_BACKBONE,
        ),
    ] = None,
    slide: Annotated[
        bool,
        typer.Option(
            "--slide",
            help="Read on past the context, which slides along, instead of ending there.",
            rich_help_panel=_BACKBONE,
        ),
    ] = False,
    inline: Annotated[
        bool,
        typer.Option(
            "--inline",
            help="Write model.onnx in standard operators only, which no plugin speeds up. Without "
            "this, model.inlined.onnx is such a file.",
        ),
    ] = False,
    force: ForceOption = False,
    json: JsonOption = False,
) -> None:
    """Export a checkpoint to a bundle.

    The bundle is a folder with the ONNX file, its tokenizer and a manifest: all that an
    application needs.

    Examples:
      fwl-export export demo -o demo-bundle
      fwl-export export --backbone gpt2 -o gpt2-bundle
      fwl-export export --backbone gpt2 --fwl layer -o gpt2-bundle
      fwl-export export --backbone model.gguf --context 512 -o bundle
    """
    source = _Source(checkpoint, backbone, fwl, context, slide).recognised()
    source.check()
    with spinner("export") as say, contextlib.ExitStack() as stack:
        folder = source.folder(output, force, stack, say)
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
            inline=inline,
        )
    if json:
        print_json({"bundle": str(output), **_sizes(bundle), "manifest": bundle.manifest.to_dict()})
    else:
        print(_report(bundle, output, source.origin()))


@dataclass(frozen=True)
class _Source:
    """What to export: a checkpoint, or a backbone and a Fast Weight Layer for it."""

    checkpoint: str | None
    backbone: Path | None
    fwl: Path | None
    context: int | None
    slide: bool

    def recognised(self) -> _Source:
        """Return the source with a CHECKPOINT that is a backbone, or in a bundle, as what it is.

        Raises:
          CheckpointError: CHECKPOINT is something that cannot be exported.
        """
        if self.checkpoint in (None, "demo"):
            return self
        from fwl_export.bundle.manifest import bundle_checkpoint
        from fwl_export.model import source

        path = Path(str(self.checkpoint))
        found = source.what_is(path)
        if found.kind == source.BUNDLE:
            return replace(self, checkpoint=str(bundle_checkpoint(path)))
        if found.kind in (source.HUGGING_FACE, source.GGUF) and self.backbone is None:
            return replace(self, checkpoint=None, backbone=path)
        if found.kind in (source.OTHER, source.LAYER):
            raise found.refusal("checkpoint", source.EXPECTED)
        return self

    def check(self) -> None:
        """Refuse options that do not go together."""
        if self.backbone is None:
            if self.checkpoint is None:
                raise typer.BadParameter("give a CHECKPOINT or --backbone")
            if self.fwl is not None or self.context is not None or self.slide:
                raise typer.BadParameter("--fwl, --context and --slide need --backbone")
        elif self.checkpoint is not None:
            raise typer.BadParameter("give a CHECKPOINT or a --backbone, not both")

    def origin(self) -> str:
        """Return what the weights of a GGUF file are, for a person; "" for other sources."""
        from fwl_export.model.backbones.gguf import is_gguf, read_header

        if self.backbone is None or not is_gguf(self.backbone):
            return ""
        types = read_header(self.backbone).types_in_words
        return f": float32 from {types} in {self.backbone.name}"

    def folder(
        self,
        output: Path,
        force: bool,
        stack: contextlib.ExitStack,
        say: Callable[[str], None],
    ) -> Path:
        """Return the checkpoint's folder; one joined from two parts lasts as long as `stack`."""
        from fwl_export.demo import checkpoint_folder

        if self.checkpoint is not None:
            return checkpoint_folder(self.checkpoint)
        from fwl_export.export.write_bundle import check_bundle_output
        from fwl_export.model.pretrained import join_checkpoint

        assert self.backbone is not None
        check_bundle_output(output, force)
        say(f"reading the backbone{self.origin()}")
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "checkpoint"
        join_checkpoint(self.backbone, self.fwl, folder, self.context, self.slide)
        return folder


def _sizes(bundle: Bundle) -> dict[str, Any]:
    return {
        "bytes": sum(entry["bytes"] for entry in bundle.manifest.files.values()),
        "state_bytes_per_session": sum(spec.bytes_per_row for spec in bundle.manifest.state),
    }


def _report(bundle: Bundle, output: Path, origin: str) -> str:
    manifest, sizes = bundle.manifest, _sizes(bundle)
    updates = manifest.op["nodes"] or "inlined"
    text = (
        f"wrote {output}: {manifest.precision}, opset {manifest.opset}, {updates} "
        f"fast-weight updates,\n{size(sizes['bytes'])}; state "
        f"{size(sizes['state_bytes_per_session'])} per session"
    )
    if origin:
        text += f"\nthe weights are{origin.removeprefix(':')}"
    limit = manifest.config.backbone.max_positions
    return f"{text}\na session ends after {limit} tokens" if limit else text
