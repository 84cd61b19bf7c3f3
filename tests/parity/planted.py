"""The planted faults: which tensor `check` catches each by, and where `bisect` locates it.

`python -m tests.parity.planted` writes the table that ships with the package,
fwl_export/parity/FAULTS.md. With `--measure` it first runs `check` and `bisect` on a small model
with each hidden fault. That takes about half a minute per fault; `--only` names those to measure,
by a regular expression, and other results are kept.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fwl_export.bisect.runners import ForwardingRunner
from fwl_export.bundle.state import State
from fwl_export.runtimes import Session, open_session
from fwl_export.runtimes.base import Array, Call, Runner
from tests.parity import faults
from tests.parity.faults import Fault, broken_bundle
from tests.parity.hidden_faults import Sizes, hidden_faults

TABLE = Path(__file__).parents[2] / "fwl_export" / "parity" / "FAULTS.md"

MEASURED = Path(__file__).with_name("measured_faults.json")

# Any sizes do: the names are the same for all models with anchors.
HIDDEN_NAMES = list(hidden_faults(Sizes(16, 8, 23, 64, 12)))

ROWS = 3


@dataclass(frozen=True)
class Planted:
    """A fault, and how it must be found.

    Attributes:
      plant: Function that changes the ONNX file, or one that breaks a session.
      caught_by: Output that must be outside its budget in `check`.
      module: PyTorch module in which `bisect` must locate it, or the name of a state tensor.
      op: Type of the ONNX node at fault, or "" if the fault is in the session's state.
      fault: What `bisect` must blame: "file", "runtime", or "" for the session's state.
    """

    plant: Fault | Callable[[Session], None]
    caught_by: str
    module: str
    op: str = ""
    fault: str = "file"

    @property
    def located_at(self) -> str:
        if self.op:
            return f"`{self.module or 'StreamingModel'}` / `{self.op}`"
        return f"state carried between calls: `{self.module}`"

    def session(self, bundle: Path, folder: Path) -> Session:
        """Return a session with the fault.

        Args:
          bundle: Folder of the unbroken bundle.
          folder: Folder for the broken copy of the bundle, if the fault is in its file.
        """
        if self.op:
            broken = broken_bundle(bundle, folder, self.plant)  # type: ignore[arg-type]
            return open_session(broken, "onnxruntime", ROWS, threads=1, plugin="none")
        session = open_session(bundle, "onnxruntime", ROWS, threads=1, plugin="none")
        self.plant(session)  # type: ignore[arg-type]
        return session


class StaleRunner(ForwardingRunner):
    """From the fourth call on, one tensor of the state is one call old.

    Args:
      runner: Runner that makes the calls.
      tensor: Name of the state tensor.
      when: "read" if calls read the old tensor, "written" if they leave it in place.
    """

    def __init__(self, runner: Runner, tensor: str, when: str) -> None:
        super().__init__(runner)
        self._tensor = tensor
        self._when = when
        self._last: State | None = None
        self._calls = 0

    def another(self) -> StaleRunner:
        return StaleRunner(self._runner.another(), self._tensor, self._when)

    def run(self, call: Call, past: Any, present: Any) -> Array:
        rows = range(len(call.lengths))
        before, last = self._runner.read(past, rows), self._last
        self._last, self._calls = before, self._calls + 1
        stale = last is not None and self._calls > 3
        if stale and self._when == "read":
            self._runner.write(past, {**before, self._tensor: last[self._tensor]}, rows)
        logits = self._runner.run(call, past, present)
        self._runner.write(past, before, rows)
        if stale and self._when == "written":
            after = self._runner.read(present, rows)
            self._runner.write(present, {**after, self._tensor: before[self._tensor]}, rows)
        return logits


def stale_buffer(tensor: str, when: str) -> Callable[[Session], None]:
    """Make a session read an old buffer of a tensor, or leave it in place."""

    def plant(session: Session) -> None:
        session._runner = StaleRunner(session._runner, tensor, when)

    return plant


_NORM = "backbone.blocks.0.norm_1"
_UPDATE = "fwl::LinearAttentionUpdate"
_LEARNED = "fast_weights.fast/learned"

PLANTED = {
    "a wrong epsilon in a norm": Planted(
        faults.wrong_epsilon(f"model.{_NORM}", 1e-3), "cache.0.value", _NORM, "Add"
    ),
    "swapped operands of a difference, in the rotation of keys and queries": Planted(
        faults.swapped("Sub", "Mul"), "logits", "backbone.blocks.0.attention.project", "Sub"
    ),
    "query and key of an update swapped": Planted(
        faults.swapped_query_and_key(0), "fast.up.kernel", _LEARNED, _UPDATE
    ),
    "a product accumulated in fp16": Planted(
        faults.half_product("fast_weights.up_kernel"), "pending.up", "fast_weights.slow", "Cast"
    ),
    "a missing cast: rotary angles in fp16": Planted(
        faults.missing_cast(), "cache.0.key", "backbone.stream/rotary", "Cast"
    ),
    "off by one in the pending label": Planted(
        faults.shifted_labels(),
        "fast.norm.bias",
        "fast_weights.gradients/_label_embedding",
        "Gather",
    ),
    "stale state: a sum's past returned as its present": Planted(
        faults.stale("fast.norm.scale"), "fast.norm.scale", "fast_weights.fast", "Identity"
    ),
    "a stale state buffer: read one call late": Planted(
        stale_buffer("fast.down.kernel", "read"), "logits", "fast.down.kernel", fault=""
    ),
    "a stale state buffer: not written": Planted(
        stale_buffer("pending.hidden", "written"), "pending.hidden", "pending.hidden", fault=""
    ),
    "an update that ignores its last tile, in its function body": Planted(
        faults.last_tile_ignored(), "fast.up.kernel", _LEARNED, _UPDATE
    ),
    "a wrong exponent of the decay": Planted(
        faults.scaled_input("Div", "horizon", 2.0),
        "fast.up.kernel",
        "fast_weights.log_decay",
        "Div",
    ),
    "attention window off by one": Planted(
        faults.shifted_whole_number("Sub", "Greater", 1, -1), "logits", "backbone.stream", "Sub"
    ),
    "the wrong slot of the ring buffers": Planted(
        faults.wrong_slot(), "cache.0.key", "backbone.stream", "Mod"
    ),
    "a row of length 0 moves": Planted(
        faults.row_of_no_tokens_moves(), "pending.hidden", "", "GreaterOrEqual"
    ),
    "a transposed weight": Planted(
        faults.transposed_weight("model.backbone.blocks.0.attention.out"),
        "cache.1.value",
        "backbone.blocks.0.attention.out",
        "MatMul",
    ),
    "weight 0 still learns": Planted(faults.learns_always(), "fast.up.kernel", "", "Where"),
    "a learned bias is dropped": Planted(
        faults.dropped_bias(), "logits", "fast_weights.fast", "Identity"
    ),
    "relu instead of squared relu": Planted(
        faults.plain_relu(), "cache.1.value", "backbone.blocks.0.rest", "Identity"
    ),
    "wrong sign of what an update writes": Planted(
        faults.negated_value(1), "fast.down.kernel", _LEARNED, _UPDATE
    ),
    "a step added instead of subtracted": Planted(
        faults.added_instead(0), "logits", "fast_weights.fast", "Add"
    ),
    "the scale of the step sizes ignored": Planted(
        faults.ignored_scale(), "fast.up.kernel", "", "Unsqueeze"
    ),
    "decay ignored": Planted(faults.ignored_decay(0), "fast.up.kernel", _LEARNED, _UPDATE),
}


# Faults that make numbers infinite or NaN. The updates of the tiny model read 121 at most in a
# text, and 39 000 on repeated tokens; times 16, that is more than the 65 504 of float16.
OVERFLOWS = {
    "what an update reads cast to fp16 before the step scales it": faults.update_through_half(
        1, 16
    ),
    "attention scores cast to fp16": faults.scores_through_half(2.0**15),
}


def table() -> str:
    """Return the text of FAULTS.md."""
    lines = [
        "<!-- Written by `python -m tests.parity.planted`; do not edit. -->",
        "# Planted faults",
        "",
        "Each fault is planted in a bundle's ONNX file, or in the session that runs it. Tests",
        "confirm that `check` catches it and that `bisect` locates it. *Caught by* names an output",
        "that leaves its budget. *Located at* names the module in PyTorch and the ONNX operator,",
        "or the state tensor.",
        "",
        "| fault | caught by | located at |",
        "|---|---|---|",
    ]
    rows = [f"| {n} | `{p.caught_by}` | {p.located_at} |" for n, p in PLANTED.items()]
    kernel = f"| {KERNEL_FAULT} | `fast.up.kernel` | `{_LEARNED}` / `{_UPDATE}` |"
    overflows = [f"| {name} | not finite: `logits` | `Cast` to float16 |" for name in OVERFLOWS]
    return "\n".join([*lines, *rows, kernel, *overflows, "", *_hidden_table(), ""])


def _hidden_table() -> list[str]:
    """Return the lines about the hidden faults, with what was measured of each."""
    measured = json.loads(MEASURED.read_text(encoding="utf-8")) if MEASURED.exists() else {}
    lines = [
        "## Faults that hide",
        "",
        "Each shows under one kind of use only, and there its error is at least a hundred times",
        "that of rounding, which a test confirms. The results are those of `check`, which was",
        "stopped after the first case that fails, and of `bisect`, with their default candidates,",
        "cases and budgets. The model is tiny, but its largest call, window, anchors and number of",
        "token ids are those of the demo model, so the calls are the same. A fault of the file is",
        "*located* if one of the changed nodes is named and the file is blamed; a fault of the",
        "runtime, if what it does wrong is named and the runtime is blamed.",
        "",
        "| fault | shown by | found by `check` | located by `bisect` |",
        "|---|---|---|---|",
    ]
    faults = hidden_faults(Sizes(256, 128, 383, 2048, 256))
    for name in HIDDEN_NAMES:
        row = measured.get(name, {})
        lines.append(
            f"| {name} | {faults[name].usage.about} | {row.get('check', 'not measured')} | "
            f"{row.get('bisect', 'not measured')} |"
        )
    return lines


# tests/plugins/test_faulty_kernel.py compiles this fault and finds it.
KERNEL_FAULT = "a kernel of `libfwl_ort` that ignores its last tile"


if __name__ == "__main__":
    from tests.parity.measure_faults import measure

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--measure", action="store_true")
    parser.add_argument("--only", default="", metavar="REGEX")
    arguments = parser.parse_args()
    if arguments.measure:
        measure(arguments.only, MEASURED)
    TABLE.write_text(table(), encoding="utf-8")
