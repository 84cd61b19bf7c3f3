"""libfwl through its C interface, with ctypes."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

NONE, LAST, ALL = 0, 1, 2
STATUS = ("ok", "argument", "bundle", "token", "state", "runtime", "io", "memory", "internal")


class Error(ctypes.Structure):
    _fields_ = [("status", ctypes.c_int), ("message", ctypes.c_char * 1020)]


class Options(ctypes.Structure):
    _fields_ = [
        ("size", ctypes.c_size_t),
        ("backend", ctypes.c_char_p),
        ("runtime_library", ctypes.c_char_p),
        ("plugin", ctypes.c_char_p),
        ("threads", ctypes.c_int32),
        ("device", ctypes.c_int32),
        ("tensorrt_library", ctypes.c_char_p),
        ("tensorrt_plugin", ctypes.c_char_p),
        ("allow_embedded_plugin", ctypes.c_int32),
        ("max_learning_weight", ctypes.c_double),
        ("max_update_norm", ctypes.c_double),
        ("clip_update_norm", ctypes.c_double),
    ]


class Info(ctypes.Structure):
    _fields_ = [
        ("size", ctypes.c_size_t),
        ("vocab_size", ctypes.c_int64),
        ("max_tokens", ctypes.c_int64),
        ("anchor_interval", ctypes.c_int64),
        ("state_bytes", ctypes.c_size_t),
        ("model_id", ctypes.c_char * 65),
        ("precision", ctypes.c_char * 8),
    ]


class FwlError(Exception):
    """A status other than FWL_OK."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.kind = STATUS[status]


class Library:
    """An opened libfwl.so."""

    def __init__(self, path: Path) -> None:
        self.c = ctypes.CDLL(str(path))
        self.c.fwl_version.restype = ctypes.c_char_p
        for name in ("fwl_session_close", "fwl_model_close"):
            getattr(self.c, name).argtypes = [ctypes.c_void_p]

    def call(self, name: str, *arguments: Any) -> None:
        error = Error()
        status = getattr(self.c, name)(*arguments, ctypes.byref(error))
        assert status == error.status
        if status:
            raise FwlError(status, error.message.decode())

    def open(
        self,
        bundle: Path,
        runtime: Path | str | None,
        plugin: Path | None = None,
        threads: int = 1,
        **more: Any,
    ) -> Model:
        options = Options()
        self.c.fwl_options_init(ctypes.byref(options), ctypes.c_size_t(ctypes.sizeof(options)))
        options.runtime_library = str(runtime).encode() if runtime else None
        options.plugin = str(plugin).encode() if plugin else None
        options.threads = threads
        for name, value in more.items():
            setattr(options, name, value)
        handle = ctypes.c_void_p()
        self.call(
            "fwl_model_open", str(bundle).encode(), ctypes.byref(options), ctypes.byref(handle)
        )
        return Model(self, handle)


class Model:
    """A loaded bundle."""

    def __init__(self, library: Library, handle: ctypes.c_void_p) -> None:
        self.library, self.handle = library, handle
        self.info = Info(size=ctypes.sizeof(Info))
        library.call("fwl_model_info", handle, ctypes.byref(self.info))

    def session(self, rows: int = 1) -> Session:
        handle = ctypes.c_void_p()
        self.library.call(
            "fwl_session_open", self.handle, ctypes.c_size_t(rows), ctypes.byref(handle)
        )
        return Session(self, handle, rows)

    def close(self) -> None:
        self.library.c.fwl_model_close(self.handle)


class Session:
    """A session: rows of text on a model."""

    def __init__(self, model: Model, handle: ctypes.c_void_p, rows: int) -> None:
        self.model, self.handle, self.rows = model, handle, rows

    def call(self, name: str, *arguments: Any) -> None:
        self.model.library.call(f"fwl_session_{name}", self.handle, *arguments)

    def feed(
        self,
        tokens: Any,
        label_weights: Any = None,
        lengths: Any = None,
        which: int = ALL,
        room: int | None = None,
    ) -> np.ndarray:
        ids = np.ascontiguousarray(np.atleast_2d(tokens), np.int64)
        count = ids.shape[1]
        weights = None if label_weights is None else np.ascontiguousarray(label_weights, np.float32)
        sizes = None if lengths is None else np.ascontiguousarray(lengths, np.int64)
        vocabulary = self.model.info.vocab_size
        shape = {NONE: (0,), LAST: (self.rows, vocabulary), ALL: (self.rows, count, vocabulary)}
        logits = np.full(shape.get(which, (1,)), np.nan, np.float32)
        self.call(
            "feed",
            _pointer(ids),
            ctypes.c_size_t(count),
            _pointer(weights),
            _pointer(sizes),
            which,
            _pointer(logits),
            ctypes.c_size_t(logits.size if room is None else room),
        )
        return logits

    @property
    def positions(self) -> list[int]:
        found = np.full(self.rows, -1, np.int64)
        self.call("positions", _pointer(found))
        return list(map(int, found))

    def learned(self) -> list[float]:
        found = np.full(self.rows, np.nan)
        self.call("learned", _pointer(found))
        return list(map(float, found))

    def set_learning_rate_scale(self, scale: Sequence[float]) -> None:
        self.call("set_learning_rate_scale", _pointer(np.ascontiguousarray(scale, np.float32)))

    def reset(self, rows: Sequence[int] | None = None) -> None:
        self.call("reset", *_rows(rows))

    def fork(self, source: int, targets: Sequence[int]) -> None:
        self.call("fork", ctypes.c_size_t(source), *_rows(targets))

    def read_row(self, row: int) -> np.ndarray:
        state = np.empty(self.model.info.state_bytes, np.uint8)
        self.call("read_row", ctypes.c_size_t(row), _pointer(state), ctypes.c_size_t(state.size))
        return state

    def write_row(self, row: int, state: np.ndarray) -> None:
        self.call("write_row", ctypes.c_size_t(row), _pointer(state), ctypes.c_size_t(state.nbytes))

    def save_state(self, path: Path, rows: Sequence[int] | None = None) -> None:
        self.call("save_state", str(path).encode(), *_rows(rows))

    def load_state(self, path: Path, rows: Sequence[int] | None = None) -> None:
        self.call("load_state", str(path).encode(), *_rows(rows))

    def close(self) -> None:
        self.model.library.c.fwl_session_close(self.handle)


def _pointer(array: np.ndarray | None) -> ctypes.c_void_p | None:
    return None if array is None else ctypes.c_void_p(array.ctypes.data)


def _rows(rows: Sequence[int] | None) -> tuple[Any, ctypes.c_size_t]:
    if rows is None:
        return None, ctypes.c_size_t(0)
    return (ctypes.c_size_t * max(len(rows), 1))(*rows), ctypes.c_size_t(len(rows))
