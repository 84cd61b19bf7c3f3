"""`fwl-export inspect`: what is in a bundle."""

from __future__ import annotations

import json as json_module
import textwrap
from typing import TYPE_CHECKING

from fwl_export.cli.terminal import BundleArgument, JsonOption, print_json, size, table

if TYPE_CHECKING:
    from fwl_export.bundle.config import AnyBackboneConfig


def inspect(bundle: BundleArgument, json: JsonOption = False) -> None:
    """Print what is in a bundle, after checking every file.

    That is its config, the state with its size per session, operators, files with
    their hashes, and engines.

    Example: fwl-export inspect demo-bundle
    """
    from fwl_export.bundle.manifest import ENGINES_FOLDER, MODEL_FILE, read_bundle
    from fwl_export.bundle.onnx_file import count_ops

    opened = read_bundle(bundle)
    opened.verify()
    manifest = opened.manifest
    ops = count_ops(opened.file(MODEL_FILE))
    engines = [
        json_module.loads(opened.file(name).read_text(encoding="utf-8"))
        for name in manifest.files
        if name.startswith(ENGINES_FOLDER + "/") and name.endswith(".json")
    ]
    if json:
        print_json({**manifest.to_dict(), "ops": ops, "engines": engines})
        return
    config = manifest.config
    print(
        f"bundle    {bundle}\n"
        f"model     {manifest.model_id[:12]}, {manifest.precision}, opset {manifest.opset}, up to "
        f"{manifest.max_tokens} tokens per call"
    )
    f = config.fast_weights
    print(f"backbone  {_backbone(config.backbone)}, vocabulary {config.vocab_size}")
    print(
        f"FWL       {f.input_size} -> {f.hidden_size} -> {f.output_size}, dense biases "
        f"{'learn' if f.update_dense_bias else 'fixed'},\n"
        f"          steps {f.step_sizes}, decay {f.decay}, N = {f.loss_normalizer:g}, "
        f"{f'anchor every {f.anchor_interval} tokens' if f.anchor_interval else 'no anchor'}"
    )
    print("\nState of one session\n")
    rows = [
        (s.name, s.dtype, "x".join(map(str, s.shape)) or "1", size(s.bytes_per_row))
        for s in manifest.state
    ]
    total = sum(s.bytes_per_row for s in manifest.state)
    print(table(("tensor", "type", "shape", "size"), [*rows, ("total", "", "", size(total))]))
    text = "Operators: " + ", ".join(f"{name}\u00a0{count}" for name, count in ops.items())
    print("\n" + textwrap.fill(text, 80).replace("\u00a0", " "))
    print("\nFiles (all hashes match)\n")
    files = [(name, size(e["bytes"]), e["sha256"][:12]) for name, e in manifest.files.items()]
    print(table(("file", "size", "sha256"), files))
    if engines:
        print("\nEngines\n")
        print(
            table(
                ("engine", "path built", "layers", "plugins", "build"),
                [
                    (
                        e["name"],
                        e["update_path"],
                        str(e["layers"]),
                        str(e["plugin_layers"]),
                        f"{e['build_seconds']:.1f} s",
                    )
                    for e in engines
                ],
            )
        )


def _backbone(backbone: AnyBackboneConfig) -> str:
    from fwl_export.bundle.config import HuggingFaceConfig

    if isinstance(backbone, HuggingFaceConfig):
        end = f"ends at {backbone.max_positions}" if backbone.max_positions else "reads without end"
        kind, parts = backbone.model["model_type"], f"window {backbone.window} ({end})"
        return f"{kind} (Hugging Face), width {backbone.width}, {parts}"
    return (
        f"{backbone.type}, width {backbone.width}, {backbone.layers} layers, {backbone.heads} "
        f"heads, window {backbone.window}"
    )
