"""Run a bundle's ONNX files in other tools, and print what came out as a table.

python -m tools.conformance BUNDLE                 all tools that are installed
python -m tools.conformance BUNDLE --node FOLDER   also onnxruntime-web and -node, which npm
                                                   installs into the folder
python -m tools.conformance BUNDLE openvino        only tools with this word in their name

Every runtime reads the same text, call by call, and carries its own state. Every optimizer rewrites
the file, which ONNX Runtime then runs. What is printed is the largest difference from ONNX Runtime
with the file as it was exported, over the logits of all calls. None of the tools is needed
otherwise; pip install openvino onnxslim onnx-graphsurgeon onnxoptimizer onnxsim.
"""

from __future__ import annotations

import argparse
import functools
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime

from fwl_export.bundle.manifest import INLINED_FILE, MODEL_DATA_FILE, MODEL_FILE, read_bundle
from fwl_export.bundle.state import PAST, PRESENT, TensorSpec, zeros
from fwl_export.model.streaming import OUTPUTS

Arrays = Mapping[str, np.ndarray[Any, Any]]
Run = Callable[[Arrays], Arrays]

NODE_FILES = Path(__file__).with_name("conformance_node")
HEADER = ("tool", "version", "what was tried", "largest difference", "verdict")

# Tokens of each call. With single tokens, with what no power of two divides, and with several
# anchors and windows of a small model.
SIZES = (1, 7, 16, 1, 1, 3, 16, 16, 16, 2)
ROWS = 2

# What a logit may differ by, as a part of the largest one: float32 sums in another order, over a
# few hundred terms and a dozen layers; float16 products, each rounded to 11 bits.
LIMITS = {"fp32": 1e-5, "fp16": 2e-2}

# Seconds that a program may take.
_PATIENCE = 500


@dataclass(frozen=True)
class Row:
    """One row of the table.

    Attributes:
      tool: Name of the tool.
      version: Its version, or "" if it is not installed.
      tried: The file and what was done with it.
      difference: Largest difference of a logit, or None where there were no numbers.
      verdict: What came out of it.
    """

    tool: str
    version: str
    tried: str
    difference: float | None
    verdict: str

    def __str__(self) -> str:
        shown = "" if self.difference is None else f"{self.difference:.1e}"
        return f"| {self.tool} | {self.version} | {self.tried} | {shown} | {self.verdict} |"


class Subject:
    """The bundle that is tried, its calls, and what ONNX Runtime computes from them.

    Attributes:
      folder: Folder of the bundle.
      specs: The state's tensors.
      precision: Precision of the bundle.
      expected: The logits of every call.
    """

    def __init__(self, folder: Path) -> None:
        """Read a bundle and run it.

        Args:
          folder: Folder of the bundle.
        """
        bundle = read_bundle(folder)
        bundle.verify()
        self.folder, manifest = folder, bundle.manifest
        self.specs: Sequence[TensorSpec] = manifest.state
        self.precision = manifest.precision
        self._calls = list(_calls(manifest.config.vocab_size, manifest.max_tokens))
        self.expected = self.logits(in_onnxruntime(folder / MODEL_FILE))

    @property
    def calls(self) -> list[Arrays]:
        """The inputs of every call, without the state."""
        return self._calls

    @property
    def outputs(self) -> list[str]:
        """The names of the model's outputs, in order."""
        return [*OUTPUTS, *(PRESENT + spec.name for spec in self.specs)]

    def logits(self, run: Run) -> list[np.ndarray[Any, Any]]:
        """Return the logits of every call, each from the state that the one before left.

        Args:
          run: Function that runs the model once.
        """
        state = {PAST + name: array for name, array in zeros(self.specs, ROWS).items()}
        found = []
        for call in self._calls:
            results = run({**call, **state})
            found.append(np.array(results["logits"]))
            state = {PAST + s.name: np.array(results[PRESENT + s.name]) for s in self.specs}
        return found

    def verdict(self, found: Sequence[np.ndarray[Any, Any]]) -> tuple[float, str]:
        """Compare logits with the expected ones; return the largest difference and a verdict.

        Args:
          found: The logits of every call.
        """
        pairs = list(zip(found, self.expected, strict=True))
        if any(a.shape != b.shape for a, b in pairs):
            return np.nan, "**wrong shapes**"
        largest = max(float(np.abs(b).max()) for _, b in pairs)
        difference = max(float(np.abs(a.astype(np.float64) - b).max()) for a, b in pairs)
        same = difference <= LIMITS.get(self.precision, LIMITS["fp16"]) * largest
        return difference, "the same" if same else f"**other logits**, of at most {largest:.3g}"


def _calls(vocabulary: int, max_tokens: int) -> Iterator[Arrays]:
    rng = np.random.default_rng(0)
    for size in (min(size, max_tokens) for size in SIZES):
        yield {
            "input_ids": rng.integers(0, vocabulary, (ROWS, size)),
            "label_weights": rng.random((ROWS, size), dtype=np.float32).round(),
            "lengths": np.array([size, size // 2 + 1]),
            "logit_positions": np.tile(np.array([0, size // 2]), (ROWS, 1)),
            "learning_rate_scale": np.ones(ROWS, np.float32),
        }


def in_onnxruntime(path: Path, **settings: Any) -> Run:
    """Return a function that runs an ONNX file in ONNX Runtime.

    Args:
      path: The file.
      settings: Attributes of `SessionOptions` to set.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    for name, value in settings.items():
        setattr(options, name, value)
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return lambda feeds: dict(zip(names, session.run(names, dict(feeds)), strict=True))


def in_reference(path: Path) -> Run:
    """Return a function that runs an ONNX file in onnx's reference evaluator."""
    from onnx.reference import ReferenceEvaluator

    evaluator = ReferenceEvaluator(str(path))
    names = evaluator.output_names
    return lambda feeds: dict(zip(names, evaluator.run(None, dict(feeds)), strict=True))


def in_openvino(path: Path) -> Run:
    """Return a function that runs an ONNX file in OpenVINO, with the types that the file says."""
    import openvino

    # Otherwise it computes in bfloat16 on processors that have it.
    model = openvino.Core().compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    request = model.create_infer_request()
    names = [output.any_name for output in model.outputs]

    def run(feeds: Arrays) -> Arrays:
        request.infer(dict(feeds))
        return {name: request.get_tensor(name).data.copy() for name in names}

    return run


def under_node(subject: Subject, library: str, path: Path, folder: Path) -> list[Any]:
    """Return the logits of every call in a library for Node.

    Args:
      subject: The bundle.
      library: Name of the npm package.
      path: The ONNX file.
      folder: Folder in which the package is installed.
    """
    plan = {
        "model": str(path.resolve()),
        "data": str(path.resolve().with_name(MODEL_DATA_FILE)),
        "outputs": subject.outputs,
        "state": [
            {"name": s.name, "type": s.dtype, "dims": [ROWS, *s.shape]} for s in subject.specs
        ],
        "calls": [{name: _entry(array) for name, array in c.items()} for c in subject.calls],
    }
    with tempfile.TemporaryDirectory() as scratch:
        Path(scratch, "calls.json").write_text(json.dumps(plan), encoding="utf-8")
        _program("node", "run.mjs", library, scratch, cwd=folder)
        return [
            np.fromfile(Path(scratch, str(number), "logits.bin"), np.float32).reshape(want.shape)
            for number, want in enumerate(subject.expected)
        ]


def _entry(array: np.ndarray[Any, Any]) -> dict[str, Any]:
    return {"type": str(array.dtype), "dims": array.shape, "values": array.ravel().tolist()}


def _program(*command: str, cwd: Path) -> None:
    """Run a program; its last line on standard error is what goes wrong."""
    done = subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, check=False, timeout=_PATIENCE
    )
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "rror" in line] or [
            done.stderr[-200:]
        ]
        raise RuntimeError(lines[0].strip())


def install_node(folder: Path) -> None:
    """Install the packages that run under Node into a folder, unless they are there.

    Args:
      folder: Folder to install into; what a package would run at its installation is not run.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for path in NODE_FILES.iterdir():
        shutil.copyfile(path, folder / path.name)
    if not (folder / "node_modules").is_dir():
        _program("npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", cwd=folder)


def onnxslim(source: Path, target: Path) -> None:
    """Rewrite a file with onnxslim."""
    import onnxslim as package

    onnx.save(package.slim(onnx.load(str(source))), str(target))


def graphsurgeon(source: Path, target: Path) -> None:
    """Read, clean and write a file with onnx-graphsurgeon."""
    import onnx_graphsurgeon

    graph = onnx_graphsurgeon.import_onnx(onnx.load(str(source)))
    onnx.save(onnx_graphsurgeon.export_onnx(graph.cleanup().toposort()), str(target))


def onnxoptimizer(source: Path, target: Path) -> None:
    """Rewrite a file with the passes that onnxoptimizer runs by default."""
    import onnxoptimizer as package

    onnx.save(package.optimize(onnx.load(str(source))), str(target))


def onnxsim(source: Path, target: Path) -> None:
    """Simplify a file with onnxsim."""
    import onnxsim as package

    simplified, valid = package.simplify(onnx.load(str(source)))
    if not valid:
        raise ValueError("onnxsim's own check failed")
    onnx.save(simplified, str(target))


def transformer_optimizer(source: Path, target: Path, norms: bool = True) -> None:
    """Rewrite a file with ONNX Runtime's optimizer for transformers.

    Args:
      source: ONNX file to rewrite.
      target: ONNX file to write.
      norms: Whether norms are fused. The fusion removes what a norm computes on the way, without
        looking whether other nodes read it, as the gradients of the fast weights do.
    """
    from onnxruntime.transformers import fusion_options, optimizer

    options = fusion_options.FusionOptions("gpt2")
    options.enable_layer_norm = norms
    model = optimizer.optimize_model(str(source), "gpt2", optimization_options=options, opt_level=0)
    model.save_model_to_file(str(target))


def extended_level(source: Path, target: Path) -> None:
    """Let ONNX Runtime write the file as it has optimized it, at its extended level."""
    level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    in_onnxruntime(source, graph_optimization_level=level, optimized_model_filepath=str(target))


def symbolic_shapes(path: Path) -> None:
    """Run ONNX Runtime's symbolic shape inference, which must keep the names of all sizes."""
    from onnxruntime.tools.symbolic_shape_infer import SymbolicShapeInference

    model = onnx.load(str(path))
    # Calls of functions are unknown operators to it, whose sizes it has to merge with those around.
    merge = bool(model.functions)
    _check_shapes(model, SymbolicShapeInference.infer_shapes(model, auto_merge=merge))


def onnx_shapes(path: Path) -> None:
    """Run onnx's own shape inference, strictly and with values of shapes."""
    model = onnx.load(str(path), load_external_data=False)
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    _check_shapes(model, inferred)


def _check_shapes(model: onnx.ModelProto, inferred: onnx.ModelProto) -> None:
    for before, after in (
        (model.graph.input, inferred.graph.input),
        (model.graph.output, inferred.graph.output),
    ):
        for was, now in zip(before, after, strict=True):
            if was.type != now.type:
                raise ValueError(f"{was.name} has another shape or type afterwards")


RUNTIMES: dict[str, tuple[str, Callable[[Path], Run]]] = {
    "onnx reference evaluator": ("onnx", in_reference),
    "OpenVINO": ("openvino", in_openvino),
}
NODE_LIBRARIES = ("onnxruntime-web", "onnxruntime-node")
OPTIMIZERS: dict[str, tuple[str, Callable[[Path, Path], None]]] = {
    "onnxslim": ("onnxslim", onnxslim),
    "onnx-graphsurgeon": ("onnx-graphsurgeon", graphsurgeon),
    "onnxoptimizer": ("onnxoptimizer", onnxoptimizer),
    "onnxsim": ("onnxsim", onnxsim),
    "ONNX Runtime, extended level": ("onnxruntime", extended_level),
    "ONNX Runtime's transformer optimizer": ("onnxruntime", transformer_optimizer),
    "the same without fused norms": (
        "onnxruntime",
        functools.partial(transformer_optimizer, norms=False),
    ),
}
SHAPES: dict[str, tuple[str, Callable[[Path], None]]] = {
    "ONNX Runtime's symbolic shape inference": ("onnxruntime", symbolic_shapes),
    "onnx's shape inference": ("onnx", onnx_shapes),
}


def rows(subject: Subject, words: Sequence[str] = (), node: Path | None = None) -> Iterator[Row]:
    """Yield the rows of the table.

    Args:
      subject: The bundle.
      words: Words of which a tool's name must contain one; none means all tools.
      node: Folder with packages for Node, see `install_node`; None leaves them out.
    """

    def wanted(tool: str) -> bool:
        return not words or any(word.lower() in tool.lower() for word in words)

    for file in (MODEL_FILE, INLINED_FILE):
        path = subject.folder / file
        for tool, package, tried, run in _attempts(subject, path, node) if path.is_file() else ():
            if wanted(tool):
                yield _tried(tool, package, tried, run, subject)


def _attempts(
    subject: Subject, path: Path, node: Path | None
) -> Iterator[tuple[str, str | Path, str, Callable[[], Any]]]:
    """Yield name, package, file and function of everything that is tried with a file."""
    for tool, (package, load) in RUNTIMES.items():
        yield tool, package, path.name, lambda load=load: subject.logits(load(path))
    for library in NODE_LIBRARIES if node else ():
        assert node is not None
        run = functools.partial(under_node, subject, library, path, node)
        yield library, node / "node_modules" / library, path.name, run
    for tool, (package, infer) in SHAPES.items():
        yield tool, package, path.name, functools.partial(infer, path)
    for tool, (package, rewrite) in OPTIMIZERS.items():
        run = functools.partial(_rewritten, subject, path, rewrite)
        yield tool, package, f"{path.name}, rewritten", run


def _rewritten(subject: Subject, path: Path, rewrite: Callable[[Path, Path], None]) -> list[Any]:
    """Return the logits of a file that an optimizer rewrote, in a folder with the weights."""
    with tempfile.TemporaryDirectory() as scratch:
        source, target = Path(scratch, path.name), Path(scratch, "rewritten.onnx")
        for name in (path.name, MODEL_DATA_FILE):
            shutil.copyfile(path.with_name(name), source.with_name(name))
        rewrite(source, target)
        return subject.logits(in_onnxruntime(target))


def _tried(
    tool: str,
    package: str | Path,
    tried: str,
    run: Callable[[], Any],
    subject: Subject,
) -> Row:
    """Return the row of one attempt; whatever goes wrong in a tool is its verdict.

    Args:
      tool: Name of the tool.
      package: Its Python distribution, or the folder of its npm package.
      tried: What is tried.
      run: Function that does it, and returns the logits of every call, or None without any.
      subject: The bundle, to compare logits with.
    """
    version = _version(package)
    if not version:
        return Row(tool, "", tried, None, "not installed")
    try:
        with _silence():
            found = run()
    except Exception as error:  # each tool has its own exceptions
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        where = ("Exception", "Check ", "[ONNXRuntimeError]")  # not what was wrong
        said = next((x for x in lines if not x.startswith(where)), lines[-1] if lines else "")
        said = said or type(error).__name__
        return Row(tool, version, tried, None, f"**refused**: {said[:160]}".replace("|", "/"))
    if found is None:
        return Row(tool, version, tried, None, "complete, all sizes keep their names")
    return Row(tool, version, tried, *subject.verdict(found))


@contextmanager
def _silence() -> Iterator[None]:
    """Send what tools print to standard error."""
    with redirect_stdout(sys.stderr):
        yield


def _version(package: str | Path) -> str:
    """Return the version of a package, or "" if it is not installed."""
    try:
        if isinstance(package, Path):
            return str(
                json.loads((package / "package.json").read_text(encoding="utf-8"))["version"]
            )
        return metadata.version(package)
    except (OSError, metadata.PackageNotFoundError):
        return ""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="bundle folder")
    parser.add_argument("words", nargs="*", metavar="TOOL", help="words in the names of tools")
    parser.add_argument("--node", type=Path, help="folder to install packages for Node into")
    arguments = parser.parse_args()
    if arguments.node:
        install_node(arguments.node)
    subject = Subject(arguments.bundle)
    print(f"{subject.precision}, {len(SIZES)} calls of {ROWS} rows\n")
    print(f"| {' | '.join(HEADER)} |\n|{'---|' * len(HEADER)}")
    for row in rows(subject, arguments.words, arguments.node):
        print(row, flush=True)


if __name__ == "__main__":
    main()
