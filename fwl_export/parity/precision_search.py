"""Search which parts of a model can be lowered: the smallest set that must stay in float32.

Distances are those of the model under a policy from the same model in float64, over held-out text,
every model with its own state. The KL divergences of single parts nearly add up, so the order in
which parts matter is found by lowering each alone; then the fewest of that order are kept with
which all others lowered are within the limits, and each of those is tried once more without.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass

from fwl_export.bundle.state import Array
from fwl_export.errors import ConfigError
from fwl_export.model.checkpoint import Checkpoint
from fwl_export.parity.compare import pooled
from fwl_export.parity.drift import FREE_RUNNING, LOGITS, RunDrift, measure_drift
from fwl_export.parity.schedule import ROWS, Schedule
from fwl_export.precision.policy import PrecisionPolicy, parts, streaming_model
from fwl_export.runtimes.session import Session, SessionSpec
from fwl_export.runtimes.torch import TorchRunner

# Models that read side by side: each needs memory for its state.
_AT_ONCE = 8

_REFERENCE = "float64"


@dataclass(frozen=True)
class Limits:
    """How far a lowered model may be from float64.

    Attributes:
      max_kl: mean of KL(float64 || lowered) per token, in nats. 1e-4: on average the probabilities
        of two predictions differ by less than 1 % in total (Pinsker's inequality).
      max_perplexity_increase: relative; a lower perplexity is always allowed.
      max_state_error: relative RMS of the furthest tensor of the state: what was learned, too,
        is as it would have been.
    """

    max_kl: float = 1e-4
    max_perplexity_increase: float = 1e-3
    max_state_error: float = 0.02


@dataclass(frozen=True)
class Distance:
    """How far a model is from float64.

    Attributes:
      kl: mean KL(float64 || model) per token, in nats.
      perplexity_increase: relative; negative: the perplexity is lower.
      state_error: relative RMS of the furthest tensor of the state, at its worst depth.
      furthest: name of that tensor.
      failure: why it could not go on, or "".
    """

    kl: float
    perplexity_increase: float
    state_error: float
    furthest: str
    failure: str = ""

    def use(self, limits: Limits) -> float:
        """Return the share of the limits that is used; more than 1 is outside."""
        if self.failure:
            return math.inf
        return max(
            self.kl / limits.max_kl,
            self.perplexity_increase / limits.max_perplexity_increase,
            self.state_error / limits.max_state_error,
        )


@dataclass(frozen=True)
class Exploration:
    """What a search found.

    Attributes:
      policy: with the measurements that it rests on.
      alone: distance with one part lowered, by its name.
      everything: distance with all parts lowered.
      confirmed: distance under the policy over the longer text, by runtime.
      runs: models that were measured.
    """

    policy: PrecisionPolicy
    alone: Mapping[str, Distance]
    everything: Distance
    confirmed: Mapping[str, Distance]
    runs: int


# Opens other runtimes of the model under a policy, by name, to be measured beside PyTorch.
OpenOthers = Callable[[PrecisionPolicy], Mapping[str, Session]]


class Explorer:
    """Measures policies for one model on one text."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        ids: Array,
        target: str,
        limits: Limits,
        max_tokens: int = 256,
        say: Callable[[str], None] = lambda message: None,
    ) -> None:
        """Prepare a search.

        Args:
          checkpoint: of the model.
          ids: [N] int64, the text.
          target: "fp16", "bf16" or "int8w".
          limits: what the lowered model must keep.
          max_tokens: largest T of a call, no more than the model's anchor interval.
          say: called with what is being done.
        """
        self._checkpoint, self._ids, self._target = checkpoint, ids, target
        self._limits, self._max_tokens, self._say = limits, max_tokens, say
        self._names = list(parts(checkpoint.model, target))
        self._runs = 0

    def search(
        self,
        tokens: int = 300,
        confirm_tokens: int = 2000,
        open_others: OpenOthers = lambda policy: {},
    ) -> Exploration:
        """Find the policy that keeps the fewest parts in float32.

        Args:
          tokens: read in every run of the search.
          confirm_tokens: read in the last run, under the policy.
          open_others: see `OpenOthers`; for the last run.

        Raises:
          ConfigError: float32 itself is outside the limits.
          TokenError: the text is too short.
        """
        for length in (tokens, confirm_tokens):  # a text that is too short is told at once
            Schedule(self._ids, length, self._max_tokens)
        with _one_thread():
            everything, alone = self._sensitivities(tokens)
            ranked = sorted(self._names, key=lambda n: alone[n].kl, reverse=True)
            kept = self._fewest(ranked, everything, tokens)
            kept = self._without_needless(kept, tokens)
            policy, confirmed = self._confirm(kept, ranked, confirm_tokens, open_others)
        measured = {
            "limits": asdict(self._limits),
            "tokens": tokens,
            "confirm_tokens": confirm_tokens,
            "confirmed": {name: asdict(distance) for name, distance in confirmed.items()},
            "all_lowered": asdict(everything),
            "lowered_alone": {name: asdict(alone[name]) for name in ranked},
        }
        policy = PrecisionPolicy(policy.target, policy.quantized, policy.excluded, measured)
        return Exploration(policy, alone, everything, confirmed, self._runs)

    def _sensitivities(self, tokens: int) -> tuple[Distance, dict[str, Distance]]:
        """Return the distance with all parts lowered, and by name with one alone."""
        policies = {"": self._policy([])}
        for name in self._names:
            policies[name] = self._policy([other for other in self._names if other != name])
        found: dict[str, Distance] = {}
        names = list(policies)
        for start in range(0, len(names), _AT_ONCE):
            group = names[start : start + _AT_ONCE]
            self._say(f"all parts lowered, and each alone: {start} of {len(names)} measured")
            found |= self._measure({name: policies[name] for name in group}, tokens)
        return found.pop(""), found

    def _fewest(self, ranked: Sequence[str], everything: Distance, tokens: int) -> list[str]:
        """Return the shortest beginning of `ranked` that is enough to keep, by bisection."""
        if everything.use(self._limits) <= 1:
            return []
        outside, within = 0, len(ranked)
        while within - outside > 1:
            middle = (outside + within) // 2
            self._say(f"keeping {middle} of {len(ranked)} parts")
            if self._is_within(ranked[:middle], tokens):
                within = middle
            else:
                outside = middle
        if within == len(ranked) and not self._is_within(ranked, tokens):
            raise ConfigError(
                "even float32 is outside the limits: they are smaller than its own roundings; "
                "give larger ones"
            )
        return list(ranked[:within])

    def _without_needless(self, kept: list[str], tokens: int) -> list[str]:
        """Return `kept` without what can be lowered after all; the last is needed for sure."""
        for name in kept[-2::-1]:
            self._say(f"trying once more without {name}")
            fewer = [other for other in kept if other != name]
            if self._is_within(fewer, tokens):
                kept = fewer
        return kept

    def _confirm(
        self, kept: list[str], ranked: Sequence[str], tokens: int, open_others: OpenOthers
    ) -> tuple[PrecisionPolicy, dict[str, Distance]]:
        """Return the policy, with as many more parts kept as the longer text asks for."""
        while True:
            policy = self._policy(kept)
            self._say(f"confirming over {tokens} tokens, {len(kept)} parts kept")
            others = open_others(policy)
            found = self._measure({"PyTorch": policy}, tokens, others)
            left = [name for name in ranked if name not in kept]
            if all(d.use(self._limits) <= 1 for d in found.values()):
                return policy, found
            if not left:
                raise ConfigError(
                    f"even float32 is outside the limits over {tokens} tokens; give larger ones"
                )
            kept = [*kept, left[0]]

    def _policy(self, kept: Sequence[str]) -> PrecisionPolicy:
        lowered = [name for name in self._names if name not in kept]
        return PrecisionPolicy(self._target, lowered, [n for n in self._names if n in kept])

    def _is_within(self, kept: Sequence[str], tokens: int) -> bool:
        (distance,) = self._measure({"": self._policy(kept)}, tokens).values()
        return distance.use(self._limits) <= 1

    def _measure(
        self,
        policies: Mapping[str, PrecisionPolicy],
        tokens: int,
        others: Mapping[str, Session] | None = None,
    ) -> dict[str, Distance]:
        self._runs += len(policies)
        sessions = {name: self._session(policy) for name, policy in policies.items()}
        sessions |= others or {}
        reference = (_REFERENCE, self._session("fp64"))
        calls = Schedule(self._ids, tokens, self._max_tokens)
        drift = measure_drift(reference, sessions, calls, modes=(FREE_RUNNING,))
        return {run.name: _distance(measured) for run, measured in drift.runs.items()}

    def _session(self, precision: str | PrecisionPolicy) -> Session:
        config = self._checkpoint.config
        model = streaming_model(self._checkpoint.model, precision, self._max_tokens)
        interval = config.fast_weights.anchor_interval
        spec = SessionSpec(model.specs, config.vocab_size, self._max_tokens, interval)
        return Session(TorchRunner(model), spec, ROWS)


def _distance(drift: RunDrift) -> Distance:
    if failure := drift.failure:
        message = f"at call {failure.step}: {failure.message}"
        return Distance(math.inf, math.inf, math.inf, "", message)
    total = pooled(drift.predictions)
    worst = {
        name: max(error.relative_rms for error in errors)
        for name, errors in drift.errors.items()
        if name != LOGITS
    }
    furthest = max(worst, key=worst.__getitem__)
    increase = total.perplexity / total.reference_perplexity - 1
    return Distance(total.kl, increase, worst[furthest], furthest)


@contextmanager
def _one_thread() -> Iterator[None]:
    """More threads would change the order of sums, hence the figures, from machine to machine."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
