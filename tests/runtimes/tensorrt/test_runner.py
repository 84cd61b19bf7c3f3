"""Sessions on engines, with fakes of TensorRT and CUDA that compute and refuse misuse."""

from __future__ import annotations

import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fwl_export import open_session
from fwl_export.bundle.state import TensorSpec
from fwl_export.engines import EngineMetadata
from fwl_export.engines.metadata import ProfileMetadata
from fwl_export.errors import (
    BundleError,
    ConfigError,
    DeviceError,
    EngineError,
    FwlError,
    MissingDependencyError,
    PluginError,
    ShapeError,
)
from fwl_export.runtimes import Session
from fwl_export.runtimes.tensorrt.runner import choose_profile, state_addresses, state_layout
from tests.bundles import MAX_TOKENS, VOCABULARY
from tests.cuda_fake import cudaError_t
from tests.tensorrt_fake import Machine
from tests.tolerances import assert_close

CALLS = ([5, 5, 5], [1, 1, 1], [1, 0, 1], [1, 1, 1], [40, 3, 9], [1, 1, 1], [1, 1, 1], [1, 1, 1])

# Ways to build an engine, by arguments of `Machine.build`. All must give the same results.
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "plugin": {"plugin": True},
    "in_place": {"plugin": True, "in_place_state": True},
    "embedded": {"plugin": True, "embed_plugin": True},
    "small_chunk": {"chunk": 7},
    "one_token": {"chunk": 1},
}


def ids(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCABULARY, shape)


def same_state(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return all(np.array_equal(a[name], b[name]) for name in a)


def exact(bundle: Path, batch: int = 1) -> Session:
    """Return a session in ONNX Runtime, which the fake computes with: equal bit for bit."""
    return open_session(bundle, batch=batch, plugin="none", threads=1)


def opened(machine: Machine, bundle: Path, batch: int = 1, **options: Any) -> Session:
    return open_session(bundle, "tensorrt", batch, **{"plugin": machine.library, **options})


def build(machine: Machine, bundle: Path, kind: str = "plain", **more: Any) -> EngineMetadata:
    options = {**KINDS[kind], **more}
    if "plugin" in options:
        options["plugin"] = machine.library
    return machine.build(bundle, **options)


def session_of(machine: Machine, bundle: Path, kind: str, batch: int = 1, **more: Any) -> Session:
    build(machine, bundle, kind)
    plugin = machine.library if "plugin" in KINDS[kind] else "auto"
    return open_session(bundle, "tensorrt", batch, plugin=plugin, **more)


@pytest.mark.parametrize("module", ["tensorrt_rtx", "tensorrt"])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_onnxruntime(machine: Machine, own_bundle: Path, kind: str, module: str) -> None:
    machine.install(module)
    build(machine, own_bundle, kind, variant="rtx" if module == "tensorrt_rtx" else "tensorrt")
    plugin = machine.library if "plugin" in KINDS[kind] else "auto"
    session = open_session(own_bundle, "tensorrt", 3, plugin=plugin)
    assert session.max_tokens == KINDS[kind].get("chunk", MAX_TOKENS)
    expected = open_session(own_bundle, batch=3, plugin="none", threads=1)
    expected.max_tokens = session.max_tokens
    for call, lengths in enumerate(CALLS):
        tokens = ids(3, max(lengths), seed=call)
        for last_only in (False, True):
            found = session.feed(tokens, lengths=lengths, last_only=last_only)
            wanted = expected.feed(tokens, lengths=lengths, last_only=last_only)
            np.testing.assert_array_equal(found, wanted)
    assert same_state(expected.state, session.state)
    assert machine.cuda.launches > 4
    del session
    assert machine.cuda.alive == {"memory": 0, "pinned": 0, "streams": 0, "graphs": 0}


def test_half_precision_and_anchors(
    machine: Machine, tmp_path: Path, tiny_bundle_fp16: Path, anchored_bundle: Path
) -> None:
    for number, source in enumerate((tiny_bundle_fp16, anchored_bundle)):
        bundle = Path(shutil.copytree(source, tmp_path / str(number)))
        session, expected = session_of(machine, bundle, "plain", 2), exact(bundle, 2)
        for size in (30, 1, 1, 1):
            tokens = ids(2, size)
            np.testing.assert_array_equal(session.feed(tokens), expected.feed(tokens))
        assert same_state(expected.state, session.state)


@pytest.mark.parametrize("kind", ["plain", "in_place"])
def test_graphs_change_nothing(machine: Machine, own_bundle: Path, kind: str) -> None:
    on = session_of(machine, own_bundle, kind, 2)
    off = session_of(machine, own_bundle, kind, 2, cuda_graph=False)
    for step in range(6):
        tokens = ids(2, 1, seed=step)
        before = machine.cuda.launches
        off_logits = off.feed(tokens)
        assert machine.cuda.launches == before
        np.testing.assert_array_equal(on.feed(tokens), off_logits)
        assert machine.cuda.launches == before + (step > 0), "all calls but the first"
        assert same_state(on.state, off.state)


def test_a_graph_is_dropped_with_its_buffers(machine: Machine, own_bundle: Path) -> None:
    session = session_of(machine, own_bundle, "plain")
    for _ in range(5):
        session.feed(ids(1))
    assert machine.cuda.alive["graphs"] == 2, "one for each direction between two sets of buffers"
    session.feed(ids(3 * MAX_TOKENS))  # uses three sets of buffers, and releases one at the end
    assert machine.cuda.alive["graphs"] < 2
    for _ in range(5):
        session.feed(ids(1))
    assert machine.cuda.alive["graphs"] == 2


@pytest.mark.parametrize("kind", ["plain", "in_place"])
def test_rows_and_files(machine: Machine, own_bundle: Path, tmp_path: Path, kind: str) -> None:
    session, expected = session_of(machine, own_bundle, kind, 3), exact(own_bundle, 3)
    path = tmp_path / "rows.state"

    def both(do: Any) -> None:
        for each in (session, expected):
            do(each)
        assert same_state(expected.state, session.state)
        assert session.positions == expected.positions
        np.testing.assert_array_equal(session.feed(ids(3, 1)), expected.feed(ids(3, 1)))

    both(lambda s: s.feed(ids(3, 20)))
    both(lambda s: s.fork(1, [0, 2]))
    both(lambda s: s.reset([1]))
    both(lambda s: s.save_state(tmp_path / f"{s is session}.state", rows=[2]))
    both(lambda s: s.load_state(tmp_path / f"{s is session}.state", rows=[0]))
    session.save_state(path)
    both(lambda s: s.reset())
    both(lambda s: s.load_state(path))


def test_state_files_move_between_all_runtimes(
    machine: Machine, own_bundle: Path, tmp_path: Path
) -> None:
    build(machine, own_bundle)
    text, names = ids(60), ("torch", "onnxruntime", "tensorrt")
    whole = open_session(own_bundle, "torch").feed(text, last_only=True)
    for first in names:
        for second in names:
            path = tmp_path / f"{first}-{second}.state"
            reader = open_session(own_bundle, first)
            reader.feed(text[:37])
            reader.save_state(path)
            session = open_session(own_bundle, second)
            session.load_state(path)
            assert same_state(reader.state, session.state)
            assert_close("runtime.float32", session.feed(text[37:], last_only=True), whole)


def test_threads(machine: Machine, own_bundle: Path) -> None:
    first = session_of(machine, own_bundle, "plain")
    texts = [ids(24, seed=seed) for seed in range(4)]
    expected = []
    for text in texts:
        alone = exact(own_bundle)
        expected.append(np.concatenate([alone.feed(part) for part in np.split(text, 12)], 1))
    start = threading.Barrier(4)

    def read(text: np.ndarray) -> np.ndarray:
        session = first.another()
        start.wait()
        return np.concatenate([session.feed(part) for part in np.split(text, 12)], 1)

    with ThreadPoolExecutor(4) as pool:
        for wanted, found in zip(expected, pool.map(read, texts), strict=True):
            np.testing.assert_array_equal(found, wanted)
        shared = first.another(batch=2)
        list(pool.map(lambda text: shared.feed(np.stack([text, text])), texts))
    assert shared.positions == [96, 96]


def test_another_device_in_every_thread(own_bundle: Path, tmp_path: Path) -> None:
    from tests.tensorrt_fake import fake_machine

    with fake_machine(tmp_path, gpus=2) as machine:
        session = session_of(machine, own_bundle, "plain", device="cuda:1")
        with ThreadPoolExecutor(1) as pool:  # a thread whose current device is cuda:0
            found = pool.submit(session.feed, ids(9)).result()
            pool.submit(session.reset).result()
        np.testing.assert_array_equal(found, exact(own_bundle).feed(ids(9)))
        assert session.positions == [0]


FAILURES = [
    (function, after)
    for function, afters in {
        "cudaMalloc": (0, 3),
        "cudaMallocHost": (0, 2),
        "cudaMemcpyAsync": (0, 3, 5),
        "cudaStreamSynchronize": (0, 1),
    }.items()
    for after in afters
]


@pytest.mark.parametrize("size", [1, 20])
@pytest.mark.parametrize(("function", "after"), FAILURES)
def test_a_call_that_fails_moves_no_row(
    machine: Machine, own_bundle: Path, function: str, after: int, size: int
) -> None:
    session, expected = session_of(machine, own_bundle, "in_place", 2), exact(own_bundle, 2)
    # The first call of a kind allocates memory. A second call of one token would be captured.
    warm = () if "Malloc" in function or size == 1 else (size,)
    for length in warm:
        for each in (session, expected):
            each.feed(ids(2, length))
    machine.cuda.fail_next(function, cudaError_t.cudaErrorMemoryAllocation, after)
    with pytest.raises(DeviceError, match=f"{function} failed on device cuda:0: MemoryAllocation"):
        session.feed(ids(2, size, seed=9))
    assert same_state(expected.state, session.state)
    for length in (1, 1, 1, 20):
        np.testing.assert_array_equal(
            session.feed(ids(2, length, seed=7)), expected.feed(ids(2, length, seed=7))
        )


def test_an_engine_that_refuses_to_run_moves_no_row(machine: Machine, own_bundle: Path) -> None:
    session = session_of(machine, own_bundle, "in_place")
    session.feed(ids(5))
    before = session.state
    machine.module()._refuse.append("out of sorts")
    with pytest.raises(EngineError, match="TensorRT refuses to run: out of sorts"):
        session.feed(ids(5))
    assert same_state(before, session.state)
    session.feed(ids(5))


@pytest.mark.parametrize("function", ["cudaStreamEndCapture", "cudaGraphInstantiate"])
def test_a_failed_capture_warns_and_decoding_continues(
    machine: Machine, own_bundle: Path, function: str
) -> None:
    session, expected = session_of(machine, own_bundle, "in_place"), exact(own_bundle)
    for each in (session, expected):
        each.feed(ids(1))
    machine.cuda.fail_next(function, cudaError_t.cudaErrorStreamCaptureInvalidated)
    with pytest.warns(RuntimeWarning, match=f"cannot be captured in a CUDA graph .*{function}"):
        found = session.feed(ids(1))
    np.testing.assert_array_equal(found, expected.feed(ids(1)))
    for _ in range(3):
        np.testing.assert_array_equal(session.feed(ids(1)), expected.feed(ids(1)))
    assert machine.cuda.launches == 0
    assert machine.cuda.alive["graphs"] == 0


def test_a_session_continues_after_an_interrupted_capture(
    machine: Machine, own_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session, expected = session_of(machine, own_bundle, "plain"), exact(own_bundle)
    for each in (session, expected):
        each.feed(ids(1))
    copy = machine.cuda.cudaMemcpyAsync

    def interrupted(*arguments: Any) -> Any:
        monkeypatch.undo()
        copy(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(machine.cuda, "cudaMemcpyAsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        session.feed(ids(1))
    assert session.positions == [1]
    for _ in range(4):
        np.testing.assert_array_equal(session.feed(ids(1)), expected.feed(ids(1)))
    assert machine.cuda.launches == 4


def test_a_context_that_cannot_be_captured_runs_without_a_graph(
    machine: Machine, own_bundle: Path
) -> None:
    machine.build(own_bundle, not_capturable=True)
    session, expected = open_session(own_bundle, "tensorrt"), exact(own_bundle)
    session.feed(ids(1))
    with pytest.warns(RuntimeWarning, match="its context says so"):
        session.feed(ids(1))
    session.feed(ids(1))
    for _ in range(3):
        expected.feed(ids(1))
    assert same_state(expected.state, session.state)


def test_too_many_rows(machine: Machine, own_bundle: Path) -> None:
    metadata = machine.build(own_bundle, max_batch=2)
    with pytest.raises(
        ShapeError, match=f"batch is 3, but engine '{metadata.name}' takes at most 2 rows; build it"
    ):
        open_session(own_bundle, "tensorrt", batch=3)


def refusal(bundle: Path, **options: Any) -> str:
    with pytest.raises(FwlError) as error:
        open_session(bundle, "tensorrt", **options)
    return str(error.value)


def test_no_engine_says_how_to_make_one(machine: Machine, own_bundle: Path) -> None:
    command = f"`fwl-export build {own_bundle} --variant {{}} --sm 89`"
    assert refusal(own_bundle) == (
        f"bundle '{own_bundle}' has no engine of its model for this GPU, Fake One, SM89; build "
        f"one with {command.format('rtx')}"
    )
    other = machine.build(own_bundle, sm=86)
    assert f"(it has {other.name}); build one" in refusal(own_bundle)
    assert command.format("tensorrt") in refusal(own_bundle, variant="tensorrt")
    machine.build(own_bundle, version="1.0.0")
    assert refusal(own_bundle) == (
        "TensorRT-RTX 1.2.3 is installed, but the bundle's engines for SM89 were built by 1.0.0, "
        "and an engine runs only in the version that built it; build one with "
        f"{command.format('rtx')}"
    )
    assert "variant 'trt' is unknown" in refusal(own_bundle, variant="trt")


def test_an_engine_of_another_model_does_not_count(machine: Machine, own_bundle: Path) -> None:
    metadata = machine.build(own_bundle)
    edit_metadata(own_bundle, metadata, model_id="0" * 64)
    assert "has no engine of its model" in refusal(own_bundle)


def edit_metadata(bundle: Path, metadata: EngineMetadata, **changes: Any) -> None:
    import json

    from fwl_export.bundle.manifest import read_bundle

    name = f"engines/{metadata.name}.json"
    data = {**json.loads((bundle / name).read_text()), **changes}
    (bundle / name).write_text(json.dumps(data))
    read_bundle(bundle).add_files([name])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sha256": "0" * 64}, "is not the engine that its metadata describes"),
        ({"schema_version": 9}, "schema_version is 9, but this fwl-export reads 1"),
        ({"inputs": [{"name": "x"}]}, "is malformed: key 'inputs[0].shape' is missing; build"),
        ({"inputs": []}, "does not fit its metadata or this version of fwl-export: '"),
        ({"outputs": []}, "does not fit its metadata or this version of fwl-export: 'logits' diff"),
    ],
)
def test_wrong_metadata(
    machine: Machine, own_bundle: Path, changes: dict[str, Any], said: str
) -> None:
    edit_metadata(own_bundle, machine.build(own_bundle), **changes)
    assert said in refusal(own_bundle)


def test_a_file_that_is_changed_or_is_not_an_engine(machine: Machine, own_bundle: Path) -> None:
    from fwl_export.bundle.manifest import describe_file, read_bundle

    metadata = machine.build(own_bundle)
    path = own_bundle / f"engines/{metadata.name}.engine"
    path.write_text("no plan")
    with pytest.raises(BundleError, match="it was changed or truncated"):
        open_session(own_bundle, "tensorrt")
    read_bundle(own_bundle).add_files([f"engines/{metadata.name}.engine"])
    edit_metadata(own_bundle, metadata, sha256=describe_file(path)["sha256"])
    assert "cannot load" in (said := refusal(own_bundle))
    assert "the plan is not a plan; build the engine again" in said


def test_an_input_that_must_lie_on_the_host_is_refused(machine: Machine, own_bundle: Path) -> None:
    machine.build(own_bundle, locations={"lengths": "HOST"})
    assert "'lengths' differs; build it again" in refusal(own_bundle)


def test_the_plugin_library(machine: Machine, own_bundle: Path, tmp_path: Path) -> None:
    metadata = build(machine, own_bundle, "plugin")
    assert "the fast-weight updates in the plugin, but plugin 'none'" in refusal(
        own_bundle, plugin="none"
    )
    assert "does not exist" in refusal(own_bundle, plugin=tmp_path / "none.so")
    wrong = tmp_path / "other.so"
    wrong.touch()
    assert "TensorRT-RTX 1.2.3 cannot load plugin" in refusal(own_bundle, plugin=wrong)
    for _ in range(2):  # the second time, the library is loaded already
        opened(machine, own_bundle).feed(ids(3))
    machine.build(own_bundle)
    assert metadata.name == "rtx-1.2.3-sm89-fp32"
    with pytest.raises(PluginError, match="in standard operators, but the plugin was asked for"):
        opened(machine, own_bundle)


def test_a_required_library_that_is_not_there(
    machine: Machine, own_bundle: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from fwl_export import plugins

    monkeypatch.setattr(plugins, "FOLDER", tmp_path / "nothing")
    build(machine, own_bundle, "plugin")
    assert "is required and not in" in refusal(own_bundle)


def test_variants(machine: Machine, own_bundle: Path) -> None:
    machine.install("tensorrt")
    machine.build(own_bundle, variant="rtx")
    with pytest.raises(MissingDependencyError, match=r"need the package tensorrt_rtx.*\[rtx\]"):
        open_session(own_bundle, "tensorrt")
    machine.build(own_bundle, variant="tensorrt")
    for variant in (None, "tensorrt"):
        open_session(own_bundle, "tensorrt", variant=variant).feed(ids(3))
    assert machine.module("tensorrt")._runs
    with pytest.raises(MissingDependencyError, match="need the package tensorrt_rtx"):
        open_session(own_bundle, "tensorrt", variant="rtx")
    machine.install("tensorrt", "tensorrt_rtx")
    open_session(own_bundle, "tensorrt").feed(ids(3))
    assert machine.module()._runs


def test_an_engine_in_place_is_the_last_choice(machine: Machine, own_bundle: Path) -> None:
    build(machine, own_bundle, "in_place")
    build(machine, own_bundle, "plugin")
    assert opened(machine, own_bundle)._runner.model.in_place == frozenset()


def test_arguments(machine: Machine, own_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    build(machine, own_bundle)
    assert "runs on a GPU, but device is 'cpu'" in refusal(own_bundle, device="cpu")
    assert "device is 'tpu'; expected cpu, cuda" in refusal(own_bundle, device="tpu")
    assert "device 'cuda:1' does not exist; the CUDA devices are" in refusal(
        own_bundle, device="cuda:1"
    )
    assert "precision can be chosen" in refusal(own_bundle, precision="fp32")
    assert "threads can be chosen" in refusal(own_bundle, threads=1)
    with pytest.raises(ConfigError, match="variant can be chosen for runtime 'tensorrt' only"):
        open_session(own_bundle, variant="rtx")
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)
    assert "cuda-bindings to run, which is not installed; pip install" in refusal(own_bundle)


SPECS = (TensorSpec("a", (3, 2), "float32"), TensorSpec("b", (), "int64"))


class Placed:
    def __init__(self, start: int) -> None:
        self.start = start

    def of(self, name: str) -> int:
        return self.start + state_layout(SPECS, 11)[0][name]


def test_the_address_table() -> None:
    assert state_layout(SPECS, 11) == ({"a": 0, "b": 512}, 768)
    past, present = Placed(0x1000), Placed(0x2000)
    plain = state_addresses(SPECS, frozenset(), past, present)  # type: ignore[arg-type]
    assert plain == {
        "past.a": 0x1000,
        "present.a": 0x2000,
        "past.b": 0x1200,
        "present.b": 0x2200,
    }
    in_place = state_addresses(SPECS, frozenset({"a"}), past, present)  # type: ignore[arg-type]
    assert in_place == {**plain, "past.a": 0x2000}


@pytest.fixture
def metadata(machine: Machine, own_bundle: Path) -> EngineMetadata:
    return machine.build(own_bundle, max_batch=4)


def test_the_choice_of_a_profile(metadata: EngineMetadata) -> None:
    assert [profile.name for profile in metadata.profiles] == ["decode", "prefill"]

    def choose(batch: int, tokens: int, positions: int) -> int:
        sizes = {"input_ids": (batch, tokens), "logit_positions": (batch, positions)}
        return choose_profile(metadata, tuple(sizes.items()))

    assert [choose(1, 1, 1), choose(4, 1, 1), choose(1, 2, 1), choose(4, MAX_TOKENS, 16)] == [
        0,
        0,
        1,
        1,
    ]
    for wrong in ((5, 1, 1), (1, MAX_TOKENS + 1, 1), (0, 1, 1)):
        with pytest.raises(ShapeError, match=r"fits no profile of engine .* expected \[1, 1\] to"):
            choose(*wrong)


def test_profiles_are_named_in_metadata(metadata: EngineMetadata) -> None:
    assert EngineMetadata.from_dict(metadata.to_dict(), "metadata") == metadata
    assert all(isinstance(profile, ProfileMetadata) for profile in metadata.profiles)
