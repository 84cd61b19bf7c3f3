"""Faults that hide: each shows under one kind of use only, which `usage` spells out.

All are real: under that use, an error is at least a hundred times that of rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx

from fwl_export.bundle.manifest import Bundle, Manifest
from tests.parity import graph_faults as graph
from tests.parity import session_faults as faulty
from tests.parity.faults import Fault, broken_bundle, updates, wrong_epsilon
from tests.parity.session_faults import Made, SessionFault
from tests.parity.usage import Step, Usage, forks, jumps, others, reads, resets, rotates, scales

FLOAT16 = onnx.TensorProto.FLOAT16
INT16 = onnx.TensorProto.INT16


@dataclass(frozen=True)
class Hidden:
    """A fault that shows under one kind of use.

    Attributes:
      plant: Change of the ONNX file, or of the runtime.
      usage: Use that shows the fault.
      found: What `bisect` may find for a fault of the runtime: kinds of findings.
      plugin: Choice of the plugin that the use needs, see `open_session`.
      threads: Threads that the use needs.
    """

    plant: Fault | SessionFault
    usage: Usage
    found: tuple[str, ...] = ("state",)
    plugin: str = "none"
    threads: int | None = 1

    @property
    def is_in_file(self) -> bool:
        return not isinstance(self.plant, SessionFault)

    def bundle(self, source: Bundle, folder: Path) -> Bundle:
        """Return a copy of a bundle with the fault in its file, or the bundle itself."""
        if isinstance(self.plant, SessionFault):
            return source
        return broken_bundle(source.folder, folder, self.plant)


@dataclass(frozen=True)
class Sizes:
    """Sizes of a model that decide where a fault can hide.

    Attributes:
      tokens: Largest T of a call, from a position at an anchor.
      window: Width of the attention window.
      ring: Capacity of the ring buffers.
      vocabulary: Number of token ids.
      interval: Tokens between two anchors; 0 means none.
    """

    tokens: int
    window: int
    ring: int
    vocabulary: int
    interval: int

    @classmethod
    def of(cls, manifest: Manifest) -> Sizes:
        config = manifest.config
        ring = next(s.shape[1] for s in manifest.state if s.name == "cache.0.key")
        window = config.backbone.window
        interval = config.fast_weights.anchor_interval
        tokens = min(manifest.max_tokens, interval or manifest.max_tokens)
        return cls(tokens, window, ring, config.vocab_size, interval)


def hidden_faults(sizes: Sizes) -> dict[str, Hidden]:
    """Return the faults that hide in a model of some sizes, by name."""
    faults = {
        **_of_sizes(sizes),
        **_of_logits(sizes),
        **_of_ids(sizes),
        **_of_weights_and_scales(sizes),
        **_of_positions(sizes),
        **_of_rows(sizes),
        **_of_paths(sizes),
        **_of_sessions(sizes),
        **_of_state(sizes),
    }
    return faults | (_of_anchors(sizes) if sizes.interval else {})


def _rows(count: int, *steps: Step, about: str) -> Usage:
    return Usage(about, count, steps)


def _wrong_update(condition: graph.Condition) -> Fault:
    """Write 1 % too much into the first sum where a condition holds."""
    return graph.computed(graph.written(), graph.where(condition, 3, graph.times(1.01)))


def _of_sizes(sizes: Sizes) -> dict[str, Hidden]:
    power, most = sizes.tokens // 4, sizes.tokens
    odd = most - most // 4 - 1  # neither a power of two nor next to one
    some = sizes.tokens // 5 * 3 + 1

    def of_tokens(size: int) -> Usage:
        return _rows(2, reads(size, 3), about=f"a call of {size} tokens")

    return {
        "only with 5 rows or more": Hidden(
            _wrong_update(graph.rows("GreaterOrEqual", 5)),
            _rows(5, reads(3, 3), about="5 rows"),
        ),
        "only with exactly 2 rows": Hidden(
            _wrong_update(graph.rows("Equal", 2)), _rows(2, reads(3, 3), about="2 rows")
        ),
        "only in the last of 8 rows": Hidden(
            _wrong_update(graph.row_number(7)), _rows(8, reads(3, 3), about="8 rows")
        ),
        "only at one power of two of T": Hidden(
            _wrong_update(graph.tokens("Equal", power)), of_tokens(power)
        ),
        "only where T is a multiple of a quarter of the largest": Hidden(
            _wrong_update(graph.multiple(power)), of_tokens(2 * power)
        ),
        "only at the largest T": Hidden(
            _wrong_update(graph.tokens("Equal", most)), of_tokens(most)
        ),
        "only at one less than the largest T": Hidden(
            _wrong_update(graph.tokens("Equal", most - 1)), of_tokens(most - 1)
        ),
        "only from three quarters of the largest T on, in the runtime": Hidden(
            SessionFault(faulty.adds("fast.up.kernel", lambda made: made.tokens >= odd)),
            of_tokens(most),
        ),
        "only at T = 1 in a single row, in the runtime": Hidden(
            SessionFault(faulty.adds("fast.down.bias", lambda made: made.tokens == made.rows == 1)),
            _rows(1, reads(4, 1, 1), about="one row decodes"),
        ),
        "only above T = some odd size, in 4 rows or more": Hidden(
            _wrong_update(
                graph.every(graph.tokens("Greater", some), graph.rows("GreaterOrEqual", 4))
            ),
            _rows(4, reads(most, 1), about="4 rows read calls of the largest size"),
        ),
    }


def _of_logits(sizes: Sizes) -> dict[str, Hidden]:
    ragged = _rows(
        3,
        reads(3),
        reads(7, last_only=True, lengths=(7, 2, 4)),
        about="last_only in rows of different lengths",
    )
    last = _rows(1, reads(3), reads(7, 5, last_only=True), about="last_only with T > 1")

    def first_positions(add: graph.Added, name: str) -> str:
        ones = add.node("Expand", add.constant(1), add.node("Shape", name))
        one = add.constant(1)
        return add.node("Sub", add.node("CumSum", ones, one), one)

    def one_before(add: graph.Added, name: str) -> str:
        count = add.node("Gather", add.node("Shape", name), add.constant(1))
        few = add.node("Less", count, add.size(1))
        before = add.node("Max", add.node("Sub", name, add.constant(1)), add.constant(0))
        return add.node("Where", few, before, name)

    return {
        "logit_positions ignored: the first ones are returned": Hidden(
            graph.read("logit_positions", first_positions), last
        ),
        "logit_positions off by one if they are fewer than T": Hidden(
            graph.read("logit_positions", one_before), last
        ),
        "logit_positions of the first row used for all": Hidden(
            graph.read("logit_positions", graph.of_row_0), ragged
        ),
        "last_only returns the logits before the last": Hidden(
            SessionFault(before=faulty.last_position(1)), last, ("selection",)
        ),
        "last_only returns the last column in padded rows": Hidden(
            SessionFault(before=faulty.last_of_the_longest), ragged, ("selection",)
        ),
        "stale logits where T shrinks": Hidden(
            SessionFault(faulty.stale_logits),
            _rows(2, reads(7, 4), about="T shrinks"),
            ("unrepeatable",),
        ),
        "logits of one array, which the next call overwrites": Hidden(
            SessionFault(faulty.one_array_of_logits),
            _rows(1, reads(3, 3), about="logits are kept until the next call"),
            ("unrepeatable",),
        ),
    }


def _of_ids(sizes: Sizes) -> dict[str, Hidden]:
    last = sizes.vocabulary - 1

    def of_id(token: int, about: str) -> Usage:
        return _rows(1, reads(4), reads(3, 3, ids=[token]), reads(3), about=about)

    def not_the_last(add: graph.Added, name: str) -> str:
        return add.node("Min", name, add.constant(last - 1))

    def wrapped(ids: np.ndarray, call: object) -> np.ndarray:
        return np.where(ids == last, 0, ids)

    rare = 2 * last // 3
    return {
        "embedding of one id": Hidden(
            graph.row_changed("embedding.weight", rare, 1.05), of_id(rare, f"id {rare} is read")
        ),
        "label embedding of one id, in a copy of the table": Hidden(
            graph.labels_of_their_own(rare + 1, 1.05), of_id(rare + 1, f"id {rare + 1} is read")
        ),
        "the largest id read as the one before": Hidden(
            graph.ids_read(not_the_last), of_id(last, "the largest id is read")
        ),
        "the largest id overflows, in the runtime": Hidden(
            SessionFault(before=faulty.changed_input("input_ids", wrapped)),
            of_id(last, "the largest id is read"),
            ("state",),
        ),
    }


def _of_weights_and_scales(sizes: Sizes) -> dict[str, Hidden]:
    def weighted(weight: float, scale: float = 1, rows: int = 1) -> Usage:
        about = f"weights of {weight:g} at a scale of {scale:g}"
        return _rows(rows, scales(scale), reads(5, 5, weight=weight), about=about)

    def scaled(*factors: float) -> Usage:
        about = f"scales of {', '.join(f'{factor:g}' for factor in factors)}"
        return _rows(len(factors), scales(*factors), reads(5, 1, 5), about=about)

    def strength(model: onnx.ModelProto) -> str:
        (by_row,) = [n for n in model.graph.node if "learning_rate_scale" in n.input]
        (node,) = [n for n in model.graph.node if by_row.output[0] in n.input]
        return str(node.output[0])

    def by_scale(add: graph.Added, name: str) -> str:
        return add.node("Pow", name, add.by_row("learning_rate_scale", 2))

    def exponent(model: onnx.ModelProto) -> onnx.NodeProto:
        return next(n for n in model.graph.node if n.op_type == "Neg")

    whole = graph.read("label_weights", lambda add, name: add.node("Round", name))
    scale = "learning_rate_scale"
    at_decode = graph.where(
        graph.tokens("Equal", 1), 1, lambda add, name: add.node("Pow", name, add.number(0))
    )
    return {
        "weights clipped at 1": Hidden(graph.read("label_weights", graph.at_most(1)), weighted(2)),
        "weights squared": Hidden(graph.read("label_weights", graph.squared), weighted(1.5)),
        "weights rounded to whole numbers": Hidden(whole, weighted(1.3)),
        "weights above 4 lost, in the runtime": Hidden(
            SessionFault(
                before=faulty.changed_input("label_weights", lambda w, call: np.minimum(w, 4))
            ),
            weighted(6),
            ("state",),
        ),
        "weights of the call before, if T is the same": Hidden(
            SessionFault(before=faulty.of_the_last_call("label_weights")),
            _rows(1, reads(5), reads(5, weight=0.5), about="weights change, T does not"),
            ("state", "unrepeatable"),
        ),
        "weights above 1 forget no more than 1": Hidden(
            graph.operand(exponent, 0, graph.at_most(1)), weighted(3)
        ),
        "scales clipped at 2": Hidden(graph.read(scale, graph.at_most(2)), scaled(3, 3)),
        "scales squared": Hidden(graph.read(scale, graph.squared), scaled(1.5, 0.5)),
        "the scale applies to the decay": Hidden(
            graph.computed(graph.decay, by_scale), scaled(1.5, 0.5)
        ),
        "the scale of the first row for all rows": Hidden(
            graph.read(scale, graph.of_row_0), scaled(1, 0.5)
        ),
        "the scale ignored at T = 1": Hidden(graph.read(scale, at_decode), scaled(1.5, 0)),
        "weight times scale clipped at 2": Hidden(
            graph.computed(strength, graph.at_most(2)), weighted(1.6, 1.5)
        ),
        "the scale is read once only": Hidden(
            SessionFault(before=faulty.of_the_last_call(scale, scale)),
            _rows(1, scales(1.5), reads(3), scales(0.5), reads(3), about="the scale changes"),
            ("state", "unrepeatable"),
        ),
        "squared activations clipped where what was learned is large": Hidden(
            graph.operand(
                lambda model: updates(model)[1],
                0,
                lambda add, name: add.node("Min", name, add.number(_LARGE[sizes.vocabulary > 100])),
            ),
            _rows(
                1,
                scales(2),
                *[reads(sizes.tokens, weight=4, ids=[1, 2])] * 3,
                about="repeated tokens at weight 4 and scale 2",
            ),
        ),
    }


_LARGE = {False: 60.0, True: 60.0}


def _of_positions(sizes: Sizes) -> dict[str, Hidden]:
    def far(position: int) -> Usage:
        steps = (reads(3), jumps(position), reads(3, 3))
        return _rows(1, *steps, about=f"reading on from position {position}")

    def later(add: graph.Added, name: str) -> str:
        return add.node("Add", name, add.constant(1))

    def fewer(add: graph.Added, name: str) -> str:
        return add.node("Sub", name, add.constant(1))

    ring = 2 * sizes.ring
    return {
        **{
            f"rotary positions wrap at {wrap}": Hidden(
                graph.rotary(graph.modulo(wrap)), far(wrap + 7)
            )
            for wrap in (1024, 4096)
        },
        "rotary positions in int16": Hidden(graph.rotary(graph.through(INT16)), far(32770)),
        "rotary positions in fp16, exact up to 2048": Hidden(
            graph.rotary(graph.through(FLOAT16)), far(2051)
        ),
        "rotary angles multiplied in float32": Hidden(graph.rotary_in_float32, far(50000)),
        "positions of the state wrap at 65536, in the runtime": Hidden(
            SessionFault(_wraps_at(65536)), far(65534)
        ),
        "wrong slot from the second wrap of the ring buffers on": Hidden(
            graph.slot_written(graph.where(graph.position("GreaterOrEqual", ring), 2, later)),
            far(ring + 3),
        ),
        "attention window off by one after the first wrap": Hidden(
            graph.window(graph.where(graph.position("GreaterOrEqual", sizes.ring), 3, fewer)),
            _rows(
                1,
                reads(*[sizes.tokens] * (sizes.ring // sizes.tokens + 1), 3),
                about="reading beyond the ring buffers",
            ),
        ),
        "fast weights in fp16 after 1500 tokens": Hidden(
            SessionFault(faulty.rounds("fast.", "float16", 1500)), far(1600)
        ),
    }


def _wraps_at(limit: int) -> Callable[[Made], None]:
    def change(made: Made) -> None:
        made.after["position"] %= limit

    return change


def _of_rows(sizes: Sizes) -> dict[str, Hidden]:
    ragged = _rows(
        4,
        reads(3, 3, 3),
        reads(5, lengths=(5, 2, 0, 4)),
        reads(3),
        about="rows of different lengths",
    )

    def ones(add: graph.Added, name: str) -> str:
        return add.node("Pow", name, add.number(0))

    def none_of_0(add: graph.Added, name: str) -> str:
        kind = onnx.TensorProto.FLOAT
        some = add.node("Cast", add.node("Greater", "lengths", add.constant(0)), to=kind)
        return add.node("Mul", name, some)

    four = graph.rows("GreaterOrEqual", 4)
    return {
        "no forgetting in padded rows": Hidden(
            graph.computed(graph.decay, graph.where(graph.padded, 2, ones)), ragged
        ),
        "forgetting of the first row in all rows": Hidden(
            graph.computed(graph.decay, graph.of_row_0), ragged
        ),
        "a row of length 0 loses its pending label": Hidden(
            graph.computed(graph.state("pending.valid"), none_of_0), ragged
        ),
        "a row of length 0 counts a token, in 4 rows or more": Hidden(
            SessionFault(faulty.adds("position", _empty_rows, 1.0)), ragged
        ),
        "rows leak into the next in 4 rows or more": Hidden(
            graph.computed(
                graph.state("fast.norm.bias"), graph.where(four, 2, graph.from_row_before(1e-3))
            ),
            ragged,
        ),
        "rows leak into the next in 4 rows or more, in the runtime": Hidden(
            SessionFault(faulty.leaks("fast.up.bias", 4, 1e-2)), ragged, ("isolation", "state")
        ),
        "rows of length 0 get what a spare buffer held": Hidden(
            SessionFault(faulty.spare_rows_of_length_0), ragged
        ),
        "a call of weight 0 is skipped": Hidden(
            SessionFault(
                faulty.takes_back("pending.", lambda made: not made.call.label_weights.any())
            ),
            _rows(1, reads(3), reads(3, weight=0), reads(3), about="a call of weight 0"),
        ),
    }


def _empty_rows(made: Made) -> np.ndarray:
    return (made.call.lengths == 0) & (made.rows >= 4)


def _of_paths(sizes: Sizes) -> dict[str, Hidden]:
    tile = sizes.tokens // 2
    long = _rows(2, reads(3, sizes.tokens, 3), about="long calls")
    return {
        "the function body wrong from a tile on, the plugin right": Hidden(
            graph.in_the_body("GreaterOrEqual", tile, 1.01), long
        ),
        "the function body wrong at T = 1, the plugin right": Hidden(
            graph.in_the_body("Equal", 1, 1.01), _rows(1, reads(4, 1, 1), about="decoding")
        ),
        "the plugin wrong beyond a tile": Hidden(
            SessionFault(
                faulty.adds("fast.up.kernel", lambda made: made.tokens > tile),
                applies=faulty.has_plugin,
            ),
            long,
            plugin="required",
        ),
        "standard operators wrong in padded rows, in the runtime": Hidden(
            SessionFault(
                faulty.adds("fast.down.kernel", lambda made: made.call.lengths < made.tokens),
                applies=lambda options: not faulty.has_plugin(options),
            ),
            _rows(2, reads(5, lengths=(5, 3)), reads(3), about="padded rows without the plugin"),
        ),
        "a race of threads": Hidden(
            SessionFault(
                faulty.adds("fast.norm.scale", lambda made: made.number % 5 == 0),
                applies=lambda options: options.threads != 1,
            ),
            _rows(1, reads(*[3] * 7), about="the session's own number of threads"),
            threads=None,
        ),
        "noise in every seventh call": Hidden(
            SessionFault(faulty.noise(7)),
            _rows(1, reads(*[3] * 8), about="eight calls"),
            ("unrepeatable",),
        ),
    }


def _of_sessions(sizes: Sizes) -> dict[str, Hidden]:
    reset = _rows(3, reads(4, 4), resets(1), reads(4), about="one row is reset")
    uneven = reads(4, 4, lengths=(4, 3, 2))
    forked = _rows(3, uneven, forks(0, 2), reads(4), about="a row is forked")
    all_reset = _rows(1, reads(4, 4), resets(), reads(4), about="a session of one row is reset")

    return {
        "a reset leaves the pending label": Hidden(
            SessionFault(write=faulty.keeps("pending.")), reset, ("rows", "state")
        ),
        "a reset leaves one tensor": Hidden(
            SessionFault(write=faulty.keeps("fast.norm.bias")), all_reset, ("rows", "state")
        ),
        "a reset resets the next row": Hidden(
            SessionFault(write=faulty.resets_another_row), reset, ("rows", "state")
        ),
        "a forked row keeps its pending label": Hidden(
            SessionFault(write=faulty.keeps("pending.", fresh=False)), forked, ("rows", "state")
        ),
        "rows that are written together change places": Hidden(
            SessionFault(write=faulty.writes_in_reverse),
            _rows(
                3,
                uneven,
                rotates,
                reads(4),
                about="the states of two rows are loaded at once",
            ),
            ("rows", "state"),
        ),
        "sessions of one model share a buffer": Hidden(
            SessionFault(faulty.of_another_session, shared=True),
            _rows(1, reads(3), others, about="two sessions read in turn"),
        ),
    }


def _of_state(sizes: Sizes) -> dict[str, Hidden]:
    many = _rows(1, reads(*[2] * 20), about="twenty calls")
    return {
        "every sixteenth call drops what it learned": Hidden(
            SessionFault(faulty.takes_back("fast.", lambda made: made.number % 16 == 0)), many
        ),
        "the epsilon of a norm": Hidden(
            wrong_epsilon("model.backbone.blocks.0.norm_1", 1e-3), many
        ),
        "one element of a weight changed its sign": Hidden(
            graph.element_negated("fast_weights.up_kernel"), many
        ),
        "weights of 0 forget": Hidden(
            graph.operand(
                lambda model: next(n for n in model.graph.node if n.op_type == "Neg"),
                0,
                lambda add, name: add.node("Max", name, add.number(1)),
            ),
            _rows(1, reads(4), reads(4, weight=0), reads(4), about="tokens of weight 0"),
        ),
    }


def _of_anchors(sizes: Sizes) -> dict[str, Hidden]:
    interval = sizes.interval

    def across(count: int) -> Usage:
        calls = [sizes.tokens] * (count * interval // sizes.tokens + 1)
        return _rows(1, reads(*calls, 1, 1, 5), about=f"reading across {count} anchors")

    def late(add: graph.Added, name: str) -> str:
        return add.node("Sub", name, add.constant(1))

    def first(add: graph.Added, name: str) -> str:
        beyond = add.node("Greater", "past.position", add.constant(interval))
        return add.node("Where", beyond, add.constant(1), name)

    decoded = _rows(
        1,
        reads(*[sizes.tokens] * (interval // sizes.tokens)),
        reads(*[1] * (interval % sizes.tokens + 3)),
        about="decoding across an anchor",
    )
    return {
        "the anchor moves one token late": Hidden(graph.anchored(late), decoded),
        "the anchor moves only once": Hidden(graph.anchored(first), across(2)),
        "the anchor stays in calls of one token": Hidden(
            SessionFault(faulty.takes_back("anchor.", lambda made: made.tokens == 1)), decoded
        ),
        "a bias of the anchor moves in the first row only": Hidden(
            SessionFault(
                faulty.takes_back("anchor.up.bias", lambda made: np.arange(made.rows) > 0)
            ),
            _rows(
                2,
                reads(*[sizes.tokens] * (interval // sizes.tokens + 1), 5),
                about="two rows read across an anchor",
            ),
        ),
    }
