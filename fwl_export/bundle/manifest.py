"""The bundle: a folder that `export` writes, and that all other commands read and add to.

    manifest.json                   what the bundle contains, with the sha256 of every file
    model.onnx, model.onnx.data     the streaming model, and its weights
    model.inlined.onnx              the same with standard operators only, for other tools
    model.graph.json                the graph traced from PyTorch, same tensor names, for `bisect`
    tokenizer.json                  the tokenizer, in the format of Hugging Face's tokenizers
    tokenizer_config.json, …        what else the model says about text, see `text_tokenizer`
    precision.json                  with a precision policy only: which parts are quantized
    checkpoint/                     the PyTorch checkpoint, for runtime "torch" and `check`
    engines/                        <variant>-<version>-sm<NN>-<precision>.engine and .json
    reports/                        parity reports, which the manifest does not list

The manifest is the only contract between the exporter and what runs or checks a bundle.
"""

from __future__ import annotations

import hashlib
import html
import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypedDict

from msgspec import Meta

from fwl_export.bundle.config import BackboneConfig, ModelConfig
from fwl_export.bundle.onnx_file import (
    ValueInfo,
    external_data_locations,
    external_tensors,
    graph_values,
)
from fwl_export.bundle.paths import inside
from fwl_export.bundle.state import PAST, PRESENT, StoredSpec, TensorSpec
from fwl_export.errors import BundleError, FwlError, PluginError
from fwl_export.files import finish_replacement, open_regular, replaced_file
from fwl_export.json_files import Count, Name, check_schema, read_json, shown, typed
from fwl_export.op.spec import DOMAIN, FLOAT32_VERSION, NAME, VERSION
from fwl_export.printable import printable

_log = logging.getLogger(__name__)

SCHEMA_VERSION = 3
MANIFEST_FILE = "manifest.json"
MODEL_FILE = "model.onnx"
MODEL_DATA_FILE = "model.onnx.data"
INLINED_FILE = "model.inlined.onnx"
GRAPH_FILE = "model.graph.json"
TOKENIZER_FILE = "tokenizer.json"
PRECISION_FILE = "precision.json"
CHECKPOINT_FOLDER = "checkpoint"
WEIGHTS_FILE = "model.safetensors"  # of the checkpoint
ENGINES_FOLDER = "engines"
REPORTS_FOLDER = "reports"

# Precisions in which the fast-weight updates have float32 activations.
_FLOAT32_PRECISIONS = ("fp32", "int8w")

# How long to wait while other processes add files: each takes as long as hashing its files.
_ADD_SECONDS = 60.0

# Bounds of what a manifest may ask for.
MAX_TOKENS_LIMIT = 1 << 24
STATE_BYTES_LIMIT = 64 << 30  # per row


@dataclass(frozen=True)
class Manifest:
    """The content of manifest.json.

    Attributes:
      config: Configuration of the model.
      precision: Precision of the model: "fp32" or "fp16", the dtype of its activations; or "mix16"
        or "int8w", where activations are float32 and the policy in `PRECISION_FILE` says which
        products or weights are not.
      max_tokens: Largest T of one call.
      opset: Version of ONNX's standard operators in the ONNX file.
      op: Domain, name and version of the fast-weight update, and the number of its nodes, which is
        0 if the model was exported with the updates inlined.
      state: Specs of the recurrent state, in the order of the model's inputs and outputs.
      model_id: Identity of the model, a sha256 over configuration, weights, precision and policy.
        State files carry it.
      versions: Versions of the tools that wrote the bundle, by name.
      files: "sha256" and size in "bytes" of every file, by its path inside the bundle.
    """

    config: ModelConfig
    precision: str
    max_tokens: int
    opset: int
    op: Mapping[str, Any]
    state: Sequence[TensorSpec]
    model_id: str
    versions: Mapping[str, str]
    files: Mapping[str, Mapping[str, Any]]

    def to_dict(self) -> dict[str, Any]:
        """Return the manifest as data for JSON."""
        return {
            "schema_version": SCHEMA_VERSION,
            "model_id": self.model_id,
            "precision": self.precision,
            "max_tokens": self.max_tokens,
            "opset": self.opset,
            "op": dict(self.op),
            "config": self.config.to_dict(),
            "state": [spec.to_dict() for spec in self.state],
            "versions": dict(self.versions),
            "files": {name: dict(entry) for name, entry in sorted(self.files.items())},
        }

    @classmethod
    def from_dict(cls, data: Any, source: str) -> Manifest:
        """Read what `to_dict` wrote.

        Args:
          data: Parsed JSON.
          source: Name of its origin in error messages, e.g. the file's path.

        Raises:
          BundleError: The schema version is not the one that this version of fwl-export reads, a
            part is missing or malformed, or the fast-weight updates are of another version.
        """
        remedy = "export the model again"
        check_schema(data, SCHEMA_VERSION, source, BundleError, remedy)
        stored = typed(data, _Stored, f"{source} is malformed", BundleError, remedy)
        _check_op(stored["op"]["version"], stored["precision"], source)
        config = ModelConfig.from_dict(stored["config"], f"{source}: config")
        state = [TensorSpec.from_dict(spec) for spec in stored["state"]]
        _check_state(config, stored["max_tokens"], state, source)
        values: dict[str, Any] = {**stored, "config": config, "state": state}
        return cls(**values)


class _StoredFile(TypedDict):
    sha256: Name
    bytes: Count


class _StoredOp(TypedDict):
    domain: Name
    name: Name
    version: Count
    nodes: Count


class _Stored(TypedDict):
    """What `Manifest.from_dict` reads of a manifest, and the bounds of its values."""

    config: Any
    precision: Name
    max_tokens: Annotated[int, Meta(ge=1, le=MAX_TOKENS_LIMIT)]
    opset: Annotated[int, Meta(ge=1, le=1000)]
    op: _StoredOp
    state: list[StoredSpec]
    model_id: Name
    versions: dict[Name, Name]
    files: dict[str, _StoredFile]


def _check_op(version: int, precision: str, source: str) -> None:
    """Refuse a bundle whose fast-weight updates would compute something else here.

    Args:
      version: Version of the op in the bundle.
      precision: Precision of the bundle; the older version overflows in half precision.
      source: Name of the manifest in error messages.

    Raises:
      BundleError: The version is unknown, or too old for the precision.
    """
    if not FLOAT32_VERSION <= version <= VERSION:
        raise BundleError(
            f"{source}: {DOMAIN}::{NAME} has version {version}, but this version of fwl-export "
            f"runs versions {FLOAT32_VERSION} to {VERSION}; update fwl-export, or export the model "
            "again"
        )
    if version < VERSION and precision not in _FLOAT32_PRECISIONS:
        raise BundleError(
            f"{source}: the model has the precision {shown(precision)} with version {version} of "
            f"{DOMAIN}::{NAME}, whose sums overflow in half precision; export the model again"
        )


def _check_state(
    config: ModelConfig, max_tokens: int, state: Sequence[TensorSpec], source: str
) -> None:
    """Check that a state can belong to a model, before memory is reserved for it.

    Args:
      config: Configuration of the model.
      max_tokens: Largest T of one call.
      state: Specs of the state's tensors.
      source: Name of the manifest in error messages.

    Raises:
      BundleError: A tensor is named twice, is missing or has another size than the configuration
        says, or all of them exceed `STATE_BYTES_LIMIT`.
    """
    remedy = "export the model again"
    shapes = {spec.name: spec.shape for spec in state}
    if len(shapes) < len(state):
        twice, _ = Counter(spec.name for spec in state).most_common(1)[0]
        raise BundleError(f"{source} is malformed: it names the state '{twice}' twice; {remedy}")
    for name, expected in _known_shapes(config, max_tokens, shapes).items():
        if shapes.get(name) != expected:
            found = list(shapes[name]) if name in shapes else "missing"
            raise BundleError(
                f"{source} is malformed: the state '{name}' is {found}, but the configuration says "
                f"{list(expected)}; {remedy}"
            )
    if (total := sum(spec.bytes_per_row for spec in state)) > STATE_BYTES_LIMIT:
        raise BundleError(
            f"{source} is malformed: its state has {total} bytes per row; expected at most "
            f"{STATE_BYTES_LIMIT}; {remedy}"
        )


def _known_shapes(
    config: ModelConfig, max_tokens: int, names: Iterable[str]
) -> dict[str, tuple[int, ...]]:
    """Return the shapes of those tensors of the state that follow from the configuration.

    Args:
      config: Configuration of the model.
      max_tokens: Largest T of one call.
      names: Names of the state's tensors; only those of caches in use count.
    """
    layer, backbone = config.fast_weights, config.backbone
    d, h, s = layer.input_size, layer.hidden_size, layer.output_size
    kinds = ["fast", "anchor"] if layer.anchor_interval else ["fast"]
    shapes: dict[str, tuple[int, ...]] = {"position": (), "pending.hidden": (d,)}
    for kind in kinds:
        shapes |= {f"{kind}.up.kernel": (d, h), f"{kind}.down.kernel": (h, s)}
    if isinstance(backbone, BackboneConfig):
        head = backbone.width // backbone.heads
        cache = (backbone.heads, backbone.window + max_tokens - 1, head)
        names = [name for name in names if name.startswith("cache.")]
        made = [f"cache.{n}.{kind}" for n in range(backbone.layers) for kind in ("key", "value")]
        shapes |= dict.fromkeys([*made, *names], cache)
    return shapes


class Bundle:
    """A bundle folder whose manifest was read; `read_bundle` makes one.

    Files are checked against the manifest when they are used. That finds damage and mix-ups. It
    does not make a bundle from an untrusted source safe: who writes the files writes the hashes.

    Attributes:
      folder: Path of the folder.
      manifest: What the bundle contains.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        """Describe a folder; use `read_bundle` to read one.

        Args:
          folder: Path of the bundle's folder.
          manifest: Content of its manifest.json.
        """
        self.folder = folder
        self.manifest = manifest

    def __repr__(self) -> str:
        facts = ", ".join(f"{name.lower()} {value}" for name, value in self._summary().items())
        return f"<Bundle {str(self.folder)!r}: {facts}>"

    def _repr_html_(self) -> str:
        """Return an HTML table for notebooks, with all text from the manifest escaped."""
        facts = {"Folder": str(self.folder), **self._summary(), "Model id": self.manifest.model_id}
        facts |= {
            name: _size(entry["bytes"]) for name, entry in sorted(self.manifest.files.items())
        }
        rows = (
            f"<tr><th>{_html(name)}</th><td>{_html(value)}</td></tr>"
            for name, value in facts.items()
        )
        return f"<table>{''.join(rows)}</table>"

    def _summary(self) -> dict[str, str]:
        manifest = self.manifest
        config, fast_weights = manifest.config, manifest.config.fast_weights
        sizes = (fast_weights.input_size, fast_weights.hidden_size, fast_weights.output_size)
        interval = fast_weights.anchor_interval
        return {
            "Precision": manifest.precision,
            "Backbone": f"{config.backbone.type} of width {config.backbone.width}",
            "Vocabulary": f"{config.vocab_size} tokens",
            "Fast weights": " -> ".join(map(str, sizes)),
            "Anchor": f"every {interval} tokens" if interval else "none",
            "State": f"{_size(sum(spec.bytes_per_row for spec in manifest.state))} per row",
        }

    @property
    def checkpoint(self) -> Path:
        """Path of the checkpoint's folder, whether the bundle has a checkpoint or not."""
        return self.folder / CHECKPOINT_FOLDER

    def require_checkpoint(self) -> None:
        """Check that the bundle has a checkpoint.

        Raises:
          BundleError: It has none.
        """
        if not any(name.startswith(f"{CHECKPOINT_FOLDER}/") for name in self.manifest.files):
            raise BundleError(
                f"bundle '{self.folder}' was exported without its checkpoint, which the torch "
                "runtime reads; export it again without --no-checkpoint. `fwl-export check` also "
                "takes --checkpoint FOLDER, or a recorded trace with --against"
            )

    def file(self, name: str) -> Path:
        """Return the path of one of the bundle's files, after checking size and hash.

        Args:
          name: Path inside the bundle, with slashes, e.g. "checkpoint/config.json".

        Raises:
          BundleError: The file is not in the manifest, is missing, or differs from the manifest.
        """
        path, entry = self._listed(name)
        found = describe_file(path)
        if found != entry:
            raise self._differs(name, found, entry)
        return path

    def _listed(self, name: str) -> tuple[Path, Mapping[str, Any]]:
        """Return path and manifest entry of a file, which must exist."""
        path = inside(self.folder, name)
        entry = self.manifest.files.get(name)
        if entry is None:
            raise BundleError(f"bundle '{self.folder}' has no '{name}' in its manifest")
        if not path.is_file():
            raise BundleError(
                f"bundle '{self.folder}' lacks the file '{name}'; copy the bundle again, or export "
                "the model again"
            )
        return path, entry

    def _differs(
        self, name: str, found: Mapping[str, Any], entry: Mapping[str, Any]
    ) -> BundleError:
        return BundleError(
            f"'{name}' in bundle '{self.folder}' has sha256 {found['sha256'][:12]}… and "
            f"{found['bytes']} bytes, but the manifest says {entry['sha256'][:12]}… and "
            f"{entry['bytes']} bytes; it was changed or truncated: copy the bundle again, or "
            "export the model again"
        )

    def read_file(self, name: str) -> bytes:
        """Return the content of one of the bundle's files, after checking size and hash.

        What is returned is what was checked, also if the file on disk is changed at the same time.

        Args:
          name: Path inside the bundle, with slashes, e.g. "tokenizer.json".

        Raises:
          BundleError: The file is not in the manifest, is missing, or differs from the manifest.
        """
        path, entry = self._listed(name)
        with open_regular(path, BundleError) as stream:
            size = os.fstat(stream.fileno()).st_size
            # A file of another size is refused anyway, and may be too large for the memory.
            content = stream.readall() if size == entry["bytes"] else b""
        found = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content) or size}
        if found != entry:
            raise self._differs(name, found, entry)
        return content

    def read_model(self) -> tuple[bytes, dict[str, bytes]]:
        """Return the ONNX file, and its external data by their names, after checking them.

        Raises:
          BundleError: See `read_file`.
        """
        model, path = self.read_file(MODEL_FILE), self.folder / MODEL_FILE
        names = external_data_locations(path, model)
        external_tensors(path, model)  # no tensors but these may have external data
        self._check_graph(graph_values(path, model))
        return model, {name: self.read_file(name) for name in names}

    def model_files(self) -> Path:
        """Return the path of the ONNX file, after checking it and its external data.

        Raises:
          BundleError: See `file`.
        """
        path = self.file(MODEL_FILE)
        for location in external_data_locations(path):
            self.file(location)
        self._check_graph(graph_values(path))
        return path

    def _check_graph(self, values: Mapping[str, ValueInfo]) -> None:
        """Check that the graph has the manifest's state, before memory is reserved for it.

        Args:
          values: Inputs and outputs of the graph.
        """
        vocabulary = TensorSpec("logits", (0, self.manifest.config.vocab_size), "float32")
        expected = {"logits": vocabulary}
        for spec in self.manifest.state:
            expected |= {PAST + spec.name: spec, PRESENT + spec.name: spec}
        missing = [name for name in values if name.startswith(PAST) and name not in expected]
        if missing:
            raise BundleError(
                f"the ONNX file of bundle '{self.folder}' takes {shown(missing[0])}, which is not "
                "in the manifest's state; export the model again"
            )
        for name, spec in expected.items():
            found = values.get(name, ValueInfo("no such tensor", ()))
            same = len(found.shape) == len(spec.shape) + 1 and all(
                not size or not wanted or size == wanted
                for size, wanted in zip(found.shape[1:], spec.shape, strict=True)
            )
            if not same or found.dtype != spec.dtype:
                raise BundleError(
                    f"'{name}' in the ONNX file of bundle '{self.folder}' is {found.dtype} "
                    f"{list(found.shape)}, but the manifest says {spec.dtype} "
                    f"{[0, *spec.shape]}, where 0 is any size; export the model again"
                )

    def has_updates(self, plugin: str | Path, needed: bool = False) -> bool:
        """Return whether the ONNX file has fast-weight updates that a plugin can compute.

        Args:
          plugin: Choice of the plugin library, see `find_plugin`.
          needed: Whether an option was given that works only with the plugin.

        Raises:
          PluginError: The plugin is asked for, but the bundle was exported with `--inline`.
        """
        if self.manifest.op["nodes"]:
            return True
        if needed or plugin not in ("auto", "none"):
            raise PluginError(
                f"the plugin library was asked for, but bundle '{self.folder}' was exported with "
                "--inline and has no fast-weight updates that it could compute; export it again "
                "without --inline"
            )
        return False

    def verify(self) -> None:
        """Check size and hash of every file.

        Raises:
          BundleError: A file is missing or differs from the manifest.
        """
        for name in self.manifest.files:
            self.file(name)

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """Guard a block that loads files: it fails if the bundle is replaced or changed meanwhile.

        `file` checks a file before a runtime reads it. Without this guard, a session could run one
        bundle's model with the manifest of another that replaced it in between.

        Raises:
          BundleError: The bundle was replaced or changed.
        """
        before = self._identity()
        try:
            yield
        except (FwlError, OSError):
            if self._identity() != before:
                raise self._changed() from None
            raise
        if self._identity() != before:
            raise self._changed()

    def _identity(self) -> list[tuple[int, int, int]]:
        """Identify folder and manifest on disk; renaming one, even back again, sets its ctime."""
        try:
            paths = (self.folder, self.folder / MANIFEST_FILE)
            found = [look(path) for path in paths for look in (os.lstat, os.stat)]
        except OSError:  # while one bundle replaces another, there may be none
            return []
        return [(entry.st_dev, entry.st_ino, entry.st_ctime_ns) for entry in found]

    def _changed(self) -> BundleError:
        return BundleError(
            f"bundle '{self.folder}' was replaced or changed while it was opened; open it again"
        )

    def add_files(self, names: Sequence[str]) -> Bundle:
        """Add files that were written into the folder to the manifest.

        Several processes may do so at the same time: one waits for another, and none loses what
        another added.

        Args:
          names: Paths inside the bundle, with slashes.

        Returns:
          The bundle with its new manifest; this object keeps the old one.

        Raises:
          BundleError: A path leads out of the folder, the manifest cannot be read, or the folder
            now holds a bundle of another model, to which nothing is added.
          OutputBusyError: Another process has been changing the manifest for a minute.
          OSError: A file cannot be read, or the manifest cannot be written.
        """
        return self._changed_files(
            lambda files: {
                **files,
                **{name: describe_file(inside(self.folder, name)) for name in names},
            }
        )

    def remove_files(self, names: Sequence[str]) -> Bundle:
        """Take files out of the manifest, whether they are in it or not; they stay on disk.

        Before a file is replaced it is taken out, and added afterwards. So at any moment, even if
        the power fails, every file in the manifest has the hash stated there. For arguments and
        errors, see `add_files`.
        """
        self.check_not_replaced()
        latest = read_bundle(self.folder)
        if latest.manifest.files.keys().isdisjoint(names):
            return latest
        return self._changed_files(lambda files: {n: e for n, e in files.items() if n not in names})

    def _changed_files(self, change: Callable[[_Files], _Files]) -> Bundle:
        """Replace the list of files in the manifest; between reading and writing, nobody else can.

        Args:
          change: Function that returns the new list for the one on disk.
        """
        path = self.folder / MANIFEST_FILE
        try:
            with replaced_file(path, _ADD_SECONDS, through_link=False) as beside:
                latest = read_bundle(self.folder).manifest
                if _model(latest) != _model(self.manifest):
                    raise self._replaced()
                data = {**latest.to_dict(), "files": change(latest.files)}
                beside.write_text(_text(data), encoding="utf-8")
        except FileNotFoundError as error:
            if error.filename != str(path) and self.folder.exists():
                raise
            raise self._replaced() from None  # with the folder in which the manifest was written
        return read_bundle(self.folder)

    def check_not_replaced(self) -> None:
        """Check that the folder still holds this model's bundle, whatever was added to it.

        Raises:
          BundleError: The folder now holds a bundle of another model, or none.
        """
        if _model(read_bundle(self.folder).manifest) != _model(self.manifest):
            raise self._replaced()

    def _replaced(self) -> BundleError:
        return BundleError(
            f"bundle '{self.folder}' was replaced by another export meanwhile, so nothing was "
            "added to it; start again with the new bundle"
        )


_Files = Mapping[str, Mapping[str, Any]]


def _model(manifest: Manifest) -> tuple[dict[str, Any], list[Any]]:
    """Return what tells a bundle's model from another: all but versions and files added later."""
    data = manifest.to_dict()
    del data["versions"], data["files"]
    return data, [manifest.files.get(name) for name in (MODEL_FILE, MODEL_DATA_FILE)]


def is_bundle(folder: Path) -> bool:
    """Return whether a folder looks like a bundle: it has a manifest, valid or not."""
    return (folder / MANIFEST_FILE).is_file()


def bundle_checkpoint(folder: Path) -> Path:
    """Return the folder of the checkpoint in a bundle, after checking its files.

    Args:
      folder: Path of the bundle's folder.

    Raises:
      BundleError: The bundle cannot be read, has no checkpoint, or one of its files was changed.
    """
    bundle = read_bundle(folder)
    names = [name for name in bundle.manifest.files if name.startswith(f"{CHECKPOINT_FOLDER}/")]
    if not names:
        raise BundleError(
            f"bundle '{folder}' was exported without its checkpoint; give the checkpoint's folder"
        )
    for name in names:
        bundle.file(name)
    return Path(folder) / CHECKPOINT_FOLDER


def read_bundle(folder: Path) -> Bundle:
    """Read a bundle's manifest; the other files are checked when they are used.

    Args:
      folder: Path of the bundle's folder.

    Raises:
      BundleError: The folder is not a bundle, or its manifest is malformed, has another schema
        version, or names a path outside the folder.
    """
    folder = Path(folder)
    path = folder / MANIFEST_FILE
    if not path.exists():
        finish_replacement(folder)  # whoever replaced the bundle may have been killed meanwhile
    if path.is_symlink():
        inside(folder, MANIFEST_FILE)
    try:
        data = read_json(path, BundleError)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise BundleError(
            f"'{folder}' is not a bundle: it has no {MANIFEST_FILE}; `fwl-export export` writes one"
        ) from None
    manifest = Manifest.from_dict(data, str(path))
    for name in manifest.files:
        inside(folder, name)
    _log.debug("read bundle '%s', model %s", folder, manifest.model_id[:12])
    return Bundle(folder, manifest)


def write_manifest(folder: Path, data: Mapping[str, Any]) -> None:
    """Write manifest.json; an existing one is replaced once the new one is complete.

    Args:
      folder: Path of the bundle's folder.
      data: Content, as from `Manifest.to_dict`.
    """
    with replaced_file(folder / MANIFEST_FILE, through_link=False) as path:
        path.write_text(_text(data), encoding="utf-8")


def _text(data: Mapping[str, Any]) -> str:
    return json.dumps(data, indent=2) + "\n"


def describe_file(path: Path) -> dict[str, Any]:
    """Return a file's entry for the manifest: "sha256", and size in "bytes".

    Raises:
      BundleError: The path is not a regular file.
      OSError: The file cannot be read.
    """
    with open_regular(path, BundleError) as stream:
        digest = hashlib.file_digest(stream, "sha256")
        return {"sha256": digest.hexdigest(), "bytes": stream.tell()}


def _html(text: str) -> str:
    return html.escape(printable(text))


def _size(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{count / 1e3:.1f} kB"
