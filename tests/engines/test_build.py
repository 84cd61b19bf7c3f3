"""Building engines into a bundle: what is written, refused, and left behind by a failure."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx
import pytest

from fwl_export import __version__, files, open_session
from fwl_export.bundle.manifest import MODEL_FILE, Bundle, read_bundle
from fwl_export.engines import EngineMetadata, build, build_engines, query_driver
from fwl_export.engines.build import _targets
from fwl_export.engines.request import BuildRequest
from fwl_export.engines.worker import Probe, describe_variant
from fwl_export.errors import (
    BundleError,
    DeviceError,
    EngineError,
    MissingDependencyError,
    OutputBusyError,
)
from fwl_export.files import replaced_file, replaced_folder
from fwl_export.model.streaming import INPUTS
from fwl_export.runtimes.tensorrt import engine as tensorrt_engine
from tests.bundles import MAX_TOKENS, VOCABULARY
from tests.engines.conftest import QuickWorker

REPOSITORY = Path(__file__).parents[2]


def engine_files(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "engines").rglob("*"))


def manifest_engines(folder: Path) -> list[str]:
    files = read_bundle(folder).manifest.files
    return sorted(name for name in files if name.startswith("engines/"))


# The real builder.


@pytest.fixture(scope="module")
def built(
    rtx: None, tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Bundle, list[EngineMetadata]]:
    folder = tmp_path_factory.mktemp("built") / "bundle"
    shutil.copytree(tiny_bundle, folder)
    engines = build_engines(
        read_bundle(folder), "rtx", [80, 89], chunk=8, max_batch=4, plugin="none"
    )
    return read_bundle(folder), engines


def test_one_engine_for_each_sm_is_in_the_bundle(
    built: tuple[Bundle, list[EngineMetadata]],
) -> None:
    bundle, engines = built
    version = describe_variant("rtx").version
    names = [f"rtx-{version}-sm{sm}-fp32" for sm in (80, 89)]
    assert [engine.name for engine in engines] == names
    expected = sorted(name + end for name in names for end in (".engine", ".json"))
    assert engine_files(bundle.folder) == expected
    assert manifest_engines(bundle.folder) == [f"engines/{name}" for name in expected]
    bundle.verify()
    for engine in engines:
        path = bundle.file(f"engines/{engine.name}.json")
        assert json.loads(path.read_text()) == engine.to_dict()
        entry = bundle.manifest.files[f"engines/{engine.name}.engine"]
        assert entry == {"sha256": engine.sha256, "bytes": engine.engine_bytes}
        assert engine.engine_bytes > 1 << 20


def test_metadata_of_a_real_engine(built: tuple[Bundle, list[EngineMetadata]]) -> None:
    bundle, (engine, _) = built
    assert (engine.variant, engine.sm, engine.precision, engine.tf32) == ("rtx", 80, "fp32", False)
    assert (engine.plugin_layers, engine.update_path) == (0, "function body")
    assert engine.layers > 100
    assert engine.build_seconds > 0
    assert engine.model_id == bundle.manifest.model_id
    assert set(engine.versions) == {"fwl-export", "tensorrt_rtx", "polygraphy"}
    assert engine.versions["fwl-export"] == __version__
    assert engine.versions["tensorrt_rtx"] == engine.version

    state = bundle.manifest.state
    names = [*INPUTS, *(f"past.{s.name}" for s in state)]
    assert [tensor.name for tensor in engine.inputs] == names
    assert [tensor.name for tensor in engine.outputs] == [
        "logits",
        *(f"present.{spec.name}" for spec in state),
    ]
    for tensors in (engine.inputs[len(INPUTS) :], engine.outputs[1:]):
        for tensor, spec in zip(tensors, state, strict=True):
            assert (tuple(tensor.shape), tensor.dtype) == ((-1, *spec.shape), spec.dtype)
    assert (engine.outputs[0].shape, engine.outputs[0].dtype) == ([-1, -1, VOCABULARY], "float32")


def test_profiles_of_a_real_engine(built: tuple[Bundle, list[EngineMetadata]]) -> None:
    _, (engine, _) = built
    decode, prefill = engine.profiles
    assert (decode.name, prefill.name) == ("decode", "prefill")
    for profile, ids in (
        (decode, {"min": [1, 1], "opt": [1, 1], "max": [4, 1]}),
        (prefill, {"min": [1, 1], "opt": [1, 8], "max": [4, 8]}),
    ):
        assert list(profile.inputs) == [tensor.name for tensor in engine.inputs]
        assert profile.inputs["input_ids"] == profile.inputs["label_weights"] == ids
        assert profile.inputs["lengths"] == {"min": [1], "opt": [1], "max": [4]}
        assert profile.inputs["past.pending.hidden"] == {
            "min": [1, 16],
            "opt": [1, 16],
            "max": [4, 16],
        }


def test_a_real_engine_on_a_machine_without_a_gpu(
    built: tuple[Bundle, list[EngineMetadata]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensorrt_engine, "query_driver", lambda: query_driver("libnone.so.1"))
    with pytest.raises(DeviceError) as caught:
        open_session(built[0], runtime="tensorrt")
    assert str(caught.value) == (
        "runtime 'tensorrt' needs an NVIDIA GPU, and there is no CUDA device: "
        "libnone.so.1 is not installed; use runtime 'onnxruntime'"
    )


def test_fp16_and_an_sm_that_the_builder_refuses(
    rtx: None, tiny_bundle_fp16: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_bundle_fp16, tmp_path / "bundle"))
    with pytest.raises(EngineError) as caught:
        build_engines(read_bundle(folder), "rtx", [86, 75], "fp16")
    message = str(caught.value)
    name = f"rtx-{describe_variant('rtx').version}-sm86-fp16"
    assert "cannot build for SM75" in message
    assert "FP32 GEMM is not supported" in message
    assert "architecture for which this builder has float32 products is SM80" in message
    assert message.endswith(f"; the bundle keeps the engines built before: {name}")
    assert manifest_engines(folder) == [f"engines/{name}.engine", f"engines/{name}.json"]
    read_bundle(folder).verify()
    metadata = json.loads((folder / "engines" / f"{name}.json").read_text())
    dtypes = {tensor["name"]: tensor["dtype"] for tensor in metadata["inputs"]}
    assert dtypes["past.cache.0.key"] == "float16"
    assert dtypes["past.fast.up.kernel"] == "float32"


def test_an_operator_that_the_parser_does_not_know(rtx: None, own_bundle: Path) -> None:
    model = onnx.load(str(own_bundle / MODEL_FILE), load_external_data=False)
    node = next(n for n in model.graph.node if n.op_type == "MatMul")
    node.op_type = "NoSuchOp"
    (own_bundle / MODEL_FILE).write_bytes(model.SerializeToString())
    bundle = read_bundle(own_bundle).add_files([MODEL_FILE])
    with pytest.raises(EngineError, match=r"cannot read 'model\.onnx': In node .*NoSuchOp"):
        build_engines(bundle, "rtx", [80])
    assert engine_files(own_bundle) == []


def group_ends(group: int) -> bool:
    """Return whether a process group ends within ten seconds.

    A worker that was still starting when the signal came is orphaned when the command ends, and the
    system takes a moment to reap it.
    """
    for _ in range(200):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


def test_ctrl_c_ends_the_worker_and_leaves_nothing(rtx: None, own_bundle: Path) -> None:
    # A shell makes its background jobs ignore Ctrl-C, and their children inherit that.
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    code += "from fwl_export.cli.main import main; main()"
    with subprocess.Popen(
        [sys.executable, "-c", code, "build", str(own_bundle), "--sm", "80"],
        cwd=REPOSITORY,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # a process group of its own, as in a terminal
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "engine 1 of 1" in line:
                os.killpg(process.pid, signal.SIGINT)
                break
        assert "Traceback" not in process.stderr.read()
    assert process.returncode == 130
    assert group_ends(process.pid), "the worker is still running"
    assert engine_files(own_bundle) == []
    assert manifest_engines(own_bundle) == []
    read_bundle(own_bundle).verify()


# What happens around it.


def build_quickly(folder: Path, sms: Sequence[int] = (80, 86)) -> list[EngineMetadata]:
    return build_engines(read_bundle(folder), "rtx", sms)


def test_a_rebuild_replaces_the_engine(quick_worker: QuickWorker, own_bundle: Path) -> None:
    (first,) = build_quickly(own_bundle, [80])
    quick_worker.content = b"another engine"
    (second,) = build_quickly(own_bundle, [80])
    assert (first.name, first.sha256 != second.sha256) == (second.name, True)
    assert (own_bundle / "engines" / f"{second.name}.engine").read_bytes() == b"another engine"
    assert engine_files(own_bundle) == ["rtx-1.2.3-sm80-fp32.engine", "rtx-1.2.3-sm80-fp32.json"]
    read_bundle(own_bundle).verify()


def test_an_interrupt_keeps_what_was_finished_and_nothing_else(
    quick_worker: QuickWorker, own_bundle: Path
) -> None:
    quick_worker.error, quick_worker.fail_at = KeyboardInterrupt(), 1
    with pytest.raises(KeyboardInterrupt):
        build_quickly(own_bundle)
    assert len(quick_worker.requests) == 2
    expected = ["rtx-1.2.3-sm80-fp32.engine", "rtx-1.2.3-sm80-fp32.json"]
    assert engine_files(own_bundle) == expected
    assert manifest_engines(own_bundle) == [f"engines/{name}" for name in expected]
    read_bundle(own_bundle).verify()


def test_an_interrupted_rebuild_keeps_the_old_engine(
    quick_worker: QuickWorker, own_bundle: Path
) -> None:
    build_quickly(own_bundle, [80])
    quick_worker.error, quick_worker.fail_at = KeyboardInterrupt(), 1
    with pytest.raises(KeyboardInterrupt):
        build_quickly(own_bundle, [80])
    assert engine_files(own_bundle) == ["rtx-1.2.3-sm80-fp32.engine", "rtx-1.2.3-sm80-fp32.json"]
    read_bundle(own_bundle).verify()


def test_power_that_fails_between_files_and_manifest_leaves_a_bundle_that_verifies(
    quick_worker: QuickWorker, own_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_quickly(own_bundle, [80])
    quick_worker.content = b"another engine"

    def fail(self: Bundle, names: Sequence[str]) -> None:
        raise SystemExit

    monkeypatch.setattr(Bundle, "add_files", fail)
    with pytest.raises(SystemExit):
        build_quickly(own_bundle, [80])
    read_bundle(own_bundle).verify()


@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_an_export_that_replaces_the_bundle_gets_no_engine_of_the_old_model(
    quick_worker: QuickWorker,
    own_bundle: Path,
    tiny_bundle_fp16: Path,
    monkeypatch: pytest.MonkeyPatch,
    when: str,
) -> None:
    def export() -> None:
        with replaced_folder(own_bundle) as beside:
            shutil.copytree(tiny_bundle_fp16, beside, dirs_exist_ok=True)

    original = build.build_in_worker

    def replaced_meanwhile(*arguments: Any) -> Any:
        network = original(*arguments)
        export()
        return network

    bundle = read_bundle(own_bundle)
    if when == "before":
        bundle.model_files()
        monkeypatch.setattr(Bundle, "model_files", lambda self: self.folder / MODEL_FILE)
        export()
    else:
        monkeypatch.setattr(build, "build_in_worker", replaced_meanwhile)
    with pytest.raises(BundleError, match="was replaced by another export meanwhile, so nothing"):
        build_engines(bundle, "rtx", [80])
    assert [path for path in own_bundle.rglob("*") if "sm80" in path.name] == []
    assert manifest_engines(own_bundle) == []
    read_bundle(own_bundle).verify()


def test_the_same_engine_is_not_built_twice_at_a_time(
    quick_worker: QuickWorker, own_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "WAIT_SECONDS", 0)
    engine = own_bundle / "engines" / "rtx-1.2.3-sm80-fp32.engine"
    busy = r"sm80-fp32\.(engine|json)' is being written by another process"
    with replaced_file(engine) as beside:
        beside.write_bytes(b"half")
        with pytest.raises(OutputBusyError, match=busy):
            build_quickly(own_bundle, [80])
    assert manifest_engines(own_bundle) == []
    (other,) = build_quickly(own_bundle, [86])
    assert other.sm == 86


def test_a_full_disk_is_reported_with_the_engines_name(
    quick_worker: QuickWorker, own_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(request: BuildRequest, tick: object) -> None:
        request.output.write_bytes(b"en")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(request.output))

    monkeypatch.setattr("fwl_export.engines.build.build_in_worker", fail)
    with pytest.raises(OSError, match="No space") as caught:
        build_quickly(own_bundle)
    assert caught.value.errno == errno.ENOSPC
    target = own_bundle / "engines" / "rtx-1.2.3-sm80-fp32.engine"
    assert caught.value.filename == str(target)
    assert engine_files(own_bundle) == []
    read_bundle(own_bundle).verify()


@pytest.mark.parametrize(("layers", "path"), [(0, "function body"), (2, "plugin")])
def test_the_path_that_was_built(
    quick_worker: QuickWorker, own_bundle: Path, layers: int, path: str
) -> None:
    quick_worker.plugin_layers = layers
    (engine,) = build_quickly(own_bundle, [80])
    assert (engine.plugin_layers, engine.update_path) == (layers, path)


def test_half_the_updates_as_plugins_is_an_error(
    quick_worker: QuickWorker, own_bundle: Path
) -> None:
    quick_worker.plugin_layers = 1
    with pytest.raises(EngineError, match="1 of 2 fast-weight updates became plugin layers"):
        build_quickly(own_bundle)
    assert engine_files(own_bundle) == []


def test_progress_says_which_engine_and_how_long(
    quick_worker: QuickWorker, own_bundle: Path
) -> None:
    said: list[str] = []
    build_engines(read_bundle(own_bundle), "rtx", [80, 86], progress=said.append)
    assert said == [
        "loading TensorRT-RTX",
        "engine 1 of 2 for SM80",
        "engine 1 of 2 for SM80, 1 s",
        "engine 2 of 2 for SM86",
        "engine 2 of 2 for SM86, 1 s",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"precision": "fp16"}, "is fp32 and engines take their types from the ONNX file; export"),
        ({"chunk": 0}, f"chunk is 0; expected 1 to {MAX_TOKENS}"),
        ({"chunk": MAX_TOKENS + 1}, f"chunk is 17; expected 1 to {MAX_TOKENS}"),
        ({"max_batch": 0}, "max_batch is 0; expected 1 or more"),
        ({"sms": []}, "no SM was given"),
        (
            {"sms": [80, 90]},
            "TensorRT-RTX 1.2.3 cannot build for SM90; expected one of 80, 86, 89, 120",
        ),
        ({"variant": "trt"}, "variant 'trt' is unknown"),
    ],
)
def test_arguments_that_do_not_fit(
    quick_worker: QuickWorker, own_bundle: Path, arguments: dict, message: str
) -> None:
    with pytest.raises(EngineError, match=re.escape(message)):
        build_engines(read_bundle(own_bundle), **arguments)
    assert quick_worker.requests == []


def test_a_variant_that_is_not_installed(own_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=re.escape("'fwl-export[rtx]'")):
        build_engines(read_bundle(own_bundle))
    assert not (own_bundle / "engines").exists()


@pytest.mark.parametrize("content", [b"not a model", b""])
def test_a_model_file_that_is_broken(
    quick_worker: QuickWorker, own_bundle: Path, content: bytes
) -> None:
    (own_bundle / MODEL_FILE).write_bytes(content)
    with pytest.raises(BundleError, match="it was changed or truncated"):
        build_quickly(own_bundle)


def test_tensorrt_builds_for_the_gpu_that_is_present_only() -> None:
    here, nowhere = Probe("10.9", (90,), {}, ""), Probe("10.9", (), {}, "")
    assert _targets("tensorrt", None, here) == [90]
    assert _targets("tensorrt", [90, 90], here) == [90]
    with pytest.raises(EngineError, match="SM89 was asked for, but TensorRT builds only for the"):
        _targets("tensorrt", [89], here)
    with pytest.raises(EngineError, match="and there is none here; build on a machine with"):
        _targets("tensorrt", None, nowhere)


def test_rtx_builds_for_four_architectures_by_default() -> None:
    assert _targets("rtx", None, Probe("1.7", (75, 80, 86, 89, 120, 121), {}, "")) == [
        80,
        86,
        89,
        120,
    ]
