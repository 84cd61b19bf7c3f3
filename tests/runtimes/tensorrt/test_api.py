"""The fakes of CUDA and TensorRT: names and parameters of the real ones, and what they refuse."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fwl_export import open_session
from tests import cuda_fake, tensorrt_fake
from tests.cuda_fake import FakeCuda, MisuseError
from tests.tensorrt_fake import Machine

# Methods of `FakeCuda` that only tests and the fake of TensorRT use.
OWN = {"fail_next", "alive", "launches", "misuses", "misuse", "stream", "bytes", "device"}

CLASSES = ("ILogger", "IPluginRegistry", "Runtime", "ICudaEngine", "IRuntimeConfig")


def public(fake: type) -> dict[str, Any]:
    return {name: value for name, value in vars(fake).items() if not name.startswith("_")}


def parameters(documented: str, name: str) -> list[set[str]]:
    """Return the names of the parameters of each overload of a method, from its docstring.

    Args:
      documented: Docstring of the method, as the bindings generate it.
      name: Name of the method.
    """
    found = re.findall(rf"\b{name}\((.*?)\)(?: ->|\n|$)", documented or "")
    return [set(re.findall(r"\b(\w+)(?::| =|,|$)", each)) for each in found]


@pytest.mark.parametrize("name", [*CLASSES, "IExecutionContext", "RtxContext"])
def test_the_fake_of_tensorrt_has_the_real_names(name: str) -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    real = getattr(trt, "IExecutionContext" if name == "RtxContext" else name)
    for member, value in public(getattr(tensorrt_fake, name)).items():
        assert hasattr(real, member), f"{name}.{member}"
        if inspect.isfunction(value):
            wanted = set(inspect.signature(value).parameters) - {"self"}
            overloads = parameters(getattr(real, member).__doc__, member)
            fits = any(wanted <= names for names in overloads)
            # The bindings name some parameters differently, but the project passes all by position.
            fits = fits or any(len(names - {"self"}) >= len(wanted) for names in overloads)
            assert fits or member == "log", f"{name}.{member}({wanted}) is {overloads}"


def test_the_module_has_the_real_names() -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    fake = tensorrt_fake.tensorrt_module("tensorrt_rtx", FakeCuda())
    for name in (n for n in vars(fake) if not n.startswith("_")):
        assert hasattr(trt, name), name
    enums = ("TensorIOMode", "TensorLocation", "DynamicShapesKernelSpecializationStrategy")
    for name in enums:
        ours = getattr(tensorrt_fake, name).__members__
        assert set(ours) <= set(getattr(trt, name).__members__)
    assert np.dtype(trt.nptype(trt.int64)).name == "int64"


def test_the_fake_of_cuda_has_the_real_names() -> None:
    cuda = pytest.importorskip("cuda.bindings.runtime")
    for name, value in public(FakeCuda).items():
        if name in OWN:
            continue
        assert hasattr(cuda, name), name
        if inspect.isfunction(value):
            wanted = list(inspect.signature(value).parameters)[1:]
            line = inspect.getdoc(getattr(cuda, name)).splitlines()[0]  # type: ignore[union-attr]
            inside = re.search(r"\((.*)\)", line)[1]  # type: ignore[index]
            found = [re.split(r"[:\s]+", part.strip()) for part in inside.split(",")]
            assert len(found) == len(wanted), line
            assert all(w in f for w, f in zip(wanted, found, strict=True)), line
    for enum in ("cudaError_t", "cudaMemcpyKind", "cudaStreamCaptureMode"):
        for member in getattr(cuda_fake, enum):
            assert getattr(getattr(cuda, enum), member.name) == int(member)


def test_a_real_runtime_without_a_gpu_loads_nothing(own_bundle: Path) -> None:
    """The real module accepts our logger, and returns None for bytes that are not an engine."""
    trt = pytest.importorskip("tensorrt_rtx")
    from collections import deque

    from fwl_export.runtimes.tensorrt import engine as tensorrt_engine

    log: deque[str] = deque()
    runtime = trt.Runtime(tensorrt_engine.error_logger(trt, log))
    assert runtime.deserialize_cuda_engine(b"no plan") is None
    assert log
    assert all(isinstance(message, str) for message in log)


def feed(machine: Machine, bundle: Path, steps: int = 1) -> tuple[Any, Any, Any]:
    """Feed a new session one token at a time.

    Args:
      machine: Fake machine to run on.
      bundle: Bundle to add an engine to.
      steps: Number of tokens to feed.

    Returns:
      The session, its runner's context for calls of one token, and TensorRT's context in it.
    """
    machine.build(bundle)
    session = open_session(bundle, "tensorrt")
    for _ in range(steps):
        session.feed([1])
    runner = session._runner
    (decode,) = runner._contexts.values()  # type: ignore[attr-defined]
    return session, decode, decode._context


def stream_of(session: Any) -> Any:
    return session._runner._stream


def _other_profile(session: Any, decode: Any, context: Any) -> None:
    with stream_of(session).captured():
        context.set_optimization_profile_async(1, stream_of(session).handle)


def _shape_in_a_graph(session: Any, decode: Any, context: Any) -> None:
    session.feed([1])
    context.set_optimization_profile_async(1, stream_of(session).handle)
    session.feed([1])
    session.feed([1])


def _cold_capture(session: Any, decode: Any, context: Any) -> None:
    shapes = dict(context._shapes)
    addresses = dict(context._addresses)
    context.set_optimization_profile_async(0, stream_of(session).handle)
    for name, shape in shapes.items():
        context.set_input_shape(name, shape)
    for name, address in addresses.items():
        context.set_tensor_address(name, address)
    with stream_of(session).captured():
        context.execute_async_v3(stream_of(session).handle)


def _one_buffer(session: Any, decode: Any, context: Any) -> None:
    context.set_tensor_address("past.position", context._addresses["present.position"])
    context.execute_async_v3(stream_of(session).handle)


def _freed(session: Any, decode: Any, context: Any) -> None:
    context.execute_async_v3(stream_of(session).handle)
    machine_cuda = session._runner.model.cuda
    machine_cuda.call("cudaFree", decode._mirrors["logits"].address)
    stream_of(session).synchronize()


def _synchronized_capture(session: Any, decode: Any, context: Any) -> None:
    with stream_of(session).captured():
        stream_of(session).synchronize()


def _default_stream(session: Any, decode: Any, context: Any) -> None:
    context.execute_async_v3(0)


def _engine_gone(session: Any, decode: Any, context: Any) -> None:
    context._owner = lambda: None
    session.feed([1])


def _unaligned(session: Any, decode: Any, context: Any) -> None:
    context.set_tensor_address("lengths", 12345)


MISUSES: dict[str, Callable[[Any, Any, Any], None]] = {
    "the profile is switched while": _other_profile,
    "shapes or profile changed before enqueued work": _shape_in_a_graph,
    "captured that has not run with its shapes": _cold_capture,
    "one address is True": _one_buffer,
    "is used, but not allocated": _freed,
    "synchronized while it is captured": _synchronized_capture,
    "or the default stream": _default_stream,
    "after its engine or runtime has gone": _engine_gone,
    "not aligned": _unaligned,
}


@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)  # memory is freed twice
@pytest.mark.parametrize("said", MISUSES)
def test_a_misuse_is_found(own_bundle: Path, tmp_path: Path, said: str) -> None:
    with (  # noqa: PT012
        pytest.raises(AssertionError, match=said),  # again at the end, from the list of all misuses
        tensorrt_fake.fake_machine(tmp_path) as machine,
    ):
        session, decode, context = feed(machine, own_bundle, steps=3)
        with pytest.raises(MisuseError, match=said):
            MISUSES[said](session, decode, context)


def test_what_tensorrt_refuses_without_misuse(machine: Machine, own_bundle: Path) -> None:
    session, _, context = feed(machine, own_bundle)
    assert not context.set_input_shape("input_ids", (1, 2)), "the decode profile has one token"
    assert not context.set_input_shape("none", (1,))
    assert not context.set_tensor_address("none", 0)
    stream = stream_of(session).handle
    assert not context.set_optimization_profile_async(2, stream)
    assert context.set_optimization_profile_async(0, stream)
    assert "input_ids" in context.infer_shapes()
    assert not context.execute_async_v3(stream), "no shapes"


def test_a_host_that_does_not_wait_reads_poison(machine: Machine, own_bundle: Path) -> None:
    session, decode, _ = feed(machine, own_bundle)
    runner = session._runner
    logits = decode._mirrors["logits"].host((1, 1, 64), np.float32)
    logits.fill(np.nan)
    decode._enqueue(session._current, session._spare[0])
    assert np.isnan(logits).all()
    runner._stream.synchronize()
    assert np.isfinite(logits).all()
