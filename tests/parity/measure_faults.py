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

import numpy as np
import onnx

from fwl_export.bisect import Bisection, bisect_bundle
from fwl_export.bisect.reported import first_reported
from fwl_export.bundle.manifest import MODEL_FILE, Bundle, read_bundle
from fwl_export.bundle.state import Array
from fwl_export.parity import Report, check_bundle
from tests.bundles import CALLED_AS_THE_DEMO, write_bundle, write_checkpoint
from tests.parity.hidden_faults import Hidden, Sizes, hidden_faults
from tests.parity.session_faults import SessionFault


def measure(only: str, target: Path) -> None:
    """Measure the faults whose name matches a pattern, and add the results to a JSON file.

    They are planted in a model whose layers are tiny but which is called as the demo model is: the
    check of a bundle takes a minute on two cores otherwise.
    """
    with TemporaryDirectory() as folder:
        checkpoint = write_checkpoint(Path(folder) / "checkpoint", config=CALLED_AS_THE_DEMO)
        bundle = read_bundle(write_bundle(Path(folder) / "bundle", checkpoint, max_tokens=256))
        ids = np.random.default_rng(0).integers(0, CALLED_AS_THE_DEMO.vocab_size, 9000)
        for name, fault in hidden_faults(Sizes.of(bundle.manifest)).items():
            if not re.search(only, name):
                continue
            began = time.perf_counter()
            row = _row(bundle, fault, ids)
            known: dict[str, Any] = json.loads(target.read_text()) if target.exists() else {}
            known[name] = row
            text = json.dumps(known, indent=1, sort_keys=True, ensure_ascii=False)
            target.write_text(text + "\n", encoding="utf-8")
            print(f"{name}: {row}, {time.perf_counter() - began:.0f} s", flush=True)


def _row(bundle: Bundle, fault: Hidden, ids: Array) -> dict[str, str]:
    with planted(bundle, fault) as broken:
        report = check_bundle(broken, ids, stop_early=True)
        found = bisect_bundle(broken, ids, report=report.to_dict())
        return {"check": _checked(report), "bisect": _located(found, fault, bundle, broken)}


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
    wrong = first_reported(report.to_dict(), None)
    if wrong is None:
        return f"**no**, largest use {max(c.use for c in report.candidates):.2g}"
    return f"yes: {wrong.sentence}"


def _located(found: Bisection, fault: Hidden, right: Bundle, broken: Bundle) -> str:
    finding = found.finding
    if finding is None:
        return "**no**, " + ("and says so" if found.check else "nothing is found")
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
