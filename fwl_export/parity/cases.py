"""The kinds of calls that a check makes: real text, and what breaks streaming models.

All are seeded, so that the text's token ids and the seed are enough to repeat them. The cases
`mixed1` to `mixed8` are one covering design, see `design`, by the number of rows.
"""

from __future__ import annotations

import itertools
import math
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple

import numpy as np

from fwl_export.bundle.manifest import TOKENIZER_FILE, Bundle, Manifest
from fwl_export.bundle.repetition import COUNT, LENGTH, repeated_tokens, repetitions
from fwl_export.bundle.state import Array
from fwl_export.errors import ConfigError
from fwl_export.parity import design
from fwl_export.parity.schedule import FIRST_POINT, ROWS, Schedule, ScheduledCall, make_call
from fwl_export.runtimes.text import bundle_tokenizer

TEXT, MIXED, REPEAT, ENDLESS, LONG, DECODE, FAR, AGAIN = (
    "text", "mixed", "repeat", "endless", "long", "decode", "far", "again"
)  # fmt: skip


@dataclass(frozen=True)
class ModelLimits:
    """What decides which calls a model can take, and which are of interest.

    Attributes:
      max_tokens: Largest T of a call.
      max_positions: Tokens that a row may read; 0 means no limit.
      vocab_size: Number of token ids, V; 0 means those of the text only.
      anchor_interval: Tokens between two anchors; 0 means none.
      capacity: Number of slots of the ring buffers; 0 if it is not known.
      repeated: Token ids by what they are, see `repeated_tokens`; empty without a tokenizer.
    """

    max_tokens: int
    max_positions: int = 0
    vocab_size: int = 0
    anchor_interval: int = 0
    capacity: int = 0
    repeated: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, manifest: Manifest) -> ModelLimits:
        """Return the limits of a bundle's model."""
        config = manifest.config
        return cls(
            manifest.max_tokens,
            config.backbone.max_positions,
            config.vocab_size,
            config.fast_weights.anchor_interval,
            config.backbone.window + manifest.max_tokens - 1,
        )

    @classmethod
    def of_bundle(cls, bundle: Bundle) -> ModelLimits:
        """Return the limits of a bundle's model, with the tokens that its tokenizer repeats."""
        limits = cls.of(bundle.manifest)
        if TOKENIZER_FILE not in bundle.manifest.files:
            return limits
        return replace(limits, repeated=repeated_tokens(bundle_tokenizer(bundle)))


@dataclass(frozen=True)
class Case:
    """One kind of calls.

    Attributes:
      name: Name of the case, as `--cases` takes it.
      about: What the calls are like, in words.
      rows: Number of rows in the batch.
      tokens: Tokens after which it ends, see `ScheduledCall.tokens_read`. In `CASES`, 0 means as
        many as the calls of the case have together.
    """

    name: str
    about: str
    rows: int
    tokens: int = 0

    def calls(self, ids: Array, limits: ModelLimits, seed: int) -> Iterable[ScheduledCall]:
        """Return the calls, the same ones each time they are iterated.

        Args:
          ids: Token ids of the text, [N] int64.
          limits: Limits of the model.
          seed: Seed of all random choices.

        Raises:
          TokenError: The text is too short.
        """
        if self.name == TEXT:
            return Schedule(ids, self.tokens, limits.max_tokens, seed, limits.max_positions)
        return _SeededCalls(self, ids, limits, seed)


CASES = (
    Case(TEXT, "real text in uneven calls: ragged rows, label weights of 0, a reset", ROWS),
    *(
        Case(f"{MIXED}{rows}", f"the calls with B = {rows} of a covering design", rows)
        for rows in design.ROWS
    ),
    Case(REPEAT, "repeated tokens, which make the fast weights large", 3, 128),
    Case(ENDLESS, "one token or two for as long as it takes, chosen to hurt", COUNT, LENGTH),
    Case(LONG, "token ids in random order, each once, in calls of the largest size", 1, 2304),
    Case(DECODE, "one token per call, across two anchors", 1),
    Case(FAR, "positions far in a text, to 100 000", 8),
    Case(AGAIN, "the default number of threads; once more, beside another session", 2),
)


def choose_cases(
    cases: str | Sequence[str | Case],
    tokens: int,
    limits: ModelLimits | int,
    seed: int = 0,
    all_ids: bool = False,
) -> list[Case]:
    """Return cases by name, each with its number of tokens.

    Args:
      cases: Names, such as "text,decode@5000" or a list of such names; "mixed" stands for mixed1 to
        mixed8. Cases that an earlier call returned are kept as they are.
      tokens: Tokens to read of the text. No other case is longer than four times this number,
        unless it is named with a number.
      limits: Limits of the model, or only the largest T of a call.
      seed: Seed of the calls, on which the length of some cases depends.
      all_ids: Whether case "long" reads every token id, however many there are.

    Raises:
      ConfigError: A name is not a case, or a case is named twice.
    """
    if isinstance(limits, int):
        limits = ModelLimits(limits)
    chosen: dict[str, Case] = {}
    for named in cases.split(",") if isinstance(cases, str) else cases:
        found = [named] if isinstance(named, Case) else _named_cases(named)
        for case in found:
            if case.name in chosen:
                raise ConfigError(f"case '{case.name}' is named twice; name every case once")
            is_named = not isinstance(named, Case)
            chosen[case.name] = (
                _with_tokens(case, tokens, limits, seed, all_ids) if is_named else case
            )
    return list(chosen.values())


def cases_with_rows(
    chosen: Sequence[Case], rows: int, limits: ModelLimits, seed: int
) -> list[Case]:
    """Return the cases that need no more than a number of rows; some do with any."""
    fitting = []
    for case in chosen:
        if case.name == ENDLESS and case.rows > rows:
            fitting.append(replace(case, rows=rows, tokens=case.tokens * _rounds(rows)))
        elif case.name == FAR and case.rows > rows:
            smaller = replace(case, rows=rows)
            fitting.append(replace(smaller, tokens=usual_tokens(smaller, limits, seed)))
        elif case.rows <= rows:
            fitting.append(case)
    return fitting


def plan_calls(
    chosen: Sequence[Case], ids: Array, limits: ModelLimits, seed: int
) -> dict[str, Iterable[ScheduledCall]]:
    """Return the calls of each case by its name; for arguments and errors see `Case.calls`."""
    return {case.name: case.calls(ids, limits, seed) for case in chosen}


def _named_cases(name: str) -> list[Case]:
    """Return the cases that a name stands for, each with the tokens in the name, or 0."""
    found = re.fullmatch(r"([a-z]+\d?)(?:@([1-9]\d*))?", name.strip())
    named = [case for case in CASES if found and found[1] in (case.name, case.name.rstrip("1258"))]
    if found is None or not named:
        known = [case.name for case in CASES]
        raise ConfigError(
            f"'{name}' is not a case; expected {', '.join([*known, MIXED])}, each optionally with "
            "a number of tokens, for example decode@5000"
        )
    return [replace(case, tokens=-int(found[2])) if found[2] else case for case in named]


def _with_tokens(case: Case, tokens: int, limits: ModelLimits, seed: int, all_ids: bool) -> Case:
    """Return the case with its number of tokens; a user's number is stored as its negative."""
    if case.tokens < 0:
        wanted = -case.tokens
    elif case.name == TEXT:
        wanted = tokens
    elif case.name == LONG and all_ids:
        wanted = limits.vocab_size + 1
    else:
        wanted = min(case.tokens or usual_tokens(case, limits, seed), LONGEST_CASE * tokens)
    limit = limits.max_positions if case.name in (TEXT, DECODE, ENDLESS) else 0
    return replace(case, tokens=min(wanted, limit) if limit else wanted)


def usual_tokens(case: Case, limits: ModelLimits, seed: int) -> int:
    """Return how many tokens the calls of a case have together, if nothing ends them early.

    Args:
      case: The case.
      limits: Limits of the model.
      seed: Seed of the calls.
    """
    if case.name == DECODE:
        return max(2 * decode_interval(limits) + _AROUND, 2 * _AROUND)
    endless = replace(case, tokens=1 << 60)
    text = np.zeros(1, np.int64)
    return sum(call.ids.shape[1] for call in endless.calls(text, limits, seed))


@dataclass(frozen=True)
class _SeededCalls:
    case: Case
    ids: Array
    limits: ModelLimits
    seed: int

    def __iter__(self) -> Iterator[ScheduledCall]:
        rng = np.random.default_rng([self.seed, zlib.crc32(self.case.name.encode())])
        maker = _MAKERS[self.case.name.rstrip("1258")]
        plans = maker(rng, self.ids, self.case, self.limits, self.seed)
        return _Reader(rng, self.ids, self.case, self.limits).read(plans)


class _Plan(NamedTuple):
    """One call of a case, before the rows' texts are known.

    Attributes:
      lengths: Number of tokens that each row reads, [B].
      ids: Token ids, [B, T], in place of the rows' texts, or None.
      size: T, if that is more than the longest row reads; 0 otherwise.
      weights: Label weights, [B, T], or None for 1.
      scale: Factor on the model's step sizes in each row, [B], or None for 1.
      wanted: Positions whose logits are wanted, [B, P], or None for all.
      last_only: Whether only the logits after each row's last token are wanted.
      reset: Rows to reset before the call.
      forks: Rows to copy to others before it.
      moves: Rows to put at another position before it.
      forced: Whether teacher-forced sessions make the call.
      compare: Whether states are compared after it.
      setting: What it covers of the covering design, or None. Rows of such a call that would
        pass an anchor in it are moved to the anchor first, because sessions split calls there.
    """

    lengths: Array
    ids: Array | None = None
    size: int = 0
    weights: Array | None = None
    scale: Array | None = None
    wanted: Array | None = None
    last_only: bool = False
    reset: tuple[int, ...] = ()
    forks: tuple[tuple[int, int], ...] = ()
    moves: tuple[tuple[int, int], ...] = ()
    forced: bool = True
    compare: bool = False
    setting: design.Setting | None = None


class _Reader:
    """Turns plans into calls: knows where each row is, and resets a row that cannot read on."""

    def __init__(
        self, rng: np.random.Generator, ids: Array, case: Case, limits: ModelLimits
    ) -> None:
        starts = rng.integers(0, len(ids), case.rows)
        self._texts = [np.roll(ids, -start) for start in starts]
        self._case = case
        self._limit = limits.max_positions
        self._interval = limits.anchor_interval
        self._read = np.zeros(case.rows, np.int64)  # never lowered
        self._positions = np.zeros(case.rows, np.int64)  # of the rows' states

    def read(self, plans: Iterable[_Plan | Callable[[Array], _Plan]]) -> Iterator[ScheduledCall]:
        """Yield the calls until the case has read its tokens.

        Args:
          plans: Plans, or functions that take the positions of the rows' states, [B].
        """
        total, step = 0, 0
        waiting: ScheduledCall | None = None
        for planned in plans:
            plan = planned(self._positions) if callable(planned) else planned
            call = self._call(step, plan, total)
            total, step = total + call.ids.shape[1], step + 1
            if waiting:
                yield waiting
            waiting = call
            if total >= self._case.tokens:
                break
        if waiting:  # the last call is always compared
            yield replace(waiting, compare_state=True, forced=True)

    def _call(self, step: int, plan: _Plan, total: int) -> ScheduledCall:
        size = plan.size or int(plan.lengths.max())
        size = max(min(size, self._case.tokens - total, self._limit or size), 1)
        plan = self._prepare(_cut(plan, size))
        shape = (self._case.rows, size)
        weights = np.ones(shape, np.float32) if plan.weights is None else plan.weights
        call = make_call(
            step,
            self._texts,
            self._read,
            plan.lengths,
            weights,
            tuple(sorted(plan.reset)),
            [],
            plan.scale,
            size,
        )
        real = np.arange(size) < plan.lengths[:, None]
        ids = call.ids if plan.ids is None else np.where(real, plan.ids, 0)
        labels = call.labels
        if plan.ids is not None:
            labels = np.where(real, np.roll(plan.ids, -1, 1), 0)
        self._read += plan.lengths
        self._positions += plan.lengths
        return replace(
            call,
            ids=ids,
            labels=labels,
            tokens_read=total + size,
            compare_state=plan.compare and total + size >= FIRST_POINT,
            logit_positions=plan.wanted,
            last_only=plan.last_only,
            forks=plan.forks,
            moves=plan.moves,
            forced=plan.forced or plan.compare,
            setting=plan.setting,
        )

    def _prepare(self, plan: _Plan) -> _Plan:
        """Follow what happens to the rows before a call; returns the plan for which it can."""
        after = self._positions.copy()
        after[list(plan.reset)] = 0
        kept = after.copy()
        for source, target in plan.forks:
            after[target] = after[source]
        if plan.setting and self._interval:
            plan = plan._replace(moves=self._to_anchors(after, plan.lengths))
        for row, position in plan.moves:
            after[row] = position
        full = after + plan.lengths > self._limit if self._limit else np.zeros(len(after), bool)
        if not full.any():
            self._positions = after
            return plan
        # A row that cannot read on is reset, and nothing else happens before this call.
        kept[full] = 0
        reset = {*plan.reset, *np.flatnonzero(full | (kept + plan.lengths > self._limit)).tolist()}
        kept[list(reset)] = 0
        self._positions = kept
        return plan._replace(reset=tuple(sorted(reset)), forks=(), moves=())

    def _to_anchors(self, positions: Array, lengths: Array) -> tuple[tuple[int, int], ...]:
        """Return the next anchor of each row that would pass it within a call, as moves."""
        passing = positions % self._interval + lengths > self._interval
        return tuple(
            (int(row), int(-(-positions[row] // self._interval) * self._interval))
            for row in np.flatnonzero(passing & (lengths <= self._interval))
        )


def _cut(plan: _Plan, size: int) -> _Plan:
    """Return the plan with T of at most `size`."""
    first = slice(0, size)
    return plan._replace(
        lengths=np.minimum(plan.lengths, size).astype(np.int64),
        ids=None if plan.ids is None else plan.ids[:, first],
        weights=None if plan.weights is None else plan.weights[:, first],
        wanted=None if plan.wanted is None else np.minimum(plan.wanted, size - 1),
    )


_Maker = Callable[
    [np.random.Generator, Array, Case, ModelLimits, int],
    Iterator[_Plan | Callable[[Array], _Plan]],
]


def _mixed(
    rng: np.random.Generator, ids: Array, case: Case, limits: ModelLimits, seed: int
) -> Iterator[_Plan | Callable[[Array], _Plan]]:
    """Yield the calls of the covering design with this case's number of rows."""
    vocabulary = limits.vocab_size or int(ids.max()) + 1
    designed = design.covering_design(limits.max_tokens, seed)
    calls = [entry for entry in designed if entry[0].rows == case.rows]
    if sum(size for _, size in calls) > case.tokens:  # cut where it costs the fewest calls
        calls.sort(key=lambda entry: entry[1])
    if case.rows == max(design.ROWS):  # the design bounds B times T; this call has the most of both
        yield _Plan(np.full(case.rows, limits.max_tokens), last_only=True, forced=False)
    compared = 0
    for number, (setting, size) in enumerate(calls):
        # What a call does to a row is compared before the row is reset or replaced.
        following = calls[number + 1][0] if number + 1 < len(calls) else setting
        compare = number - compared >= _COMPARED_AFTER and following.before != "nothing"
        compared = number if compare else compared
        forced = number % 2 == 0
        yield partial(
            _designed, rng, setting, size, vocabulary, limits.max_tokens, (forced, compare)
        )


def _designed(
    rng: np.random.Generator,
    setting: design.Setting,
    size: int,
    vocabulary: int,
    max_tokens: int,
    flags: tuple[bool, bool],
    positions: Array,
) -> _Plan:
    """Return a call with the settings of a row of the design."""
    shape = (setting.rows, size)
    deepest = int(np.argmax(positions))
    others = np.flatnonzero(np.arange(setting.rows) != deepest)
    reset: tuple[int, ...] = ()
    if setting.before == "reset any":
        reset = tuple(np.flatnonzero(rng.random(setting.rows) < 0.5).tolist() or [0])
    elif setting.before == "reset deepest":
        reset = (deepest,)
    forks = ((deepest, int(rng.choice(others))),) if setting.before == "fork" else ()
    weights, scale = _weighted(rng, setting, shape)
    return _Plan(
        _LENGTHS[setting.lengths](rng, *shape),
        _IDS[setting.ids](rng, shape, vocabulary),
        size,
        weights,
        scale,
        _WANTED[setting.logits](rng, shape, max_tokens),
        setting.logits == "last",
        reset,
        forks,
        forced=flags[0],
        compare=flags[1],
        setting=setting,
    )


def _weighted(
    rng: np.random.Generator, setting: design.Setting, shape: tuple[int, int]
) -> tuple[Array | None, Array | None]:
    """Return weights and scales whose products sessions accept; None stands for ones."""
    weights = _WEIGHTS[setting.weights](rng, shape)
    scale = _SCALES[setting.scale](rng, setting.rows)
    if weights is not None and scale is not None:
        weights = np.minimum(weights, _LARGEST_STEP / np.maximum(scale, 1)[:, None])
        weights = weights.astype(np.float32)
    return weights, scale


def _ragged(rng: np.random.Generator, rows: int, size: int, longest: int) -> Array:
    lengths = rng.integers(0, size + 1, rows)
    lengths[longest] = size
    return lengths


def _first_empty(rng: np.random.Generator, rows: int, size: int) -> Array:
    lengths = _ragged(rng, rows, size, int(rng.integers(1, rows)))
    lengths[0] = 0
    return lengths


def _last_longest(rng: np.random.Generator, rows: int, size: int) -> Array:
    return np.append(rng.integers(0, size, rows - 1), size)


def _padded(rng: np.random.Generator, rows: int, size: int) -> Array:
    lengths = rng.integers(0, size, rows)
    lengths[rng.integers(rows)] = size - 1
    return lengths


_LENGTHS: dict[str, Callable[[np.random.Generator, int, int], Array]] = {
    "equal": lambda rng, rows, size: np.full(rows, size),
    "ragged": lambda rng, rows, size: _ragged(rng, rows, size, int(rng.integers(rows))),
    "first empty": _first_empty,
    "last longest": _last_longest,
    "padded": _padded,
}

_Shape = tuple[int, int]

_WEIGHTS: dict[str, Callable[[np.random.Generator, _Shape], Array | None]] = {
    "one": lambda rng, shape: None,
    "zero": lambda rng, shape: np.zeros(shape, np.float32),
    "some zero": lambda rng, shape: rng.integers(0, 2, shape).astype(np.float32),
    "fractions": lambda rng, shape: rng.random(shape, np.float32),
    "small": lambda rng, shape: np.full(shape, 1e-3, np.float32),
    "large": lambda rng, shape: rng.choice(
        np.array([0.5, 1, 2, 5, 8], np.float32), shape, p=(0.3, 0.4, 0.15, 0.1, 0.05)
    ),
}

_SCALES: dict[str, Callable[[np.random.Generator, int], Array | None]] = {
    "one": lambda rng, rows: None,
    "zero": lambda rng, rows: np.zeros(rows),
    "half": lambda rng, rows: np.full(rows, 0.5),
    "three": lambda rng, rows: np.full(rows, 3.0),
    "by row": lambda rng, rows: rng.permutation(np.resize([0.5, 2, 0, 1.5, 1], rows)),
}


def _positions(rng: np.random.Generator, shape: _Shape, count: int) -> Array:
    return rng.integers(0, shape[1], (shape[0], max(count, 1)))


_WANTED: dict[str, Callable[[np.random.Generator, _Shape, int], Array | None]] = {
    "all": lambda rng, shape, most: None,
    "last": lambda rng, shape, most: None,
    "few": lambda rng, shape, most: _positions(rng, shape, int(rng.integers(1, shape[1]))),
    "unordered": lambda rng, shape, most: _positions(rng, shape, shape[1]),
    # An engine takes no more positions than its largest T.
    "more": lambda rng, shape, most: _positions(rng, shape, min(shape[1] + 3, most)),
}


def _high_ids(rng: np.random.Generator, shape: _Shape, vocabulary: int) -> Array:
    ids = rng.integers(vocabulary // 2, vocabulary, shape)
    ids[:, :1] = vocabulary - 1
    return rng.permuted(ids, axis=1)


_IDS: dict[str, Callable[[np.random.Generator, _Shape, int], Array | None]] = {
    "text": lambda rng, shape, vocabulary: None,
    "any": lambda rng, shape, vocabulary: rng.integers(0, vocabulary, shape),
    "repeated": lambda rng, shape, vocabulary: np.repeat(
        rng.integers(0, vocabulary, (shape[0], 1)), shape[1], axis=1
    ),
    "high": _high_ids,
}


def _repeat(
    rng: np.random.Generator, ids: Array, case: Case, limits: ModelLimits, seed: int
) -> Iterator[_Plan]:
    start = int(rng.integers(0, len(ids)))
    texts = [np.roll(ids, -start)[:period] for period in (1, 2, 7)]
    read = 0
    for number in itertools.count():
        size = min(int(rng.choice((1, 3, 16, 61))), limits.max_tokens)
        places = np.arange(read, read + size)
        read += size
        yield _Plan(
            np.full(len(texts), size),
            np.stack([text[places % len(text)] for text in texts]),
            # Steps of 1, 4 and 8 times the usual size, in the second half.
            weights=None if read <= 64 else np.repeat([[1], [4], [4]], size, 1).astype(np.float32),
            scale=None if read <= 64 else np.array([1, 1, 2]),
            forced=number % 2 == 0,
            compare=number % _COMPARED_AFTER == 0,
        )


def _rounds(rows: int) -> int:
    """Return how often rows must begin anew to read every text of case "endless"."""
    return math.ceil(COUNT / rows)


def _endless(
    rng: np.random.Generator, ids: Array, case: Case, limits: ModelLimits, seed: int
) -> Iterator[_Plan]:
    """Yield calls of the largest size in which each row repeats tokens of its own.

    Logits of a few positions are enough to see where the numbers end, and cheap.
    """
    texts = repetitions(limits.repeated, ids, limits.vocab_size)
    length = max(case.tokens // _rounds(case.rows), 1)
    for number in itertools.count():
        of_round = [texts[(number * case.rows + row) % COUNT] for row in range(case.rows)]
        for start in range(0, length, limits.max_tokens):
            size = min(limits.max_tokens, length - start)
            wanted = np.unique(np.append(np.arange(_LOGITS_EVERY, size, _LOGITS_EVERY), size - 1))
            compare = start + size == length
            yield _Plan(
                np.full(case.rows, size),
                np.stack([text.read(start, size) for text in of_round]),
                wanted=np.tile(wanted, (case.rows, 1)),
                reset=tuple(range(case.rows)) if number and not start else (),
                forced=compare,
                compare=compare,
            )


def _long(
    rng: np.random.Generator, ids: Array, case: Case, limits: ModelLimits, seed: int
) -> Iterator[_Plan]:
    size = min(limits.max_tokens, limits.max_positions or limits.max_tokens)
    order = ids_to_read(rng, limits.vocab_size or int(ids.max()) + 1)
    for number in itertools.count():
        places = np.arange(number * size, (number + 1) * size) % len(order)
        wanted = np.append(rng.integers(0, size, 2), size - 1)[None]
        yield _Plan(
            np.array([size]),
            order[places][None],
            wanted=wanted,
            forced=number % 2 == 0,
            compare=number % _COMPARED_AFTER == 0,
        )


def ids_to_read(rng: np.random.Generator, vocabulary: int) -> Array:
    """Return all token ids: the first and the last, those next to powers of two, then the rest."""
    near = {2**k + step for k in range(vocabulary.bit_length()) for step in (-1, 0, 1)}
    first = np.array(sorted({n for n in near if n < vocabulary} | {vocabulary - 1}))
    rest = np.setdiff1d(np.arange(vocabulary), first)
    return np.concatenate((rng.permutation(first), rng.permutation(rest)))


def _decode(
    rng: np.random.Generator, ids: Array, case: Case, limits: ModelLimits, seed: int
) -> Iterator[Callable[[Array], _Plan]]:
    """Yield calls of one token near every anchor; a gap that is long is read at once."""
    interval = decode_interval(limits)
    for number in itertools.count():
        yield partial(_next_to_decode, interval, limits.max_tokens, number)


def _next_to_decode(interval: int, max_tokens: int, number: int, positions: Array) -> _Plan:
    place = int(positions[0])
    gap = (-place - _AROUND) % interval if interval else 0
    is_near = gap == 0 or gap > interval - 2 * _AROUND or (place >= interval <= _ONE_BY_ONE)
    size = 1 if is_near else min(gap, max_tokens)
    return _Plan(
        np.array([size]),
        last_only=number // 8 % 2 == 1,  # in runs: sessions keep the call of the one before
        forced=number % 8 == 0,
        compare=number % 64 == 63,
    )


def decode_interval(limits: ModelLimits) -> int:
    """Return the tokens between two places that decoding should cross; 0 if that is too far.

    Those are anchors, or in a model without them the ends of the ring buffers.
    """
    if limits.anchor_interval:
        return limits.anchor_interval
    return limits.capacity if limits.capacity <= _FAR_APART else 0


def _far(
    rng: np.random.Generator, ids: Array, case: Case, limits: ModelLimits, seed: int
) -> Iterator[_Plan]:
    """Yield calls in which rows read past positions that are far in a text.

    The state of a row is put there by its `position` alone. What the ring buffers hold then stands
    for other tokens than it did, for the reference as for the candidates.
    """
    every = np.full(case.rows, 1)
    yield _Plan(every * min(24, limits.max_tokens))
    sizes = [size for size in (4, 1, 17) if size <= limits.max_tokens] or [1]
    sizes = [1] * (4 // limits.max_tokens) + sizes if limits.max_tokens < 4 else sizes
    targets = far_positions(limits)
    if sum(sizes) * math.ceil(len(targets) / case.rows) > case.tokens:
        targets = targets[::-1]  # the farthest, if there is no time for all
    for start in range(0, len(targets), case.rows):
        group = targets[start : start + case.rows]
        moves = tuple((row, target - 2) for row, target in enumerate(group))
        for number, size in enumerate(sizes):
            yield _Plan(
                every * size,
                moves=moves if number == 0 else (),
                last_only=size > 4,
                forced=number == 0,
            )


def far_positions(limits: ModelLimits) -> list[int]:
    """Return the positions that rows read past in case "far", in rising order."""
    found = {1 << k for k in range(5, 17)} | {50_000, 100_000}
    found |= {k * size for k in (1, 2, 5) for size in (limits.capacity, limits.anchor_interval)}
    if limits.max_positions:
        # A row reads two tokens past each; the last row ends exactly where the model does.
        found = {n for n in found if n + 2 <= limits.max_positions} | {limits.max_positions - 2}
    return sorted(n for n in found if n >= 2)


def _again(
    rng: np.random.Generator, ids: Array, case: Case, limits: ModelLimits, seed: int
) -> Iterator[_Plan]:
    for number, size in enumerate((1, 7, 64, 1, 1, 16, 2, 33, 1, 64)):
        shape = (case.rows, min(size, limits.max_tokens))
        yield _Plan(
            np.full(case.rows, shape[1]),
            weights=None if number % 3 else rng.random(shape, np.float32),
            scale=None if number % 4 else np.array([1.5, 0.5]),
            forced=number % 2 == 0,
        )


LONGEST_CASE = 4  # times the tokens of the text; without a number, no case is longer
_LARGEST_STEP = 9.99  # weight times scale; sessions refuse more than 10
_COMPARED_AFTER = 5  # calls after which states are compared again
_LOGITS_EVERY = 8  # tokens between two logits of case "endless"
_AROUND = 24  # tokens before and after an anchor that are decoded one by one
_FAR_APART = 640  # tokens between two ends of the ring buffers beyond which decoding reaches none
_ONE_BY_ONE = 100  # tokens between two anchors up to which all are decoded one by one

_MAKERS: dict[str, _Maker] = {
    MIXED: _mixed,
    REPEAT: _repeat,
    ENDLESS: _endless,
    LONG: _long,
    DECODE: _decode,
    FAR: _far,
    AGAIN: _again,
}
