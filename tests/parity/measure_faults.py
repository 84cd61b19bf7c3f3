"""Run `check` and `bisect`, as they are by default, on a bundle with each hidden fault."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import onnx

from fwl_export.bisect import Bisection, bisect_bundle
from fwl_export.bundle.manifest import MODEL_FILE, Bundle, read_bundle
from fwl_export.bundle.tokenizer import read_ids
from fwl_export.demo import HELD_OUT_PLAY
from fwl_export.parity import Report, check_bundle
from fwl_export.runtimes.text import bundle_tokenizer
from tests.parity.hidden_faults import Hidden, Sizes, hidden_faults
from tests.parity.session_faults import SessionFault


def measure(folder: Path, only: str, target: Path, with_bisect: bool = True) -> None:
    """Measure the faults whose name matches a pattern, and add the results to a JSON file."""
    bundle = read_bundle(folder)
    ids = read_ids(HELD_OUT_PLAY, bundle_tokenizer(bundle))
    for name, fault in hidden_faults(Sizes.of(bundle.manifest)).items():
        if not re.search(only, name):
            continue
        began = time.perf_counter()
        with planted(bundle, fault) as broken:
            row = {"check": _checked(check_bundle(broken, ids))}
            if with_bisect:
                found = bisect_bundle(broken, ids)
                row["bisect"] = _located(found, fault, bundle, broken)
        known: dict[str, Any] = json.loads(target.read_text()) if target.exists() else {}
        known[name] = {**known.get(name, {}), **row}
        target.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        print(f"{name}: {row}, {time.perf_counter() - began:.0f} s", flush=True)


@contextmanager
def planted(bundle: Bundle, fault: Hidden) -> Iterator[Bundle]:
    """Plant a fault in a copy of a bundle, or in the runtime, while the block runs."""
    plant = fault.plant
    with (
        TemporaryDirectory() as folder,
        plant.planted() if isinstance(plant, SessionFault) else nullcontext(),
    ):
        yield fault.bundle(bundle, Path(folder) / "broken")


def _checked(report: Report) -> str:
    (candidate,) = report.candidates
    if candidate.failure:
        return f"yes, {candidate.failure.kind} in `{candidate.failure.tensor}`"
    breach = candidate.breach
    if breach is None:
        return f"**no**, largest use {candidate.use:.2g}"
    place = f"`{breach.tensor.name}`, case {breach.run.case}"
    return f"yes, {candidate.use:.2g} times the budget; first {place}"


def _located(found: Bisection, fault: Hidden, right: Bundle, broken: Bundle) -> str:
    finding = found.finding
    if finding is None:
        return "**nothing found**"
    where = f"{finding.place.replace('|', '/')}, fault of {finding.fault or 'unknown'}"
    if fault.is_in_file:
        good = finding.fault == "file" and bool(
            set(finding.nodes) & changed_nodes(right, broken) or finding.wrong_weights
        )
    else:
        good = finding.kind in fault.found and finding.fault in ("", "runtime")
    return f"{'yes' if good else '**no**'}, {where}"


def changed_nodes(right: Bundle, broken: Bundle) -> set[str]:
    """Return the names, as `bisect` gives them, of the nodes that differ in two bundles.

    Nodes that read a changed weight or call a changed function count.
    """
    models = [onnx.load(str(b.folder / MODEL_FILE)) for b in (right, broken)]
    nodes = [{node.SerializeToString() for node in model.graph.node} for model in models]
    weights = [{t.SerializeToString() for t in model.graph.initializer} for model in models]
    bodies = [{f.SerializeToString() for f in model.functions} for model in models]
    after = models[1]
    changed = {t.name for t in after.graph.initializer if t.SerializeToString() not in weights[0]}
    calls = {(f.domain, f.name) for f in after.functions if f.SerializeToString() not in bodies[0]}
    return {
        node.name or node.output[0]
        for node in after.graph.node
        if node.SerializeToString() not in nodes[0]
        or changed & set(node.input)
        or (node.domain, node.op_type) in calls
    }
