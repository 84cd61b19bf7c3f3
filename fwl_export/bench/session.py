"""Measure sessions against ONNX Runtime alone, on the same graph with the same kind of buffers.

The implementations:

- `raw`: ONNX Runtime's run_with_iobinding and nothing else, with two sets of state buffers that
  swap roles after each call.
- `session`: `Session.feed`, which also checks its input and output and keeps the state.
- `libfwl`: `fwl_session_feed` of the C library, called through ctypes.

Each round runs all of them a few times, in turns. Ratios are medians of the ratios within rounds.
"""

from __future__ import annotations

import ctypes
import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fwl_export.bundle.manifest import Bundle
from fwl_export.bundle.state import Array
from fwl_export.errors import PluginError
from fwl_export.ort import import_onnxruntime
from fwl_export.plugins import ONNXRUNTIME, find_plugin
from fwl_export.runtimes import onnxruntime, open_session
from fwl_export.runtimes.base import Call
from fwl_export.runtimes.session import Session, SessionSpec

RAW = "raw"

REST_SECONDS = 0.1

# Calls of one implementation in a round: enough to read this many tokens, within these limits.
_TOKENS_OF_A_TURN = 512
_CALLS_OF_A_TURN = (2, 20)


@dataclass(frozen=True)
class SessionTimes:
    """Times of a call by implementation.

    Attributes:
      tokens: Tokens per call and row.
      batch: Number of rows.
      p50: Median time of a call in milliseconds.
      p99: 99th percentile of the time of a call in milliseconds.
      ratio: Time divided by that of `raw`, as the median over the rounds.
      tokens_per_second: Tokens of all rows together per second, from `p50`.
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
      bundle: Bundle of the model.
      tokens: Tokens per call and row. They must divide the bundle's largest call, so that a session
        never splits a call at an anchor.
      batch: Number of rows.
      threads: Threads inside one operator.
      plugin: Kernel to use, see `open_session`.
      rounds: Number of rounds.
      libfwl: Path of the C library, or None to leave it out.

    Raises:
      PluginError: The C library cannot be loaded, or it returned an error.
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
        runs["libfwl"] = _LibFwl(libfwl, bundle, threads, plugin, batch).reader(ids)
    fewest, most = _CALLS_OF_A_TURN
    repeat = min(max(_TOKENS_OF_A_TURN // (tokens * batch), fewest), most)
    return _session_times(tokens, batch, _measure(runs, rounds, repeat), repeat)


def _measure(
    runs: Mapping[str, Callable[[], object]], rounds: int, repeat: int
) -> dict[str, list[float]]:
    """Return the times of each implementation in milliseconds, `repeat` for each round."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for name in list(runs) * rounds:
        # Idle threads of the previous implementation spin on the cores for a while.
        time.sleep(REST_SECONDS)
        runs[name]()
        for _ in range(repeat):
            began = time.perf_counter()
            runs[name]()
            times[name].append((time.perf_counter() - began) * 1e3)
    return times


def _session_times(
    tokens: int, batch: int, times: Mapping[str, list[float]], repeat: int
) -> SessionTimes:
    """Return the statistics of all rounds but the first, which warms up."""
    warm = {name: values[repeat:] or values for name, values in times.items()}
    rounds = {
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
                statistics.median(a / b for a, b in zip(values, rounds[RAW], strict=True)), 4
            )
            for name, values in rounds.items()
        },
        {name: round(batch * tokens / value * 1e3, 1) for name, value in p50.items()},
    )


@dataclass(frozen=True)
class SessionMemory:
    """Memory that a session of one row takes.

    Attributes:
      measured: Resident bytes per session, averaged over many sessions.
      state: Bytes of two copies of its state: a call reads one and writes the other.
    """

    measured: float
    state: int


def session_memory(bundle: Bundle, plugin: str | Path, count: int = 24) -> SessionMemory:
    """Measure how much resident memory each further session on a loaded model adds.

    Args:
      bundle: Bundle of the model.
      plugin: Kernel to use, see `open_session`.
      count: Number of sessions to open.
    """
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
    """Return the resident memory of this process in bytes."""
    pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def _raw(model: Any, ids: Array) -> Callable[[], object]:
    """Return a run of the graph with everything bound beforehand."""
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


class _Options(ctypes.Structure):
    """fwl_options of libfwl's header."""

    _fields_ = (
        ("size", ctypes.c_size_t),
        ("backend", ctypes.c_char_p),
        ("runtime_library", ctypes.c_char_p),
        ("plugin", ctypes.c_char_p),
        ("threads", ctypes.c_int32),
    )


class _LibFwl:
    """A session of libfwl, called through ctypes."""

    def __init__(self, path: Path, bundle: Bundle, threads: int, plugin: str | Path, batch: int):
        """Load the library and open a session.

        Raises:
          PluginError: The library cannot be loaded, or it returned an error.
        """
        self._error = ctypes.create_string_buffer(1024)  # fwl_error: the status, then the message
        try:
            self._library = ctypes.CDLL(str(path))
            initialize = self._library.fwl_options_init
        except (OSError, AttributeError) as problem:
            raise PluginError(f"libfwl '{path}' cannot be loaded: {problem}") from None
        options = _Options()
        initialize(ctypes.byref(options), ctypes.c_size_t(ctypes.sizeof(options)))
        runtime, kernel = _onnxruntime_library(), find_plugin(ONNXRUNTIME, plugin)
        options.runtime_library = str(runtime).encode() if runtime else None
        options.plugin = str(kernel).encode() if kernel else None
        options.threads = threads
        model, self._session = ctypes.c_void_p(), ctypes.c_void_p()
        folder = str(bundle.folder).encode()
        c, error, rows = self._library, self._error, ctypes.c_size_t(batch)
        self._check(c.fwl_model_open(folder, ctypes.byref(options), ctypes.byref(model), error))
        self._check(c.fwl_session_open(model, rows, ctypes.byref(self._session), error))
        self._vocab_size = bundle.manifest.config.vocab_size

    def _check(self, status: int) -> None:
        if status:
            raise PluginError(f"libfwl: {self._error.raw[4:].split(bytes(1))[0].decode()}")

    def reader(self, ids: Array) -> Callable[[], object]:
        """Return a function that feeds the ids [B, T] and computes the last logits."""
        wide = np.ascontiguousarray(ids, np.int64)
        logits = np.empty((len(ids), self._vocab_size), np.float32)
        arguments = (
            self._session,
            ctypes.c_void_p(wide.ctypes.data),
            ctypes.c_size_t(ids.shape[1]),
            None,
            None,
            1,  # FWL_LOGITS_LAST
            ctypes.c_void_p(logits.ctypes.data),
            ctypes.c_size_t(logits.size),
            self._error,
        )
        feed, check = self._library.fwl_session_feed, self._check

        def run(_keep: object = (wide, logits)) -> None:
            check(feed(*arguments))

        return run


def _onnxruntime_library() -> Path | None:
    """Return the shared library in the Python package of ONNX Runtime, or None."""
    folder = Path(import_onnxruntime().__file__).parent / "capi"
    return next(iter(sorted(folder.glob("libonnxruntime.so*"))), None)
