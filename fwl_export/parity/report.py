"""The outcome of a check: for people on a terminal, and as JSON."""

from __future__ import annotations

import dataclasses
import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fwl_export.parity.compare import Prediction
from fwl_export.parity.drift import LOGITS
from fwl_export.parity.tolerances import TABLE
from fwl_export.parity.verdict import Breach, CandidateVerdict, TensorVerdict

SCHEMA_VERSION = 1

_SHOWN_TENSORS = 16
_NAME_WIDTH = 20


@dataclass(frozen=True)
class Report:
    """What was checked, how, and the verdict.

    Attributes:
      bundle: name of its folder.
      model_id: see `Manifest`.
      precision: of the activations.
      text: name of the text.
      tokens: read by the first row.
      rows: of the batch.
      seed: of the calls; with the text and `tokens` it gives the same calls again.
      calls: number of calls.
      largest_call: largest T among them.
      reference: what counts as right.
      own: PyTorch in the candidates' precision, whose distance sets the budgets.
      memory: tokens that the sums remember; 0 if they forget nothing.
      depths: tokens the first row had read where states were compared.
      candidates: one verdict per runtime.
      seconds: that the check took.
    """

    bundle: str
    model_id: str
    precision: str
    text: str
    tokens: int
    rows: int
    seed: int
    calls: int
    largest_call: int
    reference: str
    own: str
    memory: float
    depths: Sequence[int]
    candidates: Sequence[CandidateVerdict]
    seconds: float

    @property
    def passed(self) -> bool:
        """Whether every candidate is within its budgets."""
        return all(candidate.passed for candidate in self.candidates)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready data; a number that is not finite becomes null."""
        data = dataclasses.asdict(self)
        for candidate, entry in zip(self.candidates, data["candidates"], strict=True):
            entry |= {"passed": candidate.passed, "use": candidate.use}
            for tensor, columns in zip(candidate.tensors, entry["tensors"], strict=True):
                columns |= {"tolerance": tensor.tolerance.prefix, "use": tensor.use}
                for measured, cells in zip(tensor.depths, columns["depths"], strict=True):
                    cells["use"] = measured.use
        head = {"schema_version": SCHEMA_VERSION, "passed": self.passed}
        table = [dataclasses.asdict(row) for row in TABLE]
        return _finite({**head, **data, "tolerances": table})

    def to_text(self) -> str:
        """Return a summary of at most 30 lines of 80 columns per candidate."""
        return "\n\n".join(self._candidate(candidate) for candidate in self.candidates)

    def problems(self) -> list[str]:
        """Return for every candidate that failed what went wrong, where, and by how much."""
        return [_problem(candidate) for candidate in self.candidates if not candidate.passed]

    def _candidate(self, candidate: CandidateVerdict) -> str:
        lines = [
            f"{candidate.name} against {self.reference}; budgets from {self.own} on the same text",
            *textwrap.wrap(
                f"{self.text or 'text'}: {self.tokens} tokens in {self.calls} calls of 1 to "
                f"{self.largest_call} on {self.rows} rows, seed {self.seed}",
                80,
            ),
        ]
        if candidate.tensors:
            lines += ["", *_tensor_table(candidate.tensors), ""]
            lines += _depth_table(candidate)
            lines += _prediction_lines(candidate, self.own)
        return "\n".join([*lines, "", _verdict(candidate)])


def _tensor_table(tensors: Sequence[TensorVerdict]) -> list[str]:
    """Return a line for each tensor, closest to its limit first, logits on top."""
    ranked = sorted(tensors, key=lambda t: (t.name != LOGITS, -t.use))
    lines = [
        f"{'tensor':{_NAME_WIDTH}} {'max abs':>8} {'budget':>8} {'rel RMS':>9} {'budget':>8} "
        f"{'use':>6} {'at token':>9}"
    ]
    for tensor in ranked[:_SHOWN_TENSORS]:
        at = tensor.worst
        lines.append(
            f"{_short(tensor.name):{_NAME_WIDTH}} {at.error.max_abs:8.1e} {at.budget.max_abs:8.1e} "
            f"{at.error.relative_rms:9.1e} {at.budget.relative_rms:8.1e} {_share(at.use):>6} "
            f"{at.depth:>9}"
        )
    if rest := ranked[_SHOWN_TENSORS:]:
        most = max(tensor.use for tensor in rest)
        lines.append(f"{len(rest)} more tensors, each {_share(most)} of its budget or less")
    return lines


def _depth_table(candidate: CandidateVerdict) -> list[str]:
    columns = list(zip(*(tensor.depths for tensor in candidate.tensors), strict=True))
    depths = [f"{column[0].depth:>6}" for column in columns]
    uses = [f"{_share(max(measured.use for measured in column)):>6}" for column in columns]
    return [f"{'at token':9}" + "".join(depths), f"{'use':9}" + "".join(uses)]


def _prediction_lines(candidate: CandidateVerdict, own: str) -> list[str]:
    found, usual = _pooled(candidate.predictions), _pooled(candidate.own_predictions)
    change = found.perplexity / found.reference_perplexity - 1
    apart = [measured.apart for t in candidate.tensors if t.name == LOGITS for measured in t.depths]
    return [
        f"KL {found.kl:.1e} nats ({own}: {usual.kl:.1e}), top-1 agreement {found.agreement:.2%},",
        f"perplexity {found.perplexity:.3f}, {change:+.1e} of the reference's",
        f"logits against {own}: max abs {max(e.max_abs for e in apart):.1e}, "
        f"relative RMS {max(e.relative_rms for e in apart):.1e}",
    ]


def _pooled(parts: Sequence[Prediction]) -> Prediction:
    """Return one prediction over all depths."""
    tokens = max(sum(part.tokens for part in parts), 1)

    def mean(name: str) -> float:
        return sum(getattr(part, name) * part.tokens for part in parts) / tokens

    largest = max(part.kl_max for part in parts)
    return Prediction(
        tokens, mean("kl"), largest, mean("agreement"), mean("loss"), mean("reference_loss")
    )


def _verdict(candidate: CandidateVerdict) -> str:
    if candidate.passed:
        closest = max(candidate.tensors, key=lambda tensor: tensor.use)
        name = _short(closest.name)
        return f"within budget: {name} comes closest, with {_share(closest.use)} of it"
    outside = [tensor.name for tensor in candidate.tensors if tensor.use > 1]
    if outside:
        return f"OUTSIDE BUDGET: {len(outside)} of {len(candidate.tensors)} tensors"
    return "FAILED: a runtime could not go on"


def _problem(candidate: CandidateVerdict) -> str:
    parts = []
    if candidate.breach:
        parts.append(f"{candidate.name} is outside its budget {_breach(candidate.breach)}")
    if failure := candidate.failure:
        parts.append(
            f"{failure.runtime} could not go on at call {failure.step}, by token "
            f"{failure.depth}: {failure.message}"
        )
    return "; ".join(parts)


def _breach(breach: Breach) -> str:
    measured, error = breach.measured, breach.measured.error
    budget = measured.budget
    text = (
        f"first in '{breach.tensor}' at token {measured.depth}: max abs {error.max_abs:.2g} "
        f"(budget {budget.max_abs:.2g}), relative RMS {error.relative_rms:.2g} "
        f"(budget {budget.relative_rms:.2g})"
    )
    if error.worst:
        place = error.worst
        row, *index = place.index
        text += (
            f"; worst in call {place.step}, row {row}, element {index}: {place.candidate:.7g} "
            f"instead of {place.reference:.7g}"
        )
    return text


def _share(use: float) -> str:
    """Return a share of a budget in at most 6 columns."""
    if use < 10:
        return f"{use:.0%}"
    return f"{use:.0f}x" if use < 1e4 else ">9999x"


def _short(name: str) -> str:
    return name if len(name) <= _NAME_WIDTH else "…" + name[1 - _NAME_WIDTH :]


def _finite(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data
