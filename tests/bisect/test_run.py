"""`check` catches every planted fault and `bisect` locates it; nothing is found where none is."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from fwl_export.bisect import Bisection, bisect_bundle
from fwl_export.bisect.expose import Probe, open_probe
from fwl_export.bundle.manifest import GRAPH_FILE, read_bundle, write_manifest
from fwl_export.errors import BundleError, ConfigError, ReportError
from fwl_export.model import traced_graph as graphs
from fwl_export.parity import check_bundle, choose_cases
from fwl_export.parity.candidates import Candidate
from fwl_export.runtimes import Session, open_session
from tests.bundles import MAX_TOKENS, VOCABULARY
from tests.parity import faults, session_faults
from tests.parity.faults import broken_bundle
from tests.parity.planted import PLANTED, TABLE, table
from tests.parity.session_faults import SessionFault

TEXT = np.random.default_rng(0).integers(0, VOCABULARY, 600)
TOKENS = 120
CASES = "text,mixed@40"
CANDIDATE = "onnxruntime:no-plugin"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("planted")


@pytest.fixture(scope="module")
def sessions(tiny_bundle: Path, folder: Path) -> dict[str, Session]:
    """A session with each fault, by its name. `folder` holds the broken bundles, by number."""
    return {
        name: planted.session(tiny_bundle, folder / str(number))
        for number, (name, planted) in enumerate(PLANTED.items())
    }


@pytest.fixture(scope="module")
def report(tiny_bundle: Path, sessions: dict[str, Session]) -> dict[str, Any]:
    """The report of a check of all faults side by side."""
    fresh = {name: session.another(session.batch) for name, session in sessions.items()}
    made = check_bundle(read_bundle(tiny_bundle), TEXT, TOKENS, candidates=fresh, cases=CASES)
    return made.to_dict()


def of_candidate(name: str, report: dict[str, Any]) -> dict[str, Any]:
    """Return the report as if it were about one session, and that were the candidate."""
    (found,) = [entry for entry in report["candidates"] if entry["name"] == name]
    assert found["status"] == "outside", name
    return {**report, "candidates": [{**found, "name": CANDIDATE}]}


def caught_by(name: str, report: dict[str, Any]) -> set[str]:
    """Return the tensors that `check` finds outside their budgets or not finite."""
    (candidate,) = of_candidate(name, report)["candidates"]
    # null stands for an infinite error.
    return {
        tensor["name"]
        for run in candidate["runs"]
        for tensor in run["tensors"]
        if tensor["use"] is None or tensor["use"] > 1
    }


def bisected(
    number: int,
    tiny_bundle: Path,
    folder: Path,
    sessions: dict[str, Session],
    report: dict[str, Any],
) -> Bisection:
    name, planted = list(PLANTED.items())[number]
    return bisect_bundle(
        read_bundle(folder / str(number) if planted.op else tiny_bundle),
        TEXT,
        CANDIDATE,
        reproducer=folder / f"repro-{number}",
        session=None if planted.op else sessions[name],
        report=of_candidate(name, report),
    )


@pytest.mark.parametrize("number", range(len(PLANTED)), ids=list(PLANTED))
def test_a_fault_is_caught_and_located(
    number: int,
    tiny_bundle: Path,
    folder: Path,
    sessions: dict[str, Session],
    report: dict[str, Any],
) -> None:
    name, planted = list(PLANTED.items())[number]
    assert planted.caught_by in caught_by(name, report)
    result = bisected(number, tiny_bundle, folder, sessions, report)
    found = result.finding
    assert found is not None
    if not planted.op:
        where = (found.kind, found.tensor, found.fault)
        assert where == ("state", planted.module, "runtime"), result.to_text()
        assert "every node is right when given correct inputs" in found.note
        assert not (folder / f"repro-{number}").exists()
        return
    assert (found.module, found.op_type, found.fault) == (
        planted.module,
        planted.op,
        planted.fault,
    ), result.to_text()
    assert found.amount is not None
    assert not found.amount.max_abs <= found.amount.allowed_max_abs or (
        found.amount.relative_rms > found.amount.allowed_relative_rms
    )
    assert len(found.nodes) <= 4, "one node, and those that the fault put before it"
    assert result.reproduces
    nodes = onnx.load(folder / f"repro-{number}" / "repro.onnx").graph.node
    assert len(nodes) == len(found.nodes)


def test_there_are_enough_faults_and_the_table_that_ships_is_of_these() -> None:
    assert len(PLANTED) >= 12
    assert TABLE.read_text(encoding="utf-8") == table(), "run python -m tests.parity.planted"


@pytest.mark.parametrize(
    ("bundle", "candidate"),
    [
        ("tiny_bundle", "onnxruntime"),
        ("tiny_bundle_fp16", CANDIDATE),
        ("anchored_bundle", CANDIDATE),
    ],
)
def test_nothing_is_found_in_an_unbroken_bundle(
    bundle: str, candidate: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    opened = read_bundle(request.getfixturevalue(bundle))
    result = bisect_bundle(
        opened, TEXT, candidate, 60, reproducer=tmp_path / "repro", cases="text,mixed2@40"
    )
    assert result.finding is None, result.to_text()
    assert "nothing found" in result.to_text()
    assert (result.check, result.exit_code) == ("", 0)
    assert not (tmp_path / "repro").exists()


def test_chosen_cases_are_read(tiny_bundle: Path) -> None:
    moved: list[int] = []
    chosen = choose_cases("decode@8,long@16", 20, MAX_TOKENS)
    result = bisect_bundle(
        read_bundle(tiny_bundle), TEXT, CANDIDATE, 20, cases=chosen, advance=moved.append
    )
    assert result.finding is None
    assert result.cases == "decode@8,long@16"
    assert sum(moved) == sum(case.tokens for case in chosen)


@pytest.mark.parametrize("bundle", ["tiny_bundle", "tiny_bundle_fp16", "anchored_bundle"])
def test_tensors_of_an_unbroken_graph_are_far_from_their_budgets(
    bundle: str, request: pytest.FixtureRequest
) -> None:
    """So what bisect finds is not a mere rounding.

    A faulty session makes bisect compare every tensor of the unbroken graph.
    """
    opened = read_bundle(request.getfixturevalue(bundle))
    name = "a stale state buffer: read one call late"
    for seed in (0, 1):
        session = PLANTED[name].session(opened.folder, Path())
        result = bisect_bundle(opened, TEXT, CANDIDATE, TOKENS, seed, session=session)
        assert result.finding is not None
        assert (result.finding.kind, result.finding.tensor) == ("state", "fast.down.kernel")
        assert result.largest_use is not None
        assert result.largest_use < 0.7, result.largest_use
        assert result.matched > 0.75 * result.total


def test_the_reproducer_runs_and_says_that_it_is_wrong(tiny_bundle: Path, tmp_path: Path) -> None:
    fault = faults.wrong_epsilon("model.backbone.blocks.1.norm_2", 1e-3)
    broken = broken_bundle(tiny_bundle, tmp_path / "broken", fault)
    result = bisect_bundle(broken, TEXT, CANDIDATE, TOKENS, reproducer=tmp_path / "repro")
    assert result.command.endswith("repro.py")
    files = {path.name for path in (tmp_path / "repro").iterdir()}
    assert files == {"repro.onnx", "arrays.npz", "repro.json", "repro.py"}
    script = (tmp_path / "repro" / "repro.py").read_text()
    assert str(tmp_path) not in script
    done = subprocess.run(
        [sys.executable, "repro.py"],
        cwd=tmp_path / "repro",
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert "max abs" in done.stdout
    lines = result.to_text()
    assert "backbone.blocks.1.norm_2 / Add" in lines
    assert "the ONNX file: the runtime does what it says" in lines
    data = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert data["found"] is True
    assert data["finding"]["module"] == "backbone.blocks.1.norm_2"


def test_nan_is_located(tiny_bundle: Path, tmp_path: Path) -> None:
    fault = faults.not_a_number("pending.normed", 30)
    broken = broken_bundle(tiny_bundle, tmp_path / "broken", fault)
    result = bisect_bundle(broken, TEXT, CANDIDATE, TOKENS)
    assert result.finding is not None
    assert (result.finding.kind, result.finding.op_type) == ("node", "Where")
    assert result.finding.tensor == "present.pending.normed"
    assert json.dumps(result.to_dict(), allow_nan=False)


def test_a_fault_of_graph_optimization_is_told_from_one_in_a_node(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The runtime's optimized graph is wrong, but right when the inner tensors are outputs."""
    broken = broken_bundle(tiny_bundle, tmp_path / "broken", faults.ignored_decay(0))
    optimised = {read_bundle(tiny_bundle).model_files(): broken.model_files()}

    def probe(candidate: Candidate, path: Path, threads: int | None) -> Probe:
        return open_probe(candidate, optimised.get(path, path), threads)

    monkeypatch.setattr("fwl_export.bisect.run.open_probe", probe)
    session = open_session(broken, "onnxruntime", 3, threads=1, plugin="none")
    bundle = read_bundle(tiny_bundle)
    result = bisect_bundle(bundle, TEXT, CANDIDATE, TOKENS, session=session)
    assert result.finding is not None
    assert (result.finding.kind, result.finding.tensor) == ("fusion", "logits")
    assert "optimization" in result.finding.note


def test_a_trace_that_differs_from_the_module_is_reported(own_bundle: Path) -> None:
    path = own_bundle / GRAPH_FILE
    data = json.loads(path.read_text())
    (decay,) = [o for o in data["operations"] if o["target"] == "aten.neg.default"]
    decay["target"] = "aten.relu.default"
    path.write_text(json.dumps(data))
    bundle = read_bundle(own_bundle).add_files([GRAPH_FILE])
    broken = broken_bundle(own_bundle, own_bundle.parent / "broken", faults.ignored_decay(0))
    assert bundle.manifest.files[GRAPH_FILE] == broken.manifest.files[GRAPH_FILE]
    result = bisect_bundle(broken, TEXT, CANDIDATE, TOKENS)
    assert result.finding is not None
    assert result.finding.kind == "trace"


@pytest.mark.parametrize(
    ("candidate", "message"),
    [
        ("tensorrt:rtx", "'tensorrt:rtx' cannot run here"),
        ("torch:float32", "'torch:float32' does not run an ONNX graph; expected onnxruntime or"),
        ("nonsense", "'nonsense' is not a runtime"),
    ],
)
def test_what_cannot_be_bisected(candidate: str, message: str, tiny_bundle: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        bisect_bundle(read_bundle(tiny_bundle), TEXT, candidate, 20)


def test_a_bundle_without_its_graph(own_bundle: Path) -> None:
    manifest = read_bundle(own_bundle).manifest.to_dict()
    del manifest["files"][GRAPH_FILE]
    write_manifest(own_bundle, manifest)
    with pytest.raises(BundleError, match=r"has no model.graph.json.*export it again"):
        bisect_bundle(read_bundle(own_bundle), TEXT, CANDIDATE, 20)


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "builtins.eval",
        "operator.attrgetter",
        "operator.__class__",
        "torch.load",
        "torch.hub.load",
        "aten.__class__",
        "aten.nothing.default",
        "aten.add.__init__",
        "aten.from_file.default",  # opens a file
        "aten.save.default",
        "aten._print.default",
        "aten._unsafe_index_put.default",  # does not check the indices
        "aten._index_put_impl.default",
        "aten._sparse_coo_tensor_unsafe.default",
        "aten._nested_view_from_buffer.default",
        "aten.as_strided.default",
        "aten.empty.memory_format",  # hands out memory as it is
        "aten.resize_.default",  # changes its arguments
        "aten.set_.source_Tensor",
        "aten.add_.Tensor",
        "aten.add.out",
        "prims.device_put.default",
        "fwl.linear_attention_update.default",
        "",
        "..",
    ],
)
def test_a_graph_runs_operators_and_nothing_else(target: str) -> None:
    bad = graphs.Operation("bad", target, ["text"])
    with pytest.raises(BundleError, match="which this fwl-export does not run"):
        graphs.TracedGraph({}, [bad], {}).run({}, {}, torch.float64)


@pytest.mark.parametrize(
    ("target", "arguments"),
    [
        ("aten.add.Tensor", ["text", 1]),
        ("aten.add.Tensor", []),
        ("aten.add.Tensor", [{"ref": "nobody"}, 1]),
        ("aten.ones.default", [[1 << 60]]),
        ("aten.ones.default", [[4], {"dtype": "load"}]),
        ("aten.ones.default", [[4], {"dtype": ["float32"]}]),
        ("operator.getitem", [[], 1]),
        ("operator.truediv", [1, 0]),
        ("fwl::LinearAttentionUpdate", []),
    ],
)
def test_a_graph_that_cannot_be_computed(target: str, arguments: list[Any]) -> None:
    bad = graphs.Operation("bad", target, arguments)
    with pytest.raises(BundleError, match=r"the traced graph .*export the model again"):
        graphs.TracedGraph({}, [bad], {}).run({}, {}, torch.float64)


@pytest.mark.parametrize("dtype", ["load", "Tensor", "", "__name__", "nothing"])
def test_a_constant_of_no_dtype(dtype: str) -> None:
    sources = {"x": graphs.Source("constant", "x", [1.0], dtype)}
    with pytest.raises(BundleError, match="which does not exist; export the model again"):
        graphs.TracedGraph(sources, [], {}).run({}, {}, torch.float64)


def of_good_bundle(bundle: Path, **changed: Any) -> dict[str, Any]:
    """Return the report of a check that passed, with some fields of its first tensor changed."""
    report = check_bundle(
        read_bundle(bundle), TEXT, 40, candidates=CANDIDATE, cases="text"
    ).to_dict()
    report["candidates"][0]["status"] = "outside"
    report["candidates"][0]["runs"][0]["tensors"][0].update(changed)
    return report


def test_what_check_reported_and_bisect_cannot_explain_is_said(tiny_bundle: Path) -> None:
    report = of_good_bundle(tiny_bundle, uses=[0.5, 7.0, 3.0])
    result = bisect_bundle(read_bundle(tiny_bundle), TEXT, CANDIDATE, report=report)
    assert (result.finding, result.exit_code) == (None, 3)
    text = result.to_text()
    assert "NOT FOUND  check fails: 'logits' is at 7 times its budget in case 'text'" in text
    assert "are within their budgets; bisect cannot explain the failure" in text
    assert result.to_dict()["found"] is False
    assert result.to_dict()["check"].startswith("'logits' is at 7 times")


def test_a_report_of_something_else_is_refused(tiny_bundle: Path, anchored_bundle: Path) -> None:
    report = of_good_bundle(tiny_bundle)
    with pytest.raises(ReportError, match=r"made with the model .*give the bundle that the report"):
        bisect_bundle(read_bundle(anchored_bundle), TEXT, CANDIDATE, report=report)
    with pytest.raises(ReportError, match=r"is about onnxruntime:no-plugin, not about onnx-refere"):
        bisect_bundle(read_bundle(tiny_bundle), TEXT, "onnx-reference", report=report)


@pytest.mark.parametrize(
    ("fault", "kind", "note"),
    [
        (SessionFault(before=session_faults.last_position(1)), "selection", "other positions"),
        (SessionFault(write=session_faults.keeps("pending.")), "rows", "reset"),
        (SessionFault(session_faults.noise(4)), "unrepeatable", "depends on something else"),
        (
            SessionFault(session_faults.leaks("", 2, 1e-2)),
            "isolation",
            "alone in a session each is right",
        ),
        (
            SessionFault(session_faults.adds("fast.up.bias", lambda made: made.tokens > 2)),
            "state",
            "the session holds another one",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_fault_of_the_session_is_named(
    fault: SessionFault, kind: str, note: str, tiny_bundle: Path
) -> None:
    with fault.planted():
        result = bisect_bundle(
            read_bundle(tiny_bundle), TEXT, CANDIDATE, 60, cases="text,mixed5@60"
        )
    found = result.finding
    assert found is not None
    assert (found.kind, found.fault) == (kind, "runtime"), result.to_text()
    assert note in found.note
    assert "the runtime: the ONNX file says otherwise" in result.to_text()
