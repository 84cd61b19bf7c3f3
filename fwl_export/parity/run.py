"""Check a bundle: its runtimes against PyTorch in float64, over text."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy.typing as npt

from fwl_export.bundle import CHECKPOINT_FOLDER, Bundle
from fwl_export.model.stored import WEIGHTS_FILE
from fwl_export.parity.drift import Pair, measure_drift
from fwl_export.parity.report import Report
from fwl_export.parity.schedule import ROWS, Schedule
from fwl_export.parity.verdict import judge
from fwl_export.runtimes import Session, open_session

Array = npt.NDArray[Any]

REFERENCE = "PyTorch fp64"
DEFAULT_CANDIDATE = "onnxruntime"


def check_bundle(
    bundle: Bundle,
    ids: Array,
    tokens: int = 2000,
    seed: int = 0,
    candidates: Mapping[str, Session] | None = None,
    text: str = "",
    threads: int = 1,
    advance: Callable[[int], None] = lambda tokens: None,
) -> Report:
    """Read a text in every runtime, each with its own state, and judge how they agree.

    Args:
      bundle: must hold its checkpoint.
      ids: [N] int64, the text; N of `tokens + 1` or more.
      tokens: how many the first row reads; no more than the model can take.
      seed: of the calls.
      candidates: fresh sessions of `ROWS` rows by name, in the bundle's precision; None is the
        bundle's ONNX file in ONNX Runtime.
      text: name of the text, for the report.
      threads: of each runtime. With more than 1 the runtimes' pools wait for work by spinning
        and take the cores from one another, and sums have another order on every machine.
      advance: called with the number of tokens the first row has moved.

    Raises:
      BundleError: the bundle is incomplete or changed, or has no checkpoint.
      TokenError: the text is too short.
    """
    manifest = bundle.manifest
    limit = manifest.config.backbone.max_positions
    tokens = min(tokens, limit) if limit else tokens
    schedule = Schedule(ids, tokens, manifest.max_tokens, seed, limit)
    began = time.perf_counter()
    own = f"PyTorch {manifest.precision}"
    with _torch_threads(threads):
        references = {
            REFERENCE: open_session(bundle, "torch", ROWS, "fp64"),
            own: open_session(bundle, "torch", ROWS),
        }
        if candidates is None:
            session = open_session(bundle, "onnxruntime", ROWS, threads=threads)
            candidates = {DEFAULT_CANDIDATE: session}
        pairs = [Pair(own, REFERENCE)]
        pairs += [Pair(name, other) for name in candidates for other in references]
        drift = measure_drift({**references, **candidates}, pairs, schedule, advance)
    memory = remembered_tokens(bundle)
    return Report(
        bundle=bundle.folder.resolve().name,
        model_id=manifest.model_id,
        precision=manifest.precision,
        text=text,
        tokens=tokens,
        rows=ROWS,
        seed=seed,
        calls=drift.calls,
        largest_call=drift.largest_call,
        reference=REFERENCE,
        own=own,
        memory=memory,
        depths=drift.depths,
        candidates=[
            judge(drift, name, own, REFERENCE, manifest.precision, memory) for name in candidates
        ],
        seconds=time.perf_counter() - began,
    )


@contextmanager
def _torch_threads(count: int) -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def remembered_tokens(bundle: Bundle) -> float:
    """Return the horizon of the bundle's model in tokens; 0 if it forgets nothing."""
    from safetensors import safe_open

    if bundle.manifest.config.fast_weights.decay == "none":
        return 0.0
    path = bundle.file(f"{CHECKPOINT_FOLDER}/{WEIGHTS_FILE}")
    with safe_open(path, framework="numpy") as weights:
        horizon = float(weights.get_tensor("fast_weights.horizon"))
    return horizon if math.isfinite(horizon) else 0.0
