"""Find the cause of an error: the call, then the first wrong tensor in it.

`check` runs first, until a case fails. Its calls are then made one by one, see `steps`, and the
first that goes wrong is searched: inside the graph here and in `locate`, around it in `around`.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from fwl_export.bisect.around import Around
from fwl_export.bisect.expose import (
    GRAPH_RUNTIMES,
    call_inputs,
    check_candidate,
    expose_all,
    open_probe,
)
from fwl_export.bisect.finding import (
    FUSION,
    NODE,
    TRACE,
    UNREPEATABLE,
    Amount,
    Bisection,
    Finding,
)
from fwl_export.bisect.locate import (
    Located,
    compare,
    counterparts,
    locate,
    traced,
    wrong_weights,
)
from fwl_export.bisect.not_finite import NotFiniteSearch
from fwl_export.bisect.reported import Reported, first_reported
from fwl_export.bisect.reproduce import SCRIPT_FILE, write_reproducer
from fwl_export.bisect.steps import (
    LOGITS,
    Outside,
    Suspect,
    as_types,
    first_wrong_call,
    real_logits,
)
from fwl_export.bundle.manifest import GRAPH_FILE, Bundle
from fwl_export.bundle.state import PRESENT, Array, State
from fwl_export.errors import BundleError, NotFiniteError, ReportError
from fwl_export.files import replaced_folder
from fwl_export.model.traced_graph import TracedGraph, read_graph
from fwl_export.parity.candidates import Candidate, parse_candidate, parse_candidates
from fwl_export.parity.cases import AGAIN, Case, ModelLimits, choose_cases, plan_calls
from fwl_export.parity.check import (
    DEFAULT_CASES,
    DEFAULT_TOKENS,
    check_bundle,
    default_candidates,
    model_horizon,
    torch_threads,
)
from fwl_export.parity.drift import NOT_FINITE
from fwl_export.parity.schedule import ScheduledCall
from fwl_export.runtimes import Session, open_session

# Largest relative difference of two float64 programs with the same operators: roundings of 1e-16
# that grow over a few layers, with a wide margin.
_SAME = 1e-9

NOT_REPEATABLE = "not repeatable"  # kind of a failure, see `drift.Failure`


def bisect_bundle(
    bundle: Bundle,
    ids: Array,
    candidate: str | Candidate | None = None,
    tokens: int = DEFAULT_TOKENS,
    seed: int = 0,
    reproducer: Path | None = None,
    text: str = "",
    cases: str | Sequence[str | Case] = DEFAULT_CASES,
    session: Session | None = None,
    advance: Callable[[int], None] = lambda tokens: None,
    report: Mapping[str, Any] | None = None,
) -> Bisection:
    """Find the first tensor of a candidate that differs from what PyTorch computes.

    Args:
      bundle: Bundle that holds its checkpoint and its traced graph.
      ids: Token ids of the text, [N] int64, with N of at least `tokens + 1`.
      candidate: Runtime that runs the ONNX graph, or its name, see `parity.candidates`. None means
        those that `check` takes by default, or of `report` those that run the graph.
      tokens: Largest number of tokens that the first row reads of the text.
      seed: Seed of the calls.
      reproducer: Folder to write the reproducer to, replacing what it holds. None writes none.
      text: Name of the text, for the report.
      cases: Names of cases, or what `choose_cases` returned for this bundle. They are read in
        turn until `check` fails.
      session: Session to check instead of a new one of the candidate.
      advance: Called with the number of tokens that the first row has moved on, in each case.
      report: Data of a report of `check`, see `read_report`, in place of a new check; its text,
        tokens, seed and cases are taken instead of the arguments.

    Raises:
      ConfigError: The candidate does not run an ONNX graph or cannot run here, or a name is not a
        case.
      BundleError: The bundle is incomplete or changed, or has no checkpoint or no traced graph.
      ReportError: The report is of another model, or not about the candidate.
      TokenError: The text is too short.
      FwlError: The candidate cannot be opened, or cannot run the graph with all its tensors as
        outputs.
    """
    began = time.perf_counter()
    candidates = _candidates(candidate, report)
    for each in candidates:
        check_candidate(each)
    graph = _graph(bundle)
    planned = _Planned(ids, tokens, seed, cases, text) if report is None else _of_report(report)
    limits = ModelLimits.of_bundle(bundle)
    chosen = choose_cases(planned.cases, planned.tokens, limits, planned.seed)
    fields: dict[str, Any] = {
        "bundle": bundle.folder.resolve().name,
        "candidate": ",".join(each.name for each in candidates),
        "precision": bundle.manifest.precision,
        "text": planned.text,
        "tokens": planned.tokens,
        "seed": planned.seed,
        "cases": planned.names,
    }
    checked = report or _check(bundle, planned, chosen, candidates, session, advance)
    _check_model(checked, bundle)
    wrong = first_reported(checked, [each.name for each in candidates])
    if wrong is None:
        return Bisection(**fields, seconds=time.perf_counter() - began)
    (at_fault,) = [each for each in candidates if each.name == wrong.candidate]
    fields |= {"candidate": at_fault.name, "case": wrong.case, "check": wrong.sentence}
    read = np.array(checked["text"]["ids"], np.int64)  # the calls depend on how many there are
    replay = _Replay(
        bundle,
        at_fault,
        graph,
        plan_calls(chosen, read, limits, planned.seed)[wrong.case],
        next(case.rows for case in chosen if case.name == wrong.case),
        wrong,
    )
    found = replay.run(session, reproducer)
    return Bisection(**fields, **found, seconds=time.perf_counter() - began)


@dataclass(frozen=True)
class _Planned:
    """What is read: the arguments of `bisect_bundle` of the same names, or those of a report."""

    ids: Array
    tokens: int
    seed: int
    cases: str | Sequence[str | Case]
    text: str

    @property
    def names(self) -> str:
        """Names of the cases, separated by commas."""
        if isinstance(self.cases, str):
            return self.cases
        return ",".join(_name(case) for case in self.cases)


def _of_report(report: Mapping[str, Any]) -> _Planned:
    settings = report["settings"]
    ids = np.array(report["text"]["ids"], np.int64)
    cases = ",".join(settings["cases"])
    return _Planned(ids, settings["tokens"], settings["seed"], cases, report["text"]["name"])


def _candidates(
    candidate: str | Candidate | None, report: Mapping[str, Any] | None
) -> list[Candidate]:
    if isinstance(candidate, Candidate):
        return [candidate]
    if candidate is not None:
        return [parse_candidate(candidate)]
    if report is None:
        return parse_candidates(default_candidates())
    named = parse_candidates(report["settings"]["candidates"])
    able = [each for each in named if each.runtime in GRAPH_RUNTIMES]
    return able or named  # of which none is able to, which is said where that is checked


def _check(
    bundle: Bundle,
    planned: _Planned,
    chosen: Sequence[Case],
    candidates: Sequence[Candidate],
    session: Session | None,
    advance: Callable[[int], None],
) -> Mapping[str, Any]:
    """Check the candidates until a case fails; returns the data of the report."""
    report = check_bundle(
        bundle,
        planned.ids,
        planned.tokens,
        planned.seed,
        {candidates[0].name: session} if session else candidates,
        cases=chosen,
        advance=advance,
        stop_early=True,
    )
    return report.to_dict()


def _check_model(report: Mapping[str, Any], bundle: Bundle) -> None:
    of_report, of_bundle = report["bundle"]["model_id"], bundle.manifest.model_id
    if of_report != of_bundle:
        raise ReportError(
            f"the report was made with the model {of_report[:12]}…, but this bundle has the model "
            f"{of_bundle[:12]}…; give the bundle that the report was made with"
        )


@dataclass(frozen=True)
class _Replay:
    """The calls of a case that failed, to be made one by one.

    Attributes:
      bundle: Bundle under check.
      candidate: Candidate that failed.
      graph: PyTorch's traced graph.
      calls: Calls of the case.
      rows: Number of rows.
      wrong: What the check found.
    """

    bundle: Bundle
    candidate: Candidate
    graph: TracedGraph
    calls: Iterable[ScheduledCall]
    rows: int
    wrong: Reported

    def run(self, session: Session | None, reproducer: Path | None) -> dict[str, Any]:
        """Return what was found as keyword arguments of `Bisection`."""
        if self.wrong.kind == NOT_REPEATABLE:
            return {"finding": self._not_repeatable()}
        threads = None if self.wrong.case == AGAIN else 1
        opened = session or self.candidate.open(self.bundle, 1, threads)
        reader = opened.another(self.rows)
        horizon = model_horizon(self.bundle)
        with torch_threads(1), TemporaryDirectory() as folder:
            if self.wrong.kind == NOT_FINITE:
                search = NotFiniteSearch(self.bundle, self.candidate, self.graph, reader, threads)
                if explained := search.run(self._until(), Path(folder)):
                    return {"finding": explained}
            own = open_session(self.bundle, "torch", 1)
            try:
                suspect = first_wrong_call(self.bundle, self._until(), reader, own, horizon)
            except NotFiniteError:  # PyTorch's own error, which budgets are measured by
                suspect = None
            if suspect is None:
                return {}
            search_within = _Search(
                self.bundle,
                self.candidate,
                self.graph,
                reader,
                suspect,
                horizon,
                Path(folder),
                threads,
            )
            return search_within.run(reproducer)

    def _until(self) -> Iterator[ScheduledCall]:
        """Yield the calls up to the one in which the check saw that something is wrong."""
        for call in self.calls:
            yield call
            if call.step == self.wrong.step or (
                self.wrong.step is None and call.tokens_read >= self.wrong.tokens_read
            ):
                return

    def _not_repeatable(self) -> Finding:
        wrong = self.wrong
        return Finding(
            UNREPEATABLE,
            wrong.step or 0,
            wrong.tokens_read,
            0,
            wrong.tensor or LOGITS,
            fault="runtime",
            note=wrong.sentence,
        )


def _name(case: str | Case) -> str:
    return case if isinstance(case, str) else f"{case.name}@{case.tokens}"


def _graph(bundle: Bundle) -> TracedGraph:
    if GRAPH_FILE not in bundle.manifest.files:
        raise BundleError(
            f"bundle '{bundle.folder}' has no {GRAPH_FILE}, the traced graph that bisect compares "
            "with; export it again with this version"
        )
    return read_graph(bundle.folder / GRAPH_FILE, bundle.read_file(GRAPH_FILE))


class _Search:
    """The search within one call."""

    def __init__(
        self,
        bundle: Bundle,
        candidate: Candidate,
        graph: TracedGraph,
        session: Session,
        suspect: Suspect,
        horizon_tokens: float,
        folder: Path,
        threads: int | None,
    ) -> None:
        self._bundle = bundle
        self._candidate = candidate
        self._graph = graph
        self._session = session
        self._suspect = suspect
        self._step = suspect.expected.steps[0]
        self._horizon_tokens = horizon_tokens
        self._path = folder / "exposed.onnx"
        self._threads = threads

    def run(self, reproducer: Path | None) -> dict[str, Any]:
        """Return the result as keyword arguments of `Bisection`."""
        source = self._bundle.model_files()
        wrong = self._wrong_outputs(source)
        exact, own = (self._traced(precision) for precision in ("fp64", None))
        if difference := self._untrue_trace(exact):
            return {"finding": self._finding(TRACE, difference)}
        model = expose_all(source, self._path)
        names = counterparts(self._graph, model)
        found = open_probe(self._candidate, self._path, self._threads).run(self._inputs)
        comparison = compare(
            model,
            names,
            found,
            own,
            exact,
            self._bundle.manifest.precision,
            self._suspect.expected.call.tokens_read,
            self._horizon_tokens,
        )
        fields = {
            "matched": comparison.matched,
            "total": comparison.total,
            "largest_use": comparison.largest_use,
        }
        if comparison.outside:
            located = locate(model, self._graph, names, comparison)
            return fields | self._in_a_node(located, source, names, found, exact, reproducer)
        return fields | {"finding": self._fused(wrong) if wrong else self._around()}

    @property
    def _inputs(self) -> dict[str, Any]:
        return call_inputs(self._step.call, as_types(self._session, self._step.past))

    def _wrong_outputs(self, source: Path) -> dict[str, Outside]:
        """Run the graph on each call of the model; the first that is wrong becomes the step."""
        probe = open_probe(self._candidate, source, self._threads)
        first = self._step
        for step in self._suspect.expected.steps:
            self._step = step
            found = probe.run(self._inputs)
            outputs = {
                name: found[name if name == LOGITS else PRESENT + name] for name in step.outputs
            }
            outputs[LOGITS] = real_logits(outputs[LOGITS], step.call)
            tokens_read = self._suspect.expected.call.tokens_read
            outside = self._suspect.judge.outside(outputs, step.outputs, tokens_read, True)
            if outside:
                return outside
        self._step = first
        return {}

    def _traced(self, precision: str | None) -> State:
        """Return PyTorch's tensors of the call, with parameters, by their ONNX names."""
        exact = precision == "fp64"
        past = self._step.past if exact else as_types(self._session, self._step.past)
        return traced(self._bundle, self._graph, self._step.call, past, precision)

    def _untrue_trace(self, exact: State) -> str:
        """Return the first output at which the traced graph differs from its module, or ""."""
        for name, right in self._step.outputs.items():
            value = exact[self._graph.outputs[name if name == LOGITS else PRESENT + name]]
            if name == LOGITS:
                value = np.where(right == 0, 0, value)
            scale = max(float(np.abs(right).max()), 1.0) if right.size else 1.0
            if not np.all(np.abs(value - right) <= _SAME * scale):
                return name
        return ""

    def _in_a_node(
        self,
        located: Located,
        source: Path,
        names: Mapping[str, str],
        found: State,
        exact: State,
        reproducer: Path | None,
    ) -> dict[str, Any]:
        import onnx

        whole = onnx.load(str(source), load_external_data=False)
        # Beside the exposed copy: onnx refuses data behind a link, as in the Hugging Face cache.
        onnx.load_external_data_for_model(whole, str(self._path.parent))
        right = {
            name: exact[names[name]].astype(array.dtype) if name in names else array
            for name, array in {**found, **self._inputs}.items()
            if name in located.inputs
        }
        expected = exact[names[located.tensor]].astype(np.float64)
        with replaced_folder(reproducer) if reproducer else TemporaryDirectory() as folder:
            shown = write_reproducer(Path(folder), whole, located, right, expected, self._candidate)
        last = located.nodes[-1]
        different = list(wrong_weights(whole, located.nodes, exact))
        file_is_wrong = True if different else shown.file_is_wrong
        faults = {True: "file", False: "runtime", None: ""}
        finding = self._finding(
            NODE,
            located.tensor,
            module=located.operation.scope,
            operation=str(located.operation),
            node=last.name or last.output[0],
            op_type=f"{last.domain}::{last.op_type}" if last.domain else last.op_type,
            nodes=[node.name or node.output[0] for node in located.nodes],
            foreign=located.foreign,
            wrong_weights=different,
            fault=faults[file_is_wrong],
            amount=_amount(located.outside),
        )
        if reproducer is None:
            return {"finding": finding}
        return {
            "finding": finding,
            "reproducer": str(reproducer),
            "reproduces": shown.reproduces,
            "command": self._command(reproducer, located),
        }

    def _command(self, reproducer: Path, located: Located) -> str:
        """Return the shell command that runs the reproducer."""
        needs_kernel = self._candidate.runtime == "onnxruntime" and located.nodes[-1].domain
        has_kernel = self._candidate.arguments.get("plugin") != "none"
        library = " CUSTOM-OP-LIBRARY" if needs_kernel and has_kernel else ""
        return f"python {shlex.quote(str(reproducer / SCRIPT_FILE))}{library}"

    def _fused(self, wrong: Mapping[str, Outside]) -> Finding:
        name = next(iter(wrong))
        return self._finding(
            FUSION,
            name,
            fault="runtime",
            amount=_amount(wrong[name]),
            note="every tensor is right when all tensors are outputs, which prevents the "
            "runtime's optimization of the graph; so the optimization is at fault",
        )

    def _around(self) -> Finding:
        """Find the fault when every node is right if it is given correct inputs."""
        named = Around(self._bundle, self._session, self._suspect).find()
        outside = self._suspect.outside.get(named.tensor)
        amount = _amount(outside) if outside else None
        return self._finding(
            named.kind, named.tensor, fault="runtime", amount=amount, note=named.note
        )

    def _finding(self, kind: str, tensor: str, **fields: Any) -> Finding:
        call = self._suspect.expected.call
        return Finding(
            kind,
            call.step,
            call.tokens_read,
            call.ids.shape[1],
            tensor,
            outputs=list(self._suspect.outside),
            **fields,
        )


def _amount(outside: Outside) -> Amount:
    worst = outside.error.worst
    return Amount(
        outside.error.max_abs,
        outside.error.relative_rms,
        outside.budget.max_abs,
        outside.budget.relative_rms,
        list(worst.index) if worst else [],
        worst.candidate if worst else 0.0,
        worst.reference if worst else 0.0,
    )
