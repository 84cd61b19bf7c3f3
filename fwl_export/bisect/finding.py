"""The result of a bisection, as text and as JSON-ready data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from fwl_export.json_files import without_non_finite
from fwl_export.printable import one_line

SCHEMA_VERSION = 1

# Fields of a finding that have another name in the JSON schema.
_JSON_KEYS = {"tokens_read": "depth"}

NODE, STATE, FUSION, TRACE, RANGE = "node", "state", "fusion", "trace", "range"
ROWS, SELECTION, ISOLATION, UNREPEATABLE = "rows", "selection", "isolation", "unrepeatable"

_PLACES = {
    STATE: "state carried between calls",
    ROWS: "rows reset, copied or moved between calls",
    SELECTION: "choice of the logits that a call returns",
    ISOLATION: "rows that should not influence each other",
    UNREPEATABLE: "something else than a call's inputs",
}


@dataclass(frozen=True)
class Amount:
    """The error of a tensor, and how large it may be.

    Attributes:
      max_abs: Largest absolute difference from PyTorch in float64.
      relative_rms: RMS of the difference divided by the RMS of PyTorch's values.
      allowed_max_abs: Budget of `max_abs`.
      allowed_relative_rms: Budget of `relative_rms`.
      index: Index of the element with the largest difference.
      candidate: Value of that element in the candidate.
      reference: Value of that element in PyTorch.
    """

    max_abs: float
    relative_rms: float
    allowed_max_abs: float
    allowed_relative_rms: float
    index: Sequence[int]
    candidate: float
    reference: float


@dataclass(frozen=True)
class Overflow:
    """A number that is NaN or infinite, and what led to it.

    Attributes:
      dtype: Type of the tensor, e.g. "float16".
      largest: Largest number of that type.
      index: Index of the first element that is not finite.
      value: Its value: NaN or infinity.
      reference: Its value in PyTorch in float64, or None if PyTorch has no such tensor.
      input: Name of the operation's input with the largest number; "" if it has none.
      largest_input: Largest absolute value of that input.
    """

    dtype: str
    largest: float
    index: Sequence[int]
    value: float
    reference: float | None
    input: str
    largest_input: float


@dataclass(frozen=True)
class Finding:
    """The cause of a candidate's error.

    Attributes:
      kind: Where the fault is. "node": in a node of the graph. "state": in the state that is
        carried between calls. "fusion": in the runtime's graph optimization; the error vanishes
        when all tensors are outputs. "trace": PyTorch's traced graph differs from its module.
        "range": a number is NaN or infinite, in most cases because it is too large for its type.
        "rows": in rows that are reset, copied or moved between calls. "selection": in which logits
        a call returns. "isolation": in rows that influence each other. "unrepeatable": the same
        call from the same state gives different results.
      step: Number of the scheduled call at which the error starts.
      tokens_read: Tokens the first row had read after that call.
      tokens: T of that call.
      tensor: Name of the first wrong tensor in graph order; for "state", of the state tensor.
      module: Path of the PyTorch module, or its method, that computes the tensor.
      operation: PyTorch operator that computes the tensor.
      node: Name of the ONNX node that computes the tensor.
      op_type: Operator type of that node, with its domain if it is not ONNX's own.
      nodes: Names of all nodes between correct tensors and the wrong one.
      foreign: Names of those nodes that the exporter did not write.
      wrong_weights: Weights and constants of those nodes that differ from the checkpoint.
      fault: "file" if the nodes do what the ONNX file says, "runtime" if not, "range" if the number
        is too large for its type, "" if unknown.
      amount: Error of the tensor and its budget, or None if unknown.
      outputs: Names of the model's outputs that are wrong at that call.
      note: Explanation in words, or "".
      overflow: The number that is not finite, for "range"; None otherwise.
      row: Row in which it is, or None.
      token: Tokens that the row had read before the one at which it is first seen, or None.
      token_id: Id of that token, or None.
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
    overflow: Overflow | None = None
    row: int | None = None
    token: int | None = None
    token_id: int | None = None

    @property
    def place(self) -> str:
        """Location of the fault in one line."""
        if self.kind in _PLACES:
            return f"{_PLACES[self.kind]}: {self.tensor}"
        if self.kind == NODE or (self.kind == RANGE and self.node):
            return f"{self.module or 'the model'} / {self.op_type} '{self.node}' -> {self.tensor}"
        return f"{self.kind}: {self.tensor}"


@dataclass(frozen=True)
class Bisection:
    """The result of one run of `bisect`.

    Attributes:
      bundle: Name of the bundle.
      candidate: Name of the candidate.
      precision: Precision of the bundle's activations, "fp32" or "fp16".
      text: Name of the text.
      tokens: Tokens of the text that the first row was to read.
      seed: Seed of the calls.
      cases: Names of the cases that `check` was to read, separated by commas.
      case: Name of the case in which `check` failed, or "" if none did.
      check: What `check` found wrong, as a sentence, or "" if it found nothing.
      matched: Number of tensors of the ONNX graph that were compared with PyTorch's.
      total: Number of all tensors that the nodes of the ONNX graph compute.
      finding: Cause of the error, or None if every call is within its budget.
      reproducer: Folder with the reproducer, or "" if none was written.
      reproduces: Whether the reproducer shows the error; None if none was written.
      command: Shell command that runs the reproducer, or "".
      seconds: Duration of the run in seconds.
      largest_use: Largest error divided by its budget over all compared tensors, or None.
    """

    bundle: str
    candidate: str
    precision: str
    text: str
    tokens: int
    seed: int
    cases: str
    case: str = ""
    check: str = ""
    matched: int = 0
    total: int = 0
    finding: Finding | None = None
    reproducer: str = ""
    reproduces: bool | None = None
    command: str = ""
    seconds: float = 0.0
    largest_use: float | None = field(default=None)

    @property
    def exit_code(self) -> int:
        """Exit code of `fwl-export bisect`.

        0: nothing is wrong; 1: a fault was found; 3: `check` fails, and its cause was not found.
        """
        if self.finding is not None:
            return 1
        return 3 if self.check else 0

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready data; numbers that are infinite or NaN become null."""
        data: dict[str, Any] = without_non_finite(asdict(self))
        if finding := data["finding"]:
            data["finding"] = {_JSON_KEYS.get(key, key): value for key, value in finding.items()}
        place = self.finding.place if self.finding else None
        return {"schema_version": SCHEMA_VERSION, "found": place is not None, "place": place} | data

    def to_text(self) -> str:
        """Return the result as lines for a terminal."""
        head = (
            f"{self.candidate} ({self.precision}) against PyTorch in float64, tensor by tensor\n"
            f"text {one_line(self.text) or '(ids)'}: {self.tokens} tokens, seed {self.seed}, "
            f"cases {self.cases}"
        )
        if self.finding is not None:
            return "\n".join([head, "", *_lines(self.finding, self.case), *self._after()])
        if not self.check:
            return f"{head}\n\nnothing found: every call is within its budget"
        return (
            f"{head}\n\nNOT FOUND  check fails: {one_line(self.check)}\n"
            "           Made again one by one, with every tensor compared after each, the calls "
            f"of case '{self.case}' are within their budgets; bisect cannot explain the failure."
        )

    def _after(self) -> list[str]:
        lines = []
        if self.total:
            lines.append(f"compared   {self.matched} of the graph's {self.total} tensors")
        if self.reproducer:
            shows = (
                "shows the error"
                if self.reproduces
                else "does NOT show the error, which appears in the whole graph only"
            )
            lines += [f"reproduce  {one_line(self.command)}", f"           This program {shows}."]
        return lines


def _overflow(overflow: Overflow, finding: Finding) -> list[str]:
    true = "" if overflow.reference is None else f"; {overflow.reference:.7g} in float64"
    lines = [
        f"not finite {overflow.value} at {list(overflow.index)}{true}; the largest "
        f"{overflow.dtype} is {overflow.largest:.7g}"
    ]
    if finding.token is not None:
        at = f"token {finding.token} of row {finding.row} (id {finding.token_id})"
        lines.insert(0, f"first at   {at}")
    if overflow.input:
        lines.append(
            f"inputs     {overflow.largest_input:.7g} at most in absolute value, in "
            f"'{overflow.input}'"
        )
    return lines


def _lines(finding: Finding, case: str) -> list[str]:
    lines = [
        f"FOUND      {finding.place}",
        f"starts at  case '{case}', call {finding.step} (T = {finding.tokens}; the first row had "
        f"read {finding.tokens_read} tokens after it)",
    ]
    if finding.amount:
        amount = finding.amount
        lines += [
            f"off by     max abs {amount.max_abs:.2g} (allowed {amount.allowed_max_abs:.2g}), "
            f"relative RMS {amount.relative_rms:.2g} (allowed {amount.allowed_relative_rms:.2g})",
            f"           worst element {list(amount.index)}: {amount.candidate:.7g} instead of "
            f"{amount.reference:.7g}",
        ]
    if finding.overflow:
        lines += _overflow(finding.overflow, finding)
    optional: Mapping[str, Any] = {
        "in PyTorch": finding.operation,
        "nodes": ", ".join(finding.nodes) if len(finding.nodes) > 1 else "",
        "foreign": f"{', '.join(finding.foreign)}: the exporter did not write these nodes"
        if finding.foreign
        else "",
        "weights": f"{', '.join(finding.wrong_weights)}: differ from the checkpoint"
        if finding.wrong_weights
        else "",
        "fault of": {
            "file": "the ONNX file: the runtime does what it says",
            "runtime": "the runtime: the ONNX file says otherwise",
            "range": "the range of the type, not the exporter or the runtime",
        }.get(finding.fault, ""),
        "outputs": ", ".join(finding.outputs[:6]) + (" …" if len(finding.outputs) > 6 else ""),
        "note": finding.note,
    }
    lines += [f"{title:<11}{text}" for title, text in optional.items() if text]
    return [one_line(line) for line in lines]
