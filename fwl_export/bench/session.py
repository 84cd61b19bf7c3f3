"""Measure sessions against ONNX Runtime itself, on the same graph with the same buffers bound.

What is compared, each in a process that has loaded the model once:

- `raw`: ONNX Runtime's run_with_iobinding and nothing else, with two sets of state buffers that
  change places;
- `session`: `Session.feed`, which checks its input and its output and keeps the state;
- `libfwl`: `fwl_session_feed` of the C library, called through ctypes.

One round runs all of them a few times, in turns; ratios are medians of the rounds' ratios.
"""

from __future__ import annotations

import ctypes
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fwl_export.bundle.manifest import Bundle
from fwl_export.errors import PluginError
from fwl_export.ort import import_onnxruntime
from fwl_export.runtimes import onnxruntime, open_session
from fwl_export.runtimes.base import Call
from fwl_export.runtimes.session import Session, SessionSpec

RAW = "raw"

REST_SECONDS = 0.1

# Of one implementation in a round: calls, as many as read so many tokens, but for their limits.
_TOKENS_OF_A_TURN = 512
_CALLS_OF_A_TURN = (2, 20)


@dataclass(frozen=True)
class SessionTimes:
    """Times of a call by implementation.

    Attributes:
      tokens: per call.
      batch: rows.
      p50: median, in milliseconds.
      p99: what 99 of 100 calls stay below, in milliseconds.
      ratio: how many times as long as `raw` it takes, median over the rounds.
      tokens_per_second: of all rows together, from p50.
    """

    tokens: int
    batch: int
    p50: dict[str, float]
    p99: dict[str, float]
    ratio: dict[str, float]
    tokens_per_second: dict[str, float]


def bench_session(
    bundle: Bundle,
    tokens: int,
    batch: int,
    threads: int,
    plugin: str | Path,
    rounds: int,
    libfwl: Path | None = None,
) -> SessionTimes:
    """Measure calls of one size.

    Args:
      bundle: the model.
      tokens: per call, at most the bundle's largest; calls start at positions where none is split.
      batch: rows.
      threads: inside one operator.
      plugin: see `open_session`.
      rounds: of all implementations in turns.
      libfwl: the C library; None leaves it out.

    Raises:
      PluginError: `libfwl` cannot be loaded.
    """
    manifest = bundle.manifest
    model = onnxruntime.load_model(bundle, threads, plugin)
    ids = np.random.default_rng(0).integers(0, manifest.config.vocab_size, (batch, tokens))
    runs: dict[str, Callable[[], object]] = {RAW: _raw(model, ids)}
    interval = manifest.config.fast_weights.anchor_interval
    session = Session(
        onnxruntime.OnnxRuntimeRunner(model),
        SessionSpec(manifest.state, manifest.config.vocab_size, manifest.max_tokens, interval),
        batch,
    )
    runs["session"] = lambda: session.feed(ids, last_only=True)
    if libfwl is not None:
        runs["libfwl"] = _libfwl(libfwl, bundle, threads, plugin, ids)
    fewest, most = _CALLS_OF_A_TURN
    repeat = min(max(_TOKENS_OF_A_TURN // (tokens * batch), fewest), most)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for name in list(runs) * rounds:
        # The threads of the one before wait for work on the cores that this one needs.
        time.sleep(REST_SECONDS)
        runs[name]()
        for _ in range(repeat):
            began = time.perf_counter()
            runs[name]()
            times[name].append((time.perf_counter() - began) * 1e3)
    warm = {name: values[repeat:] or values for name, values in times.items()}
    blocks = {
        name: [statistics.median(v[i : i + repeat]) for i in range(0, len(v), repeat)]
        for name, v in warm.items()
    }
    p50 = {name: statistics.median(values) for name, values in warm.items()}
    return SessionTimes(
        tokens,
        batch,
        {name: round(value, 4) for name, value in p50.items()},
        {name: round(float(np.quantile(values, 0.99)), 4) for name, values in warm.items()},
        {
            name: round(
                statistics.median(a / b for a, b in zip(values, blocks[RAW], strict=True)), 4
            )
            for name, values in blocks.items()
        },
        {name: round(batch * tokens / value * 1e3, 1) for name, value in p50.items()},
    )


@dataclass(frozen=True)
class SessionMemory:
    """What a session of one row takes.

    Attributes:
      measured: resident bytes per session, over many.
      state: bytes of its state, twice: a call reads one copy and writes the other.
    """

    measured: float
    state: int


def session_memory(bundle: Bundle, plugin: str | Path, count: int = 24) -> SessionMemory:
    """Open sessions on one model, read a token in each, and measure what they add."""
    manifest = bundle.manifest
    first = open_session(bundle, plugin=plugin)
    for _ in range(2):
        first.feed([0])
    before = _resident()
    sessions = [first.another() for _ in range(count)]
    for session in sessions:
        for _ in range(2):
            session.feed([0])
    measured = (_resident() - before) / count
    return SessionMemory(measured, 2 * sum(spec.bytes_per_row for spec in manifest.state))


def _resident() -> int:
    pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def _raw(model: Any, ids: Any) -> Callable[[], object]:
    batch, tokens = ids.shape
    runner = onnxruntime.OnnxRuntimeRunner(model)
    call = Call(
        ids.astype(np.int64),
        np.ones(ids.shape, np.float32),
        np.full(batch, tokens),
        np.full((batch, 1), tokens - 1),
        np.ones(batch, np.float32),
    )
    buffers = [runner.new_buffers(batch) for _ in range(2)]
    bound = [onnxruntime.BoundCall(model, call, buffers[i], buffers[1 - i]) for i in range(2)]
    turn = [0]

    def run() -> None:
        model.session.run_with_iobinding(bound[turn[0]].binding)
        turn[0] ^= 1

    return run


def _libfwl(
    path: Path, bundle: Bundle, threads: int, plugin: str | Path, ids: Any
) -> Callable[[], object]:
    from fwl_export.plugins import ONNXRUNTIME, find_plugin

    library = find_plugin(ONNXRUNTIME, plugin)
    ort = import_onnxruntime()
    folder = Path(ort.__file__).parent / "capi"
    runtime = next(iter(sorted(folder.glob("libonnxruntime.so*"))), None)
    error = ctypes.create_string_buffer(1024)  # fwl_error: the status, then the message
    try:
        c = ctypes.CDLL(str(path))
        initialize = c.fwl_options_init
    except (OSError, AttributeError) as problem:
        raise PluginError(f"libfwl '{path}' cannot be loaded: {problem}") from None

    def check(status: int) -> None:
        if status:
            raise PluginError(f"libfwl: {error.raw[4:].split(bytes(1))[0].decode()}")

    class Options(ctypes.Structure):
        _fields_ = [
            ("size", ctypes.c_size_t),
            ("backend", ctypes.c_char_p),
            ("runtime_library", ctypes.c_char_p),
            ("plugin", ctypes.c_char_p),
            ("threads", ctypes.c_int32),
        ]

    options = Options()
    initialize(ctypes.byref(options), ctypes.c_size_t(ctypes.sizeof(options)))
    options.runtime_library = str(runtime).encode() if runtime else None
    options.plugin = str(library).encode() if library else None
    options.threads = threads
    batch, tokens = ids.shape
    handle, session = ctypes.c_void_p(), ctypes.c_void_p()
    folder_name = str(bundle.folder).encode()
    check(c.fwl_model_open(folder_name, ctypes.byref(options), ctypes.byref(handle), error))
    check(c.fwl_session_open(handle, ctypes.c_size_t(batch), ctypes.byref(session), error))
    wide = np.ascontiguousarray(ids, np.int64)
    logits = np.empty((batch, bundle.manifest.config.vocab_size), np.float32)
    arguments = (
        session,
        ctypes.c_void_p(wide.ctypes.data),
        ctypes.c_size_t(tokens),
        None,
        None,
        1,  # FWL_LOGITS_LAST
        ctypes.c_void_p(logits.ctypes.data),
        ctypes.c_size_t(logits.size),
        error,
    )

    def run(_keep: object = (wide, logits)) -> None:
        check(c.fwl_session_feed(*arguments))

    return run
