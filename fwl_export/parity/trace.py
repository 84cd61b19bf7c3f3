"""Traces: the calls of a check with PyTorch's results in float64, in one small file.

A bundle without a checkpoint, or a machine without PyTorch, is checked against such a file. The
file is safetensors, with a JSON text in its metadata; docs/formats/trace.md describes both. It
holds the inputs of all calls; of the outputs, the logits at some positions; and of the logits and
every state tensor, at each comparison point, the norm of each row and some of its elements. So what
is found is never more than what `check` finds on the same calls.

A file may come from anybody: it has a checksum, and every size in it is checked before use.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, TypedDict

import numpy as np
from msgspec import Meta

from fwl_export.bundle.config import ModelConfig
from fwl_export.bundle.state import Array, StoredSpec, TensorSpec
from fwl_export.bundle.state_file import MAX_POSITION, checksum
from fwl_export.errors import ReportError
from fwl_export.files import replaced_file
from fwl_export.json_files import (
    Count,
    Finite,
    Name,
    Size,
    Text,
    brief,
    parse_json,
    read_bounded,
    typed,
)
from fwl_export.parity.cases import Case
from fwl_export.parity.compare import Error, Prediction
from fwl_export.parity.drift import COMPARED_EVERY_CALL, LOGITS, RunDrift
from fwl_export.parity.schedule import ScheduledCall

FORMAT = "fwl-trace"
VERSION = 1

LARGEST_FILE = 256 << 20  # in bytes
_LARGEST_HEADER = 32 << 20
_MOST_TOKENS = 1 << 22  # B times T of all calls of a case

# Elements of a tensor that are stored of all rows together, between and at the end of the calls.
_SOME, _MANY = 32, 1024
_STRIDE = 2654435761  # a prime beyond every size: multiples of it modulo a size are all different


@dataclass(frozen=True)
class TracedCase:
    """The calls of one case, and what PyTorch computed in float64.

    Attributes:
      case: The case, with its number of tokens.
      calls: Its calls.
      picks: Places whose logits are stored, [K, 3] int64: call, row, index in its wanted positions.
      labels: Token that follows in the text at each of these places, [K] int64.
      logits: Logits there, [K, V] float64.
      norms: Norm of each row of a tensor, [points, B] float64, by name. That of the logits, and of
        what `check` compares after every call, is over all calls since the point before.
      samples: Elements of a state tensor at each point, [B, k] float64 each, see `sampled`.
      own: Distance of PyTorch in the bundle's precision from float64, from which budgets follow.
    """

    case: Case
    calls: Sequence[ScheduledCall]
    picks: Array
    labels: Array
    logits: Array
    norms: Mapping[str, Array]
    samples: Mapping[str, Sequence[Array]]
    own: RunDrift


@dataclass(frozen=True)
class Trace:
    """A recorded check.

    Attributes:
      model_id: Identity of the model, see `Manifest`.
      config: Configuration of the model.
      precision: Precision of the bundle, which the budgets are for.
      max_tokens: Largest T of a call of the bundle.
      state: Specs of the bundle's state.
      horizon_tokens: Tokens over which the fast weights remember; 0 if they never forget.
      text: Name of the text.
      tokens: Tokens of the text that the first row read.
      seed: Seed of the calls.
      created: Time of the recording in UTC, ISO 8601.
      versions: Versions of the packages that recorded it.
      cases: The cases, in order.
    """

    model_id: str
    config: ModelConfig
    precision: str
    max_tokens: int
    state: Sequence[TensorSpec]
    horizon_tokens: float
    text: str
    tokens: int
    seed: int
    created: str
    versions: Mapping[str, str]
    cases: Sequence[TracedCase] = field(default=())


def sampled(array: Array, is_last: bool) -> Array:
    """Return some elements of each row of a tensor, [B, k] float64, where k depends on its size.

    Element j is number `(j * 2654435761) mod n` of the n elements of a row, in C order.

    Args:
      array: Tensor of the state, [B, ...].
      is_last: Whether this is the last comparison point, of which more is stored.
    """
    rows = array.reshape(len(array), -1)
    result: Array = rows[:, sample_places(rows.shape, is_last)].astype(np.float64)
    return result


def sample_places(shape: tuple[int, ...], is_last: bool) -> Array:
    """Return the places in a row that `sampled` takes, [k] int64.

    Args:
      shape: Number of rows, and of elements in each.
      is_last: See `sampled`.
    """
    rows, size = shape
    count = min(size, max((_MANY if is_last else _SOME) // rows, 1))
    places: Array = np.arange(count) * _STRIDE % size
    return places


class Norms:
    """Norms of each row of all tensors, of those compared after every call over several calls."""

    def __init__(self) -> None:
        self._squares: dict[str, Array] = {}

    def add(self, call: ScheduledCall, logits: Array, state: Mapping[str, Array]) -> None:
        """Add what a call returned.

        Args:
          call: The call.
          logits: Logits, [B, P, V].
          state: State after the call, or at least what is compared after every call.
        """
        real = call.wanted < call.lengths[:, None]
        self._add(LOGITS, np.where(real[..., None], logits, 0))
        for name, array in state.items():
            if call.compare_state or name.startswith(COMPARED_EVERY_CALL):
                self._add(name, array)

    def _add(self, name: str, array: Array) -> None:
        rows = array.reshape(len(array), -1).astype(np.float64)
        self._squares[name] = self._squares.get(name, 0.0) + np.einsum("ij,ij->i", rows, rows)

    def take(self) -> dict[str, Array]:
        """Return the norms since the last time, [B] float64 by name."""
        found = {name: np.sqrt(total) for name, total in self._squares.items()}
        self._squares = {}
        return found


class _StoredCall(TypedDict):
    rows: Annotated[int, Meta(ge=1, le=1 << 12)]
    size: Annotated[int, Meta(ge=1, le=1 << 24)]
    wanted: Annotated[int, Meta(ge=0, le=1 << 24)] | None
    tokens_read: Count
    compare: bool
    last_only: bool
    reset: list[Count]
    forks: list[tuple[Count, Count]]
    moves: list[tuple[Count, Count]]


class _StoredPrediction(TypedDict):
    tokens: Count
    kl: Finite
    kl_max: Finite
    top1: Finite
    top5: Finite
    loss: Finite
    reference_loss: Finite


class _StoredError(TypedDict):
    max_abs: list[Finite]
    relative_rms: list[Finite]
    scale: list[Finite]


class _StoredCase(TypedDict):
    name: Annotated[str, Meta(pattern=r"\A[a-z]+\d?\Z")]
    about: Name
    rows: Annotated[int, Meta(ge=1, le=1 << 12)]
    tokens: Size
    calls: list[_StoredCall]
    own: dict[Name, _StoredError]
    predictions: list[_StoredPrediction]


class _Stored(TypedDict):
    model_id: Name
    config: Any
    precision: Name
    max_tokens: Size
    state: list[StoredSpec]
    horizon_tokens: Finite
    text: Text
    tokens: Size
    seed: Count
    created: Name
    versions: dict[Name, Name]
    cases: list[_StoredCase]


def write_trace(path: Path, trace: Trace) -> int:
    """Write a trace; return its size in bytes. On an error, what was at the path is as before.

    Args:
      path: File to write; replaced if it exists.
      trace: Trace to write.
    """
    from safetensors.numpy import save

    tensors: dict[str, Array] = {}
    for case in trace.cases:
        tensors |= {f"{case.case.name}.{name}": array for name, array in _tensors(case).items()}
    data = {
        **{key: getattr(trace, key) for key in _Stored.__annotations__},
        "config": trace.config.to_dict(),
        "state": [spec.to_dict() for spec in trace.state],
        "cases": [_case_data(case) for case in trace.cases],
    }
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    metadata = {"format": FORMAT, "version": str(VERSION), "trace": text}
    metadata["sha256"] = checksum(tensors, metadata)
    content = save(tensors, metadata)
    with replaced_file(path) as beside:
        beside.write_bytes(content)
    return len(content)


def read_trace(path: Path) -> Trace:
    """Read what `write_trace` wrote.

    Raises:
      ReportError: The file is not a trace, was truncated or changed, or has another version.
    """
    try:
        content = read_bounded(path, ReportError, LARGEST_FILE)
    except OSError as error:
        raise ReportError(f"cannot read trace '{path}': {error.strerror or error}") from None
    metadata, tensors = _opened(path, content)
    if metadata.get("format") != FORMAT:
        raise ReportError(
            f"'{path}' is not a trace; expected a file that `fwl-export check --record` wrote"
        )
    if metadata.get("version") != str(VERSION):
        raise ReportError(
            f"trace '{path}' has version {brief(metadata.get('version'))}, but this fwl-export "
            f"reads {VERSION}; record it again"
        )
    if metadata.get("sha256") != checksum(tensors, metadata):
        raise ReportError(
            f"trace '{path}' was changed since it was recorded: its content does not have the "
            "checksum that it states; copy it again, or record it again"
        )
    where, remedy = f"trace '{path}' is malformed", "record it again"
    try:
        data = parse_json(metadata.get("trace", ""))
    except (ValueError, RecursionError) as error:
        raise ReportError(f"{where} ({brief(error)}); {remedy}") from None
    stored = typed(data, _Stored, where, ReportError, remedy)
    try:
        return _trace(stored, tensors)
    except (KeyError, IndexError, ValueError) as error:
        raise ReportError(f"{where} ({brief(error)}); {remedy}") from None


def _opened(path: Path, content: bytes) -> tuple[dict[str, str], dict[str, Array]]:
    """Return metadata and tensors of a safetensors file."""
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        length = int.from_bytes(content[:8], "little")
        if len(content) < 8 or length > min(len(content) - 8, _LARGEST_HEADER):
            raise ValueError("its header is incomplete")
        metadata = parse_json(content[8 : 8 + length].decode()).get("__metadata__", {})
        if not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("its metadata are not text")
        tensors = load(content)
        checksum(tensors, {})  # no types but those of a state
    except (SafetensorError, ValueError, RecursionError, AttributeError, KeyError) as error:
        raise ReportError(
            f"'{path}' is not a trace, or was truncated or changed ({brief(error)}); copy it again"
        ) from None
    return metadata, tensors


# Arrays of calls that are stored one after the other: name, dtype in the file.
_ROWS = {"lengths": np.int32, "scale": np.float32, "positions": np.int64}
_TOKENS = {"ids": np.int32, "weights": np.float32}


def _tensors(case: TracedCase) -> dict[str, Array]:
    """Return the arrays of a case as they are stored, by name."""
    calls = case.calls
    found: dict[str, Array] = {}
    for name, kind in (_ROWS | _TOKENS).items():
        found[name] = np.concatenate(
            [getattr(call, name).reshape(-1) for call in calls], dtype=kind
        )
    wanted = [
        call.logit_positions.reshape(-1) for call in calls if call.logit_positions is not None
    ]
    found["wanted"] = np.concatenate([*wanted, []], dtype=np.int32, casting="unsafe")
    found |= {"picks": case.picks.astype(np.int32), "labels": case.labels.astype(np.int32)}
    found["logits"] = np.ascontiguousarray(case.logits, np.float64)
    found |= {f"norm.{name}": norms for name, norms in case.norms.items()}
    for name, points in case.samples.items():
        found[f"sample.{name}"] = np.concatenate([point.reshape(-1) for point in points])
    return found


def _case_data(case: TracedCase) -> dict[str, Any]:
    return {
        **{key: getattr(case.case, key) for key in ("name", "about", "rows", "tokens")},
        "calls": [
            {
                "rows": len(call.ids),
                "size": call.ids.shape[1],
                "wanted": None if call.logit_positions is None else call.logit_positions.shape[1],
                "tokens_read": call.tokens_read,
                "compare": call.compare_state,
                "last_only": call.last_only,
                "reset": [int(row) for row in call.reset],
                "forks": [[int(n) for n in fork] for fork in call.forks],
                "moves": [[int(n) for n in move] for move in call.moves],
            }
            for call in case.calls
        ],
        "own": {
            name: {
                key: [getattr(error, key) for error in errors]
                for key in ("max_abs", "relative_rms", "scale")
            }
            for name, errors in case.own.errors.items()
        },
        "predictions": [asdict(prediction) for prediction in case.own.predictions],
    }


def _trace(stored: _Stored, tensors: Mapping[str, Array]) -> Trace:
    config = ModelConfig.from_dict(stored["config"], "config")
    state = [TensorSpec.from_dict(spec) for spec in stored["state"]]
    values: dict[str, Any] = {**stored, "config": config, "state": state}
    names = [case["name"] for case in stored["cases"]]
    if not names or len(set(names)) < len(names):
        raise ValueError("it has no cases, or one of them twice")
    cases = [
        _case(
            case,
            {
                n.partition(".")[2]: t
                for n, t in tensors.items()
                if n.startswith(f"{case['name']}.")
            },
            state,
            config.vocab_size,
        )
        for case in stored["cases"]
    ]
    return Trace(**{**values, "cases": cases})


class _Reader:
    """Takes arrays of given shapes off flat tensors, one after the other."""

    def __init__(self, tensors: Mapping[str, Array]) -> None:
        self._tensors = tensors
        self._used = dict.fromkeys(tensors, 0)

    def take(self, name: str, *shape: int) -> Array:
        size, start = int(np.prod(shape)), self._used[name]
        flat = self._tensors[name].reshape(-1)[start : start + size]
        if flat.size < size:
            raise ValueError(f"'{name}' is too short")
        self._used[name] = start + size
        return flat.reshape(shape)


def _case(
    stored: _StoredCase, tensors: Mapping[str, Array], state: Sequence[TensorSpec], vocabulary: int
) -> TracedCase:
    _check_values(tensors, vocabulary)
    reader = _Reader(tensors)
    rows = stored["rows"]
    if sum(call["size"] * rows for call in stored["calls"]) > _MOST_TOKENS:
        raise ValueError(f"case '{stored['name']}' has too many tokens")
    calls = [_call(step, call, reader, rows) for step, call in enumerate(stored["calls"])]
    points = [call.tokens_read for call in calls if call.compare_state]
    if not points or not calls[-1].compare_state:
        raise ValueError(f"case '{stored['name']}' does not end with a comparison")
    picks = reader.take("picks", len(tensors["picks"]), 3).astype(np.int64)
    _check_picks(picks, calls)
    names = [LOGITS, *(spec.name for spec in state)]
    return TracedCase(
        Case(stored["name"], stored["about"], rows, stored["tokens"]),
        calls,
        picks,
        reader.take("labels", len(picks)).astype(np.int64).clip(0, vocabulary - 1),
        reader.take("logits", len(picks), vocabulary).astype(np.float64),
        {name: reader.take(f"norm.{name}", len(points), rows) for name in names},
        {spec.name: _samples(spec, reader, rows, len(points)) for spec in state},
        _own(stored, names, points),
    )


def _check_values(tensors: Mapping[str, Array], vocabulary: int) -> None:
    """Check that all numbers are finite, and that ids and positions can be such."""
    for name, array in tensors.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise ValueError(f"'{name}' holds NaN or infinite values")
    for name, limit in (("ids", vocabulary), ("positions", MAX_POSITION)):
        array = tensors[name]
        if array.dtype.kind != "i" or (array.size and not 0 <= array.min() <= array.max() < limit):
            raise ValueError(f"'{name}' has values outside of 0 to {limit - 1}")


def _samples(spec: TensorSpec, reader: _Reader, rows: int, points: int) -> list[Array]:
    size = int(np.prod(spec.shape))
    counts = [len(sample_places((rows, size), n == points - 1)) for n in range(points)]
    return [reader.take(f"sample.{spec.name}", rows, count) for count in counts]


def _call(step: int, stored: _StoredCall, reader: _Reader, rows: int) -> ScheduledCall:
    size, wanted = stored["size"], stored["wanted"]
    if stored["rows"] != rows:
        raise ValueError(f"call {step} has {stored['rows']} rows; expected {rows}")
    if max([*stored["reset"], *(n for f in stored["forks"] for n in f), 0]) >= rows:
        raise ValueError(f"call {step} names a row that does not exist")
    if max((row for row, _ in stored["moves"]), default=0) >= rows:
        raise ValueError(f"call {step} names a row that does not exist")
    arrays = {name: reader.take(name, rows) for name in _ROWS}
    arrays |= {name: reader.take(name, rows, size) for name in _TOKENS}
    positions = None if wanted is None else reader.take("wanted", rows, wanted).astype(np.int64)
    return ScheduledCall(
        step=step,
        ids=arrays["ids"].astype(np.int64),
        weights=arrays["weights"].astype(np.float32),
        lengths=arrays["lengths"].astype(np.int64).clip(0, size),
        scale=arrays["scale"].astype(np.float32),
        labels=np.zeros((rows, size), np.int64),
        positions=arrays["positions"].astype(np.int64),
        reset=tuple(stored["reset"]),
        tokens_read=stored["tokens_read"],
        compare_state=stored["compare"],
        logit_positions=positions,
        last_only=stored["last_only"],
        forks=tuple(stored["forks"]),
        moves=tuple(stored["moves"]),
        forced=False,
    )


def _check_picks(picks: Array, calls: Sequence[ScheduledCall]) -> None:
    for number, row, place in picks.tolist():
        shape = calls[number].wanted.shape if 0 <= number < len(calls) else (0, 0)
        if not (0 <= row < shape[0] and 0 <= place < shape[1]):
            raise ValueError("a logit is of a place that no call returns")


def _own(stored: _StoredCase, names: Sequence[str], points: Sequence[int]) -> RunDrift:
    errors = {}
    for name in names:
        columns = stored["own"][name]
        lists = (columns["max_abs"], columns["relative_rms"], columns["scale"])
        errors[name] = [Error(*values, None) for values in zip(*lists, strict=True)]
        if len(errors[name]) != len(points):
            raise ValueError(f"'{name}' has errors for {len(errors[name])} points")
    predictions = [Prediction(**prediction) for prediction in stored["predictions"]]
    if len(predictions) != len(points):
        raise ValueError(f"it has predictions for {len(predictions)} points")
    return RunDrift(list(points), errors, predictions=predictions)


def without_places(run: RunDrift) -> RunDrift:
    """Return measurements without the places of the largest differences, which are not stored."""
    errors = {n: [replace(e, worst=None) for e in found] for n, found in run.errors.items()}
    return replace(run, errors=errors, ulp={})
