"""What a check has tried, computed from the calls that were really made."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fwl_export.bundle.state import Array
from fwl_export.parity import design
from fwl_export.parity.cases import ModelLimits
from fwl_export.parity.schedule import ScheduledCall

_SHOWN = 12  # distinct numbers that are listed one by one; more are given as a range


@dataclass
class Coverage:
    """Counts what the calls of all cases were like.

    Attributes:
      limits: Limits of the model.
      paths: Ways in which the fast-weight update was computed, e.g. "plugin".
      threads: Numbers of threads that candidates ran with; "default" is the runtime's own choice.
      repeated: Names of the candidates that read the same calls again, beside another session.
      left_out: A sentence for everything that was not tried although a full check would.
    """

    limits: ModelLimits
    paths: list[str] = field(default_factory=list)
    threads: list[str] = field(default_factory=list)
    repeated: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    _numbers: dict[str, set[float]] = field(default_factory=dict, init=False)
    _counts: dict[str, int] = field(default_factory=dict, init=False)
    _settings: list[design.Setting] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        self._read: Array = np.zeros(self.limits.vocab_size, bool)
        self._learned: Array = np.zeros(self.limits.vocab_size, bool)

    def add(self, call: ScheduledCall, before: Sequence[int]) -> None:
        """Count a call that was made.

        Args:
          call: The call.
          before: Tokens that the state of each row had read before it, after resets.
        """
        size = call.ids.shape[1]
        real = np.arange(size) < call.lengths[:, None]
        start = np.array(before)
        self._see("rows", [len(call.ids)])
        self._see("sizes", self._sizes(call, start))
        self._see("weights", call.weights[real].tolist())
        self._see("scales", call.scale.tolist())
        self._see("weight_times_scale", (call.weights * call.scale[:, None])[real].tolist())
        self._see("positions", (start + call.lengths).tolist())
        self._add_ids(call, real, start)
        wanted = call.wanted.shape[1]
        kind = "last" if call.last_only else "all" if call.logit_positions is None else "some"
        self._count(f"logits_{kind}")
        self._count("logits_fewer_than_tokens", int(wanted < size))
        self._count("logits_more_than_tokens", int(wanted > size))
        self._count("calls")
        self._count("calls_of_several_tokens", int(size > 1))
        self._count("teacher_forced_calls", int(call.forced))
        self._count("ragged_calls", int(len(set(call.lengths.tolist())) > 1))
        self._count("empty_rows", int((call.lengths == 0).sum()))
        self._count("resets", len(call.reset))
        self._count("forks", len(call.forks))
        self._count("moves", len(call.moves))
        self._add_crossings(call, start)
        if call.setting is not None:
            self._settings.append(call.setting)

    def _sizes(self, call: ScheduledCall, start: Array) -> list[int]:
        """Return T of every call of the runtime; sessions split where a row passes an anchor."""
        left, position, sizes = call.lengths.copy(), start.copy(), []
        while left.any():
            here = np.minimum(left, self.limits.max_tokens)
            if self.limits.anchor_interval:
                interval = self.limits.anchor_interval
                here = np.minimum(here, interval - position % interval)
            sizes.append(int(here.max()))
            left, position = left - here, position + here
        return sizes

    def _add_ids(self, call: ScheduledCall, real: Array, start: Array) -> None:
        self._read[call.ids[real]] = True
        taught = real & (call.weights * call.scale[:, None] > 0)
        taught[start == 0, 0] = False  # a fresh row has predicted nothing yet
        self._learned[call.ids[taught]] = True

    def _add_crossings(self, call: ScheduledCall, start: Array) -> None:
        spans = {"anchors": self.limits.anchor_interval, "wraps": self.limits.capacity}
        for name, span in spans.items():
            if not span:
                continue
            # The token at a multiple of the interval is the first one after an anchor or wrap.
            crossed = (start + call.lengths - 1) // span - (start - 1) // span
            crossed = np.where((start == 0) & (call.lengths > 0), crossed - 1, crossed)
            passed = int(np.where(call.lengths > 0, crossed, 0).sum())
            self._count(name, passed)
            self._count(f"{name}_one_token", passed if call.ids.shape[1] == 1 else 0)

    def _see(self, name: str, values: Sequence[float]) -> None:
        self._numbers.setdefault(name, set()).update(values)

    def _count(self, name: str, count: int = 1) -> None:
        self._counts[name] = self._counts.get(name, 0) + count

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready data; README.md in this folder explains the keys."""
        settings = design.pairs(self._settings)
        return {
            **{name: _listed(self._numbers.get(name, set())) for name in _NUMBERS},
            "largest_position": max(self._numbers.get("positions", {0})),
            "largest_weight_times_scale": max(self._numbers.get("weight_times_scale", {0.0})),
            **{name: self._counts.get(name, 0) for name in _COUNTS},
            "token_ids": self.limits.vocab_size,
            "token_ids_read": int(self._read.sum()),
            "token_ids_learned": int(self._learned.sum()),
            "anchor_interval": self.limits.anchor_interval,
            "ring_capacity": self.limits.capacity,
            "max_positions": self.limits.max_positions,
            "pairs": len(settings),
            "possible_pairs": design.possible_pairs(self.limits.max_tokens),
            "paths": self.paths,
            "threads": self.threads,
            "repeated": self.repeated,
            "left_out": self.left_out,
        }


_NUMBERS = ("rows", "sizes", "weights", "scales")
_COUNTS = (
    "calls",
    "calls_of_several_tokens",
    "teacher_forced_calls",
    "logits_all",
    "logits_last",
    "logits_some",
    "logits_fewer_than_tokens",
    "logits_more_than_tokens",
    "ragged_calls",
    "empty_rows",
    "resets",
    "forks",
    "moves",
    "anchors",
    "anchors_one_token",
    "wraps",
    "wraps_one_token",
)


def _listed(values: set[float]) -> list[float]:
    """Return the numbers in order; of more than a list can show, those that stand out."""
    if len(values) <= 4 * _SHOWN:
        return sorted(values)
    round_numbers = {v for v in values if v in (0, 0.5) or (v >= 1 and v == int(v))}
    return sorted({min(values), max(values), *round_numbers})


def coverage_table(coverage: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return what was tried in words, as (factor, values); the terminal and the page show it.

    Args:
      coverage: Data of `Coverage.to_dict`, as a report holds it.
    """
    rows = ((name, words(coverage)) for name, words in _TABLE.items())
    return [(name, words) for name, words in rows if words]


def _list(values: Sequence[float]) -> str:
    return " ".join(f"{value:g}" for value in values)


def _calls(c: Mapping[str, Any]) -> str:
    sizes = c["sizes"]
    short = sizes if len(sizes) <= _SHOWN else [*sizes[:4], "...", *sizes[-2:]]
    pairs = f", {c['pairs']} of {c['possible_pairs']} pairs" if c["pairs"] else ""
    return f"{c['calls']}{pairs}; T {' '.join(map(str, short))} ({len(sizes)} sizes)"


def _rows(c: Mapping[str, Any]) -> str:
    events = f"{c['empty_rows']} empty, {c['resets']} resets, {c['forks']} copies"
    return f"{_list(c['rows'])} in a batch; {events}"


def _weights(c: Mapping[str, Any]) -> str:
    weights = c["weights"] or [0.0]
    return (
        f"{weights[0]:g} to {weights[-1]:g}; scales {_list(c['scales'])}; "
        f"product to {c['largest_weight_times_scale']:g}"
    )


def _logits(c: Mapping[str, Any]) -> str:
    other = c["logits_fewer_than_tokens"] + c["logits_more_than_tokens"]
    kinds = ", ".join(f"{kind} {c[f'logits_{kind}']}" for kind in ("all", "last", "some"))
    return f"{kinds}; P ≠ T in {other} of {c['calls_of_several_tokens']} with T > 1"


def _ids(c: Mapping[str, Any]) -> str:
    read, learned, total = (
        _number(c[key]) for key in ("token_ids_read", "token_ids_learned", "token_ids")
    )
    return f"{read} of {total} read, {learned} learned from"


def _positions(c: Mapping[str, Any]) -> str:
    crossings = [
        f"{c[name]} {name} ({c[f'{name}_one_token']} at T = 1)"
        for name in ("anchors", "wraps")
        if c[name]
    ]
    return ", ".join([f"to {_number(c['largest_position'])}", *crossings])


def _runs(c: Mapping[str, Any]) -> str:
    repeated = "repeated" if c["repeated"] else "not repeated"
    return "; ".join([*c["paths"], f"threads {', '.join(c['threads'])}", repeated])


_TABLE: Mapping[str, Callable[[Mapping[str, Any]], str]] = {
    "calls": _calls,
    "rows": _rows,
    "weights": _weights,
    "logits": _logits,
    "token ids": _ids,
    "positions": _positions,
    "runs": _runs,
    "left out": lambda c: "; ".join(c["left_out"]),
}


def _number(value: float) -> str:
    """Return a whole number with a space between thousands."""
    return f"{int(value):,}".replace(",", " ")
