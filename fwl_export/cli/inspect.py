"""`fwl-export inspect`: what is in a bundle."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fwl_export.cli.options import BundleArgument, JsonOption
from fwl_export.cli.terminal import COLUMNS, print_json, size, table
from fwl_export.printable import one_line

if TYPE_CHECKING:
    from fwl_export.bundle.config import AnyBackboneConfig, FastWeightsConfig
    from fwl_export.bundle.manifest import Bundle, Manifest


def inspect(bundle: BundleArgument, json: JsonOption = False) -> None:
    """Show what is in a bundle, after checking every file.

    Prints the model's configuration, the state and its size per session, the operators of the
    ONNX file, all files with their hashes, and the engines.

    Example:
      fwl-export inspect demo-bundle
    """
    from fwl_export.bundle.manifest import MODEL_FILE, read_bundle
    from fwl_export.bundle.onnx_file import count_ops

    opened = read_bundle(bundle)
    opened.verify()
    operators = count_ops(opened.file(MODEL_FILE))
    engines = _read_engines(opened)
    if json:
        print_json({**opened.manifest.to_dict(), "ops": operators, "engines": engines})
    else:
        print("\n\n".join(_sections(bundle, opened.manifest, operators, engines)))


def _read_engines(opened: Bundle) -> list[dict[str, Any]]:
    from fwl_export.engines.choose import read_engines

    return [engine.to_dict() for engine in read_engines(opened)]


def _sections(
    folder: Path,
    manifest: Manifest,
    operators: Mapping[str, int],
    engines: Sequence[Mapping[str, Any]],
) -> Iterator[str]:
    """Yield the paragraphs of the report."""
    yield "\n".join(map(one_line, _model_lines(folder, manifest)))
    yield "State of one session"
    yield _state_table(manifest)
    text = "Operators: " + ", ".join(f"{name}\u00a0{count}" for name, count in operators.items())
    yield textwrap.fill(text, COLUMNS).replace("\u00a0", " ")
    yield "Files (all hashes match)"
    files = [(name, size(e["bytes"]), e["sha256"][:12]) for name, e in manifest.files.items()]
    yield table(("file", "size", "sha256"), files)
    if engines:
        yield "Engines"
        yield _engine_table(engines)


def _model_lines(folder: Path, manifest: Manifest) -> list[str]:
    config = manifest.config
    return [
        f"bundle    {folder}",
        f"model     {manifest.model_id[:12]}, {manifest.precision}, opset {manifest.opset}, up to "
        f"{manifest.max_tokens} tokens per call",
        f"backbone  {_backbone(config.backbone)}, vocabulary {config.vocab_size}",
        *_fast_weights(config.fast_weights),
    ]


def _backbone(backbone: AnyBackboneConfig) -> str:
    from fwl_export.bundle.config import HuggingFaceConfig

    if isinstance(backbone, HuggingFaceConfig):
        end = f"ends at {backbone.max_positions}" if backbone.max_positions else "no end"
        kind = backbone.model["model_type"]
        return f"{kind} (Hugging Face), width {backbone.width}, window {backbone.window} ({end})"
    return (
        f"{backbone.type}, width {backbone.width}, {backbone.layers} layers, {backbone.heads} "
        f"heads, window {backbone.window}"
    )


def _fast_weights(config: FastWeightsConfig) -> list[str]:
    biases = "learn" if config.update_dense_bias else "fixed"
    anchors = f"anchor every {config.anchor_interval} tokens"
    return [
        f"FWL       {config.input_size} -> {config.hidden_size} -> {config.output_size}, dense "
        f"biases {biases},",
        f"          step sizes {config.step_sizes}, decay {config.decay}, loss normalizer "
        f"{config.loss_normalizer:g},",
        f"          {anchors if config.anchor_interval else 'no anchors'}",
    ]


def _state_table(manifest: Manifest) -> str:
    rows = [
        (spec.name, spec.dtype, "x".join(map(str, spec.shape)) or "1", size(spec.bytes_per_row))
        for spec in manifest.state
    ]
    total = sum(spec.bytes_per_row for spec in manifest.state)
    return table(("tensor", "type", "shape", "size"), [*rows, ("total", "", "", size(total))])


def _engine_table(engines: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        (
            engine["name"],
            engine["update_path"],
            str(engine["layers"]),
            str(engine["plugin_layers"]),
            f"{engine['build_seconds']:.1f} s",
        )
        for engine in engines
    ]
    return table(("engine", "path built", "layers", "plugins", "build"), rows)
