"""What a bisection found, for people and for programs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from fwl_export.json_files import without_non_finite

SCHEMA_VERSION = 1

# Fields of a finding whose names in the file are older.
_JSON_KEYS = {"tokens_read": "depth"}

NODE, STATE, FUSION, TRACE = "node", "state", "fusion", "trace"


@dataclass(frozen=True)
class Amount:
    """How far a tensor is off.

    Attributes:
      max_abs, relative_rms: distance from PyTorch in float64.
      allowed_max_abs, allowed_relative_rms: its budget.
      index: of the largest difference, and both values there.
    """

    max_abs: float
    relative_rms: float
    allowed_max_abs: float
    allowed_relative_rms: float
    index: Sequence[int]
    candidate: float
    reference: float


@dataclass(frozen=True)
class Finding:
    """The cause of what is wrong with a candidate.

    Attributes:
      kind: "node", a node of the graph; "state", what is carried between calls; "fusion", it is
        gone when the graph's tensors are looked at; "trace", PyTorch's traced graph is not what
        its module computes.
      step: number of the call in the schedule at which it starts.
      tokens_read: tokens the first row had read after that call.
      tokens: T of that call.
      tensor: the first that is wrong, in the order of the graph; a state tensor's name for "state".
      module: path of the module, or its method, that computes it in PyTorch.
      operation: PyTorch's operator.
      node: name of the ONNX node that computes it.
      op_type: its type.
      nodes: names of all nodes from right tensors to the wrong one.
      foreign: those among them that the exporter did not write.
      wrong_weights: weights and constants they take that are not the checkpoint's.
      fault: "file", the nodes do what the ONNX file says; "runtime", they do not; "" unknown.
      amount: how far it is off.
      outputs: of the model, that are wrong at that call.
      note: more words.
    """

    kind: str
    step: int
    tokens_read: int
    tokens: int
    tensor: str
    module: str = ""
    operation: str = ""
    node: str = ""
    op_type: str = ""
    nodes: Sequence[str] = ()
    foreign: Sequence[str] = ()
    wrong_weights: Sequence[str] = ()
    fault: str = ""
    amount: Amount | None = None
    outputs: Sequence[str] = ()
    note: str = ""

    @property
    def place(self) -> str:
        """Where it is, in one line."""
        if self.kind == STATE:
            return f"state carried between calls: {self.tensor}"
        if self.kind == NODE:
            return f"{self.module or 'the model'} / {self.op_type} '{self.node}' -> {self.tensor}"
        return f"{self.kind}: {self.tensor}"


@dataclass(frozen=True)
class Bisection:
    """One run of `bisect`.

    Attributes:
      bundle: its name.
      candidate: name of the runtime.
      precision: "fp32" or "fp16".
      text: its name.
      tokens, seed: of the schedule.
      cases: that were to be read.
      case: in which something went wrong; empty: in none.
      matched, total: tensors of the ONNX graph with a counterpart in PyTorch's, and all.
      finding: None: nothing is outside its budget.
      reproducer: folder; empty: none was written.
      reproduces: whether it shows the difference.
      command: that shows it.
      seconds: the run took.
    """

    bundle: str
    candidate: str
    precision: str
    text: str
    tokens: int
    seed: int
    cases: str
    case: str = ""
    matched: int = 0
    total: int = 0
    finding: Finding | None = None
    reproducer: str = ""
    reproduces: bool | None = None
    command: str = ""
    seconds: float = 0.0
    largest_use: float | None = field(default=None)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready data; what is infinite or NaN is null."""
        data: dict[str, Any] = without_non_finite(asdict(self))
        if finding := data["finding"]:
            data["finding"] = {_JSON_KEYS.get(key, key): value for key, value in finding.items()}
        place = self.finding.place if self.finding else None
        return {"schema_version": SCHEMA_VERSION, "found": place is not None, "place": place} | data

    def to_text(self) -> str:
        """Return lines for a terminal."""
        head = (
            f"{self.candidate} against PyTorch float64, {self.precision}, tensor by tensor\n"
            f"{self.text}: {self.tokens} tokens, seed {self.seed}, cases {self.cases}"
        )
        if self.finding is None:
            return f"{head}\n\nnothing found: every call is within its budget"
        return "\n".join([head, "", *_lines(self.finding, self.case), *self._after()])

    def _after(self) -> list[str]:
        lines = []
        if self.total:
            lines.append(f"compared   {self.matched} of {self.total} tensors of the graph")
        if self.reproducer:
            shows = "shows it" if self.reproduces else "does NOT show it: it takes the whole graph"
            lines += [f"reproduce  {self.command}", f"           which {shows}"]
        return lines


def _lines(finding: Finding, case: str) -> list[str]:
    lines = [
        f"FOUND      {finding.place}",
        f"starts at  case '{case}', call {finding.step} ({finding.tokens} tokens per row at most; "
        f"the first row has read {finding.tokens_read})",
    ]
    if finding.amount:
        amount = finding.amount
        lines += [
            f"off by     max abs {amount.max_abs:.2g} (allowed {amount.allowed_max_abs:.2g}), "
            f"relative RMS {amount.relative_rms:.2g} ({amount.allowed_relative_rms:.2g})",
            f"           {amount.candidate:.7g} instead of {amount.reference:.7g} at "
            f"{list(amount.index)}",
        ]
    optional: Mapping[str, Any] = {
        "in PyTorch": finding.operation,
        "nodes": ", ".join(finding.nodes) if len(finding.nodes) > 1 else "",
        "foreign": f"{', '.join(finding.foreign)}: not written by the exporter"
        if finding.foreign
        else "",
        "weights": f"{', '.join(finding.wrong_weights)}: not the checkpoint's"
        if finding.wrong_weights
        else "",
        "fault of": {
            "file": "the ONNX file: the runtime does what it says",
            "runtime": "the runtime: the ONNX file says otherwise",
        }.get(finding.fault, ""),
        "outputs": ", ".join(finding.outputs[:6]) + (" …" if len(finding.outputs) > 6 else ""),
        "note": finding.note,
    }
    return lines + [f"{title:<11}{text}" for title, text in optional.items() if text]
