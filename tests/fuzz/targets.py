"""What the fuzz reads: for every reader, a good file, and what a user does with it."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from tokenizers import processors

from fwl_export.bundle import onnx_file, state_file
from fwl_export.bundle.config import ModelConfig
from fwl_export.bundle.manifest import read_bundle
from fwl_export.bundle.text_tokenizer import text_tokenizer
from fwl_export.bundle.tokenizer import encode, load_tokenizer, read_ids
from fwl_export.cli.check import _replayed
from fwl_export.engines.metadata import EngineMetadata
from fwl_export.errors import EngineError
from fwl_export.importers import import_block, tensor_bundle
from fwl_export.json_files import read_json
from fwl_export.model.checkpoint import load_checkpoint
from fwl_export.model.fwl_checkpoint import (
    FastWeightsCheckpoint,
    load_fast_weights,
    save_fast_weights,
)
from fwl_export.model.traced_graph import read_graph
from fwl_export.model.training_run import read_run_config
from fwl_export.parity import read_report
from fwl_export.parity import trace as trace_file
from fwl_export.parity.against import check_against, check_origin
from fwl_export.parity.candidates import parse_candidate
from fwl_export.parity.cases import ModelLimits, choose_cases
from fwl_export.parity.record import record_trace
from fwl_export.parity.report.baseline import compare_with_baseline
from fwl_export.precision.policy import PrecisionPolicy, parts, read_policy, write_policy
from fwl_export.runtimes import open_session
from tests.bundles import MAX_TOKENS, VOCABULARY, tiny_model, tiny_tokenizer, write_checkpoint
from tests.fuzz import mutators
from tests.fuzz.mutators import Mutator
from tests.parity.report.examples import candidate, report, tensor

DATA = Path(__file__).parents[1] / "data"


@dataclass(frozen=True)
class Target:
    """A reader under test.

    Attributes:
      name: Name of the target.
      path: The file that is changed.
      good: Its contents before the changes; each input starts from one of them.
      mutators: Ways to change it; one is drawn per change.
      read: Reads the file as the package does, and uses what was read as a user would.
      share: How many of 100 inputs are this target's; the slow ones get fewer.
    """

    name: str
    path: Path
    good: Sequence[bytes]
    mutators: Sequence[Mutator]
    read: Callable[[], object]
    share: float


def targets(bundle: Path, folder: Path) -> Iterator[Target]:
    """Yield all targets; each has a folder of its own.

    Args:
      bundle: Folder of a tiny bundle, which is copied.
      folder: An empty folder to work in.
    """
    for make in _MAKERS:
        own = folder / make.__name__.strip("_")
        own.mkdir(parents=True)
        yield from make(bundle, own)


def _target(
    name: str,
    path: Path,
    kinds: Sequence[Mutator],
    read: Callable[[], object],
    share: float,
    more: Sequence[bytes] = (),
) -> Target:
    return Target(name, path, (path.read_bytes(), *more), kinds, read, share)


def _manifest(bundle: Path, folder: Path) -> Iterator[Target]:
    own = Path(shutil.copytree(bundle, folder / "bundle"))

    def read() -> None:
        opened = read_bundle(own)
        assert repr(opened), opened._repr_html_()
        opened.verify()
        session = open_session(opened)
        _finite(session.feed([1, 2, 3]))

    yield _target("bundle manifest", own / "manifest.json", mutators.JSON, read, 8)


def _checkpoint(bundle: Path, folder: Path) -> Iterator[Target]:
    own = write_checkpoint(folder / "checkpoint")

    def read() -> None:
        model = load_checkpoint(own).model
        logits, _ = model(torch.tensor([[1, 2, 3]]), torch.tensor([[2, 3, 4]]))
        assert logits.shape == (1, 3, model.config.vocab_size)

    yield _target("checkpoint config", own / "config.json", mutators.JSON, read, 9)
    weights = own / "model.safetensors"
    yield _target("checkpoint weights", weights, mutators.SAFETENSORS, read, 8)


def _fast_weights(bundle: Path, folder: Path) -> Iterator[Target]:
    layer = tiny_model().fast_weights
    own = folder / "layer"
    save_fast_weights(own, FastWeightsCheckpoint(layer.config, layer.state_dict()))

    def read() -> None:
        load_fast_weights(own)

    yield _target("layer config", own / "config.json", mutators.JSON, read, 4)
    yield _target("layer weights", own / "model.safetensors", mutators.SAFETENSORS, read, 4)


def _hugging_face(bundle: Path, folder: Path) -> Iterator[Target]:
    from fwl_export.model.checkpoint import save_checkpoint
    from tests.backbones import tiny_pretrained

    model = tiny_pretrained("Llama")
    own = folder / "checkpoint"
    save_checkpoint(own, model, tiny_tokenizer(model.config.vocab_size))

    def read() -> None:
        load_checkpoint(own)

    yield _target("Hugging Face config", own / "config.json", mutators.JSON, read, 2)


def _gguf(bundle: Path, folder: Path) -> Iterator[Target]:
    from fwl_export.model.backbones.gguf import load_gguf, read_header, save_gguf_tokenizer
    from tests.gguf_files import write_gguf

    path = folder / "tiny.gguf"
    write_gguf(path)

    def read() -> None:
        load_gguf(path)
        save_gguf_tokenizer(path, folder / "tokenizer")

    kinds = mutators.BYTES
    yield _target("GGUF header", path, kinds, lambda: read_header(path), 3)
    yield _target("GGUF model", path, kinds, read, 0.5)


def _state(bundle: Path, folder: Path) -> Iterator[Target]:
    session = open_session(bundle)
    session.feed(list(range(20)))
    contents = []
    path = folder / "a.state"
    for compress in ("fp16", "lowrank", "none"):
        session.save_state(path, compress=compress)
        contents.append(path.read_bytes())

    def read() -> None:
        session.reset()
        session.load_state(path)
        _finite(session.feed([1, 2]))

    def read_unchecked() -> None:
        """Read as if the attacker had written the right checksum."""
        check, state_file._check_sum = state_file._check_sum, lambda *_: None
        try:
            read()
        finally:
            state_file._check_sum = check

    kinds, more = mutators.SAFETENSORS, contents[:-1]
    yield _target("state file", path, kinds, read, 6, more)
    yield _target("state file, sha256 right", path, kinds, read_unchecked, 8, more)


def _onnx(bundle: Path, folder: Path) -> Iterator[Target]:
    path = folder / "model.onnx"
    model = onnx.load(str(bundle / "model.onnx"), load_external_data=False)
    inner = onnx.helper.make_graph([], "inner", [], [], [model.graph.initializer[0]])
    model.graph.node.append(onnx.helper.make_node("If", ["x"], ["y"], then_branch=inner))
    small = onnx.ModelProto()
    small.graph.node.append(model.graph.node[-1])
    path.write_bytes(model.SerializeToString())

    def read() -> None:
        found = onnx_file.external_data_locations(path)
        onnx_file.graph_values(path)
        onnx_file.count_ops(path)
        onnx_file.op_inputs(path, "fwl", "LinearAttentionUpdate")
        try:
            parsed = onnx.load_model_from_string(path.read_bytes())
        except Exception:  # whatever the package onnx raises, nothing would load such a file
            return
        assert _external(parsed) <= found, (_external(parsed), found)

    more = [small.SerializeToString()]
    yield _target("ONNX file", path, mutators.PROTOBUF, read, 8, more)


def _external(message: Any) -> set[str]:
    """Return the files that tensors anywhere in a protobuf message name; the slow, sure way."""
    if isinstance(message, onnx.TensorProto):
        return {e.value for e in message.external_data if e.key == "location"}
    return {
        location
        for field, value in message.ListFields()
        if field.type == field.TYPE_MESSAGE
        for part in (value if isinstance(value, Sequence) or hasattr(value, "append") else [value])
        for location in _external(part)
    }


def _engine(bundle: Path, folder: Path) -> Iterator[Target]:
    path = folder / "engine.json"
    sizes = {kind: [1, 8] for kind in ("min", "opt", "max")}
    shape = {"name": "input_ids", "shape": [-1, -1], "dtype": "int64"}
    values = {
        **dict.fromkeys([f.name for f in dataclasses.fields(EngineMetadata)], "x"),
        **dict.fromkeys(("tf32", "plugin_embedded", "in_place_state"), False),
        **dict.fromkeys(("layers", "plugin_layers", "sm", "engine_bytes", "build_seconds"), 7),
        "inputs": [shape],
        "outputs": [shape],
        "flavour": "rtx",
        "in_place_tensors": ["fast.up.kernel"],
        "profiles": [{"name": "decode", "inputs": {"input_ids": sizes}}],
        "versions": {"tensorrt": "1"},
        "schema_version": 1,
    }
    path.write_text(json.dumps(values), encoding="utf-8")

    def read() -> None:
        found = EngineMetadata.from_dict(read_json(path, EngineError), str(path))
        assert EngineMetadata.from_dict(found.to_dict(), "again") == found

    yield _target("engine metadata", path, mutators.JSON, read, 6)


def _report(bundle: Path, folder: Path) -> Iterator[Target]:
    path, opened = folder / "parity.json", read_bundle(bundle)
    verdict = candidate(tensor("logits", 0.5), tensor("fast.up.kernel", 0.1))
    report(verdict).write(path)
    data = json.loads(path.read_bytes())
    data["settings"] |= {"cases": ["text@20", "decode@5"], "candidates": ["torch:float32"]}
    data["text"]["ids"] = list(range(VOCABULARY)) * 2
    data["bundle"]["model_id"] = opened.manifest.model_id
    path.write_text(json.dumps(data), encoding="utf-8")

    def baseline() -> None:
        compare_with_baseline([verdict], read_report(path))

    def replay() -> None:
        request = _replayed(opened, tiny_tokenizer(), {}, None, path)
        options, limits = request.options, ModelLimits(MAX_TOKENS, vocab_size=VOCABULARY)
        for case in choose_cases(options["cases"], options["tokens"], limits, options["seed"]):
            calls = iter(case.calls(request.ids, limits, options["seed"]))
            next(calls)
        for name in (options["reference"], *options["candidates"]):
            parse_candidate(name)

    yield _target("report as baseline", path, mutators.JSON, baseline, 5)
    yield _target("report to replay", path, mutators.JSON, replay, 5)


def _policy(bundle: Path, folder: Path) -> Iterator[Target]:
    path, model = folder / "precision.json", tiny_model()
    names = list(parts(model, "int8w"))
    write_policy(path, PrecisionPolicy("int8w", names[:3], names[3:], {"error": 1e-3}))

    def read() -> None:
        read_policy(path).check(model)

    yield _target("precision policy", path, mutators.JSON, read, 6)


def _training(bundle: Path, folder: Path) -> Iterator[Target]:
    path = folder / "run.toml"
    text = """output = "run"
texts = ["a.txt", "plays/*.txt"]
tokenizer = "tokenizer.json"
save_every = 5
device = "cpu"
tensorboard = false
[model.backbone]
width = 16
heads = 2
rotary_base = 10000.0
norm = "rms"
[model.fast_weights]
hidden_size = 32
step_sizes = "per_tensor"
norm_epsilon = 1e-6
[training]
steps = 3
learning_rate = 4e-3
weight_decay = 0.1
cooldown = 0.5
seed = 0
optimizer = "muon"
"""
    path.write_text(text, encoding="utf-8")
    yield _target("training config", path, mutators.TOML, lambda: read_run_config(path), 6)


def _tokenizer(bundle: Path, folder: Path) -> Iterator[Target]:
    path = folder / "tokenizer.json"
    tiny_tokenizer().save(str(path))

    def read() -> None:
        tokenizer = load_tokenizer(path, VOCABULARY)
        ids = encode("AN ATTACK", tokenizer).tolist()
        assert all(0 <= token < VOCABULARY for token in ids)
        tokenizer.decode(ids)

    yield _target("tokenizer", path, mutators.JSON, read, 5)
    yield from _text_files(folder / "files")


def _text_files(folder: Path) -> Iterator[Target]:
    """Yield a target for each file that says how text is read."""
    added = {"content": "]", "lstrip": False, "normalized": False, "special": True}
    settings = {
        "added_tokens_decoder": {"61": added},
        "extra_special_tokens": ["!", {"content": "?"}],
        "bos_token": "[",
        "eos_token": {"content": "]", "__type": "AddedToken"},
        "add_bos_token": True,
        "chat_template": [{"name": "default", "template": "[{{ messages[0].content }}]"}],
        "clean_up_tokenization_spaces": True,
        "tokenizer_class": "GPT2Tokenizer",
    }
    contents = {
        "tokenizer_config.json": settings,
        "special_tokens_map.json": {"bos_token": "["},
        "generation_config.json": {"eos_token_id": [3, 4]},
    }
    folder.mkdir()
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens(["]"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[ $A ]", special_tokens=[("[", 59), ("]", 61)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    for name, content in contents.items():
        (folder / name).write_text(json.dumps(content))

    def read() -> None:
        tokenizer = text_tokenizer(folder, ModelConfig(VOCABULARY))
        for special in (True, False):
            ids = tokenizer.encode("AN [ATTACK]", start=True, special=special)
            assert ((ids >= 0) & (ids < VOCABULARY)).all()
        decoder = tokenizer.decoder(ids)
        assert isinstance("".join(map(decoder.add, ids.tolist())) + decoder.finish(), str)

    for name in ("tokenizer.json", *contents):
        yield _target(f"text {name}", folder / name, mutators.JSON, read, 3)


def _traced_graph(bundle: Path, folder: Path) -> Iterator[Target]:
    path = Path(shutil.copy(bundle / "model.graph.json", folder))
    session = open_session(bundle, "torch")
    model = tiny_model()
    parameters = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    inputs = {
        "input_ids": torch.tensor([[1, 2]]),
        "label_weights": torch.ones(1, 2),
        "lengths": torch.tensor([2]),
        "logit_positions": torch.tensor([[0, 1]]),
        "learning_rate_scale": torch.ones(1),
        **{
            f"past.{spec.name}": torch.zeros(1, *spec.shape, dtype=getattr(torch, spec.dtype))
            for spec in session.specs
        },
    }

    def read() -> None:
        read_graph(path).run(parameters, inputs, torch.float64)

    yield _target("traced graph", path, mutators.JSON, read, 4)


def _importers(bundle: Path, folder: Path) -> Iterator[Target]:
    rng = np.random.default_rng(0)
    sizes = {"d": 4, "h": 6, "s": 4, "V": 8}
    from fwl_export.importers.paper import _FLAT_NAMES, _JAX_NAMES, _axes

    def tree(names: dict[str, str]) -> dict[str, Any]:
        shapes = {path: [sizes[a] for a in _axes(name)] for name, path in names.items()}
        return {path: rng.normal(size=shape).astype(np.float32) for path, shape in shapes.items()}

    flat, packed = folder / "block.npz", folder / "block.msgpack"
    np.savez(flat, **tree(_FLAT_NAMES))
    packed.write_bytes(_msgpack(tree(_JAX_NAMES)))
    yield _target("importer, npz", flat, mutators.BYTES, lambda: import_block("tf", flat, 8.0), 4)
    yield _target(
        "importer, msgpack", packed, mutators.BYTES, lambda: import_block("jax", packed, 8.0), 4
    )


def _msgpack(arrays: dict[str, Any]) -> bytes:
    """Return Flax parameters as flax.serialization writes them."""
    import msgpack

    tree: dict[str, Any] = {}
    for path, array in arrays.items():
        *folders, name = path.split("/")
        place = tree
        for part in folders:
            place = place.setdefault(part, {})
        content = msgpack.packb((array.shape, array.dtype.name, array.tobytes()))
        place[name] = msgpack.ExtType(1, content)
    found: bytes = msgpack.packb(tree)
    return found


def _tensor_bundle(bundle: Path, folder: Path) -> Iterator[Target]:
    (source,) = DATA.rglob("*.index")
    for path in source.parent.iterdir():
        shutil.copy(path, folder)
    index = folder / source.name

    def read() -> None:
        for load in tensor_bundle.read_bundle(index).values():
            load()

    def read_unchecked() -> None:
        """Read as if the attacker had written the right checksums."""
        check, tensor_bundle._check_crc = tensor_bundle._check_crc, lambda *_: None
        try:
            read()
        finally:
            tensor_bundle._check_crc = check

    kinds = (*mutators.PROTOBUF,)
    yield _target("TensorFlow checkpoint", index, kinds, read, 3)
    yield _target("TensorFlow checkpoint, crc right", index, kinds, read_unchecked, 4)


def _trace(bundle: Path, folder: Path) -> Iterator[Target]:
    path, opened = folder / "a.trace", read_bundle(bundle)
    ids = np.random.default_rng(0).integers(0, VOCABULARY, 40)
    trace_file.write_trace(path, record_trace(opened, ids, 16, cases="text", text="play"))

    def read() -> None:
        trace = trace_file.read_trace(path)
        check_origin(opened.manifest, trace, path.name)
        check_against(opened, trace, "onnxruntime:no-plugin").to_dict()

    def read_unchecked() -> None:
        """Read as if the attacker had written the right checksum."""
        check = trace_file.checksum
        trace_file.checksum = lambda tensors, metadata: metadata.get("sha256", "")
        try:
            read()
        finally:
            trace_file.checksum = check

    yield _target("trace", path, mutators.SAFETENSORS, read, 2)
    yield _target("trace, checksum right", path, mutators.SAFETENSORS, read_unchecked, 2)


def _text(bundle: Path, folder: Path) -> Iterator[Target]:
    path, tokenizer = folder / "a.txt", tiny_tokenizer()
    path.write_text("ALL THE WORLD'S A STAGE\n" * 9, encoding="utf-8")
    yield _target("text", path, mutators.BYTES, lambda: read_ids(path, tokenizer), 3)


_MAKERS = (
    *(_manifest, _checkpoint, _fast_weights, _hugging_face, _gguf, _state, _onnx, _engine, _report),
    *(_policy, _training, _tokenizer, _traced_graph, _importers, _tensor_bundle, _text, _trace),
)


def _finite(array: Any) -> None:
    assert np.isfinite(array).all()
