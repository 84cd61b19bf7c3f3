"""Find the cause of an error: the first call that goes wrong, then the first wrong tensor in it."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from fwl_export.bisect.expose import call_inputs, check_candidate, expose_all, open_probe
from fwl_export.bisect.finding import (
    FUSION,
    NODE,
    STATE,
    TRACE,
    Amount,
    Bisection,
    Finding,
)
from fwl_export.bisect.locate import (
    Located,
    compare,
    counterparts,
    locate,
    wrong_weights,
)
from fwl_export.bisect.reproduce import SCRIPT_FILE, write_reproducer
from fwl_export.bisect.steps import (
    LOGITS,
    Outside,
    Step,
    Suspect,
    as_types,
    fed,
    first_wrong_step,
    measure,
)
from fwl_export.bundle.manifest import GRAPH_FILE, Bundle
from fwl_export.bundle.state import PRESENT, Array, State
from fwl_export.errors import BundleError
from fwl_export.files import replaced_folder
from fwl_export.model.traced_graph import TracedGraph, read_graph
from fwl_export.parity.candidates import Candidate, parse_candidate
from fwl_export.parity.cases import MIXED, TEXT, Case, choose_cases
from fwl_export.parity.check import model_horizon, torch_threads
from fwl_export.runtimes import Session, open_session

if TYPE_CHECKING:
    import torch


DEFAULT_TOKENS = 500
DEFAULT_CASES = f"{TEXT},{MIXED}"

# Largest relative difference of two float64 programs with the same operators: roundings of 1e-16
# that grow over a few layers, with a wide margin.
_SAME = 1e-9


def bisect_bundle(
    bundle: Bundle,
    ids: Array,
    candidate: str | Candidate = "onnxruntime",
    tokens: int = DEFAULT_TOKENS,
    seed: int = 0,
    reproducer: Path | None = None,
    text: str = "",
    cases: str | Sequence[str | Case] = DEFAULT_CASES,
    session: Session | None = None,
    advance: Callable[[int], None] = lambda tokens: None,
) -> Bisection:
    """Find the first tensor of a candidate that differs from what PyTorch computes.

    Args:
      bundle: Bundle that holds its checkpoint and its traced graph.
      ids: Token ids of the text, [N] int64, with N of at least `tokens + 1`.
      candidate: Runtime that runs the ONNX graph, or its name, see `parity.candidates`.
      tokens: Largest number of tokens that the first row reads of the text.
      seed: Seed of the calls.
      reproducer: Folder to write the reproducer to, replacing what it holds. None writes none.
      text: Name of the text, for the report.
      cases: Names of cases, or what `choose_cases` returned for this bundle. They are read in
        turn until a call goes wrong.
      session: Session to check instead of a new one of the candidate.
      advance: Called with the number of tokens that the first row has moved on, in each case.

    Raises:
      ConfigError: The candidate does not run an ONNX graph or cannot run here, or a name is not a
        case.
      BundleError: The bundle is incomplete or changed, or has no checkpoint or no traced graph.
      TokenError: The text is too short.
      FwlError: The candidate cannot run the graph with all its tensors as outputs.
    """
    began = time.perf_counter()
    if isinstance(candidate, str):
        candidate = parse_candidate(candidate)
    check_candidate(candidate)
    graph = _graph(bundle)
    manifest = bundle.manifest
    limit = manifest.config.backbone.max_positions
    chosen = choose_cases(cases, tokens, manifest.max_tokens, limit)
    calls = {case.name: case.calls(ids, manifest.max_tokens, seed, limit) for case in chosen}
    session = session or candidate.open(bundle, 1, threads=1)
    horizon_tokens = model_horizon(bundle)
    fields: dict[str, Any] = {
        "bundle": bundle.folder.resolve().name,
        "candidate": candidate.name,
        "precision": manifest.precision,
        "text": text,
        "tokens": tokens,
        "seed": seed,
        "cases": cases if isinstance(cases, str) else ",".join(_name(case) for case in cases),
    }
    with torch_threads(1), TemporaryDirectory() as folder:
        own = open_session(bundle, "torch", 1)
        for case in chosen:
            reader = session.another(case.rows)
            suspect = first_wrong_step(
                bundle, calls[case.name], reader, own, horizon_tokens, advance
            )
            if suspect:
                search = _Search(
                    bundle, candidate, graph, reader, suspect, horizon_tokens, Path(folder)
                )
                fields |= {"case": case.name, **search.run(reproducer)}
                break
    return Bisection(**fields, seconds=time.perf_counter() - began)


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
    """The search within one call of the model."""

    def __init__(
        self,
        bundle: Bundle,
        candidate: Candidate,
        graph: TracedGraph,
        session: Session,
        suspect: Suspect,
        horizon_tokens: float,
        folder: Path,
    ) -> None:
        self._bundle = bundle
        self._candidate = candidate
        self._graph = graph
        self._session = session
        self._suspect = suspect
        self._step = suspect.step
        self._horizon_tokens = horizon_tokens
        self._path = folder / "exposed.onnx"
        self._inputs = call_inputs(self._step.call, as_types(session, self._step.past))

    def run(self, reproducer: Path | None) -> dict[str, Any]:
        """Return the result as keyword arguments of `Bisection`."""
        exact, own = (self._traced(precision) for precision in ("fp64", None))
        if difference := self._untrue_trace(exact):
            return {"finding": self._finding(TRACE, difference)}
        source = self._bundle.model_files()
        model = expose_all(source, self._path)
        names = counterparts(self._graph, model)
        found = open_probe(self._candidate, self._path).run(self._inputs)
        comparison = compare(
            model,
            names,
            found,
            own,
            exact,
            self._bundle.manifest.precision,
            self._step.tokens_read,
            self._horizon_tokens,
        )
        fields = {
            "matched": comparison.matched,
            "total": comparison.total,
            "largest_use": comparison.largest_use,
        }
        if not comparison.outside:
            return fields | {"finding": self._not_in_a_node(source)}
        located = locate(model, self._graph, names, comparison)
        return fields | self._in_a_node(located, source, names, found, exact, reproducer)

    def _traced(self, precision: str | None) -> State:
        """Return PyTorch's tensors of the call, with parameters, by their ONNX names."""
        import torch

        from fwl_export.runtimes.torch import load_model

        model = load_model(self._bundle, precision).model
        parameters: dict[str, torch.Tensor] = dict(model.named_parameters())
        parameters |= dict(model.named_buffers())
        kind = torch.float64 if precision == "fp64" else next(iter(parameters.values())).dtype
        past = self._step.past if precision == "fp64" else as_types(self._session, self._step.past)
        inputs = {
            name: torch.from_numpy(np.ascontiguousarray(array))
            for name, array in call_inputs(self._step.call, past).items()
        }
        values = self._graph.run(parameters, inputs, kind)
        values |= {f"model.{name}": tensor for name, tensor in parameters.items()}
        return {name: tensor.detach().numpy() for name, tensor in values.items()}

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

        whole = onnx.load(str(source))
        right = {
            name: exact[names[name]].astype(array.dtype) if name in names else array
            for name, array in {**found, **self._inputs}.items()
            if name in located.inputs
        }
        expected = exact[names[located.tensor]].astype(np.float64)
        with replaced_folder(reproducer) if reproducer else TemporaryDirectory() as folder:
            shown = write_reproducer(Path(folder), whole, located, right, expected, self._candidate)
        last = located.nodes[-1]
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
            wrong_weights=list(wrong_weights(whole, located.nodes, exact)),
            fault=faults[shown.file_is_wrong],
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

    def _not_in_a_node(self, source: Path) -> Finding:
        """Find the fault when every node is right if it is given correct inputs."""
        right = {f"{PRESENT}{n}" if n != LOGITS else n for n in self._suspect.outside}
        found = open_probe(self._candidate, source).run(self._inputs)
        outputs = {
            name: found[name if name == LOGITS else PRESENT + name] for name in self._step.outputs
        }
        padded = self._step.outputs[LOGITS] == 0
        outputs[LOGITS] = np.where(padded, 0, outputs[LOGITS])
        errors = measure(outputs, self._step.outputs)
        wrong = [n for n, o in self._suspect.outside.items() if o.budget.use(errors[n]) > 1]
        if right and wrong and self._suspect.teacher_forced:
            return self._finding(
                FUSION,
                wrong[0],
                amount=_amount(self._suspect.outside[wrong[0]]),
                note="every tensor is right when all tensors are outputs, which prevents the "
                "runtime's optimization of the graph; so the optimization is at fault",
            )
        return self._carried()

    def _carried(self) -> Finding:
        """Name the state tensor that differs from what the previous call returned."""
        note = "every node is right when given correct inputs; "
        states = [name for name in self._suspect.outside if name != LOGITS]
        if self._suspect.teacher_forced and len(self._suspect.outside) == 1 and states:
            note += "the model returns the right state, but the session holds another one"
            return self._finding(
                STATE, states[0], amount=_amount(self._suspect.outside[states[0]]), note=note
            )
        if stale := self._stale():
            note += f"the call read '{stale}' as it was one call earlier"
            return self._finding(STATE, stale, note=note)
        if self._suspect.failure:
            note += f"but the session raised: {self._suspect.failure}"
        name = states[0] if states else LOGITS
        outside = self._suspect.outside.get(name)
        return self._finding(STATE, name, amount=outside and _amount(outside), note=note)

    def _stale(self) -> str:
        """Return the state tensor that, read one call late, explains the outputs, or ""."""
        before = self._suspect.before
        if before is None or not self._suspect.outside:
            return ""
        reference = open_session(self._bundle, "torch", len(self._step.call.lengths), "fp64")
        found = self._suspect.found
        for name in self._step.past:
            if np.array_equal(before.past[name], self._step.past[name]) or name == "position":
                continue
            past = {**self._step.past, name: before.past[name]}
            stale = _with_past(self._step, past)
            outputs = fed(reference, stale, teacher_forced=True)
            if isinstance(outputs, str):
                continue
            errors = measure(found, outputs)
            if all(o.budget.use(errors[n]) <= 1 for n, o in self._suspect.outside.items()):
                return name
        return ""

    def _finding(self, kind: str, tensor: str, **fields: Any) -> Finding:
        step = self._step
        return Finding(
            kind,
            step.number,
            step.tokens_read,
            step.call.input_ids.shape[1],
            tensor,
            outputs=list(self._suspect.outside),
            **fields,
        )


def _with_past(step: Step, past: State) -> Step:
    return Step(step.number, step.tokens_read, step.call, step.reset, past, step.outputs)


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
