"""Search which parts of a model can be quantized: the smallest set that must stay in float32.

Distances are measured between the model under a policy and the same model in float64, free-running
over held-out text. The KL divergences of single parts nearly add up, so quantizing each part alone
ranks the parts by how much they matter. Then as few parts as possible are excluded from the top of
that ranking, such that the model with all others quantized is within the limits. Last, each
excluded part is tried once more: it is quantized if the model stays within the limits.

What is recommended must also pass `check` with its default cases, whose weights, scales, positions
and repeated tokens can be too large for a part in float16 although the text is not. Where the check
finds what is not finite, the part that alone is not finite on repeated tokens is excluded next.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from fwl_export.bundle.defaults import DEFAULT_MAX_TOKENS
from fwl_export.bundle.repetition import LENGTH, repeated_tokens
from fwl_export.bundle.state import Array
from fwl_export.errors import ConfigError, NotFiniteError
from fwl_export.model.checkpoint import Checkpoint
from fwl_export.parity.cases import ENDLESS, ModelLimits, choose_cases
from fwl_export.parity.check import torch_threads
from fwl_export.parity.compare import pooled
from fwl_export.parity.drift import FREE_RUNNING, LOGITS, RunDrift, measure_drift
from fwl_export.parity.report.data import Report
from fwl_export.parity.schedule import ROWS, Schedule
from fwl_export.precision.policy import PrecisionPolicy, parts, streaming_model
from fwl_export.runtimes.session import Session, SessionSpec
from fwl_export.runtimes.torch import TorchRunner

# Models that read side by side; each needs memory for its state.
_AT_ONCE = 8

_REFERENCE = "float64"


@dataclass(frozen=True)
class Limits:
    """How far a quantized model may be from float64.

    Attributes:
      max_kl: Largest mean KL(float64 || quantized) per token, in nats. With 1e-4 the probabilities
        of a token differ by less than 1 % in total on average (Pinsker's inequality).
      max_perplexity_increase: Largest relative increase of the perplexity. A decrease is allowed.
      max_state_error: Largest relative RMS error of a state tensor. It limits how far what was
        learned from the text may differ.
    """

    max_kl: float = 1e-4
    max_perplexity_increase: float = 1e-3
    max_state_error: float = 0.02


@dataclass(frozen=True)
class Distance:
    """How far a model is from float64.

    Attributes:
      kl: Mean KL(float64 || model) per token, in nats.
      perplexity_increase: Relative increase of the perplexity, negative if it decreased.
      state_error: Largest relative RMS error of a state tensor, over all comparison points.
      furthest: Name of that state tensor.
      failure: Why the model failed, or "".
    """

    kl: float
    perplexity_increase: float
    state_error: float
    furthest: str
    failure: str = ""

    def use(self, limits: Limits) -> float:
        """Return the largest of the distances divided by their limits; more than 1 is outside."""
        if self.failure:
            return math.inf
        return max(
            self.kl / limits.max_kl,
            self.perplexity_increase / limits.max_perplexity_increase,
            self.state_error / limits.max_state_error,
        )


@dataclass(frozen=True)
class Exploration:
    """Result of a search.

    Attributes:
      policy: Precision policy, with the measurements that led to it.
      alone: Distance with only one part quantized, by the part's name.
      everything: Distance with all parts quantized.
      confirmed: Distance under the policy over the longer text, by runtime.
      runs: Number of models that were measured.
      checked: Report of a check of the policy, or None if it was not checked.
      rejected: A sentence for each policy that the longer text or the check did not confirm: how
        many parts were excluded, and which candidate failed how.
    """

    policy: PrecisionPolicy
    alone: Mapping[str, Distance]
    everything: Distance
    confirmed: Mapping[str, Distance]
    runs: int
    checked: Report | None = None
    rejected: Sequence[str] = ()


# Opens sessions of the model under a policy in other runtimes, by name, to measure them too.
OpenOthers = Callable[[PrecisionPolicy], Mapping[str, Session]]

# Checks the model under a policy; None if it cannot be checked.
CheckPolicy = Callable[[PrecisionPolicy], Report | None]


class Explorer:
    """Measures policies for one model on one text."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        ids: Array,
        target: str,
        limits: Limits,
        max_tokens: int = DEFAULT_MAX_TOKENS,
        say: Callable[[str], None] = lambda message: None,
    ) -> None:
        """Prepare a search.

        Args:
          checkpoint: Checkpoint of the model.
          ids: Token ids of the text, [N] int64.
          target: Precision of quantized parts: "fp16", "bf16" or "int8w".
          limits: Limits that the quantized model must keep.
          max_tokens: Largest T of a call, at most the model's anchor interval.
          say: Called with a message about each step of the search.
        """
        self._checkpoint, self._ids, self._target = checkpoint, ids, target
        self._limits, self._max_tokens, self._say = limits, max_tokens, say
        self._names = list(parts(checkpoint.model, target))
        self._runs = 0
        self._rejected: list[str] = []

    def search(
        self,
        tokens: int = 300,
        confirm_tokens: int = 2000,
        open_others: OpenOthers = lambda policy: {},
        check_policy: CheckPolicy = lambda policy: None,
    ) -> Exploration:
        """Find the policy that keeps the fewest parts in float32.

        Args:
          tokens: Tokens to read in each run of the search.
          confirm_tokens: Tokens to read in the last run, which confirms the policy.
          open_others: Opens sessions in other runtimes for the last run, see `OpenOthers`.
          check_policy: Checks a policy that is within the limits, which it must pass.

        Raises:
          ConfigError: The model in float32 is itself outside the limits, or fails the check.
          TokenError: The text is too short.
        """
        for length in (tokens, confirm_tokens):  # fails at once if the text is too short
            Schedule(self._ids, length, self._max_tokens)
        with torch_threads(1):  # sums have the same order on every machine
            everything, alone = self._sensitivities(tokens)
            ranked = sorted(self._names, key=lambda n: alone[n].kl, reverse=True)
            excluded = self._fewest(ranked, everything, tokens)
            excluded = self._without_needless(excluded, tokens)
            policy, confirmed, checked = self._confirm(
                excluded, ranked, confirm_tokens, open_others, check_policy
            )
        measured: dict[str, Any] = {
            "limits": asdict(self._limits),
            "tokens": tokens,
            "confirm_tokens": confirm_tokens,
            "confirmed": {name: asdict(distance) for name, distance in confirmed.items()},
            "all_lowered": asdict(everything),
            "lowered_alone": {name: asdict(alone[name]) for name in ranked},
        }
        if self._rejected:
            measured["rejected"] = self._rejected
        if checked is not None:
            measured["check"] = {
                "uses": {candidate.name: candidate.use for candidate in checked.candidates},
                "coverage": checked.coverage,
            }
        policy = replace(policy, measured=measured)
        return Exploration(
            policy, alone, everything, confirmed, self._runs, checked, self._rejected
        )

    def _sensitivities(self, tokens: int) -> tuple[Distance, dict[str, Distance]]:
        """Return the distance with all parts quantized, and those with one part, by its name."""
        policies = {"": self._policy([])}
        for name in self._names:
            policies[name] = self._policy([other for other in self._names if other != name])
        found: dict[str, Distance] = {}
        names = list(policies)
        for start in range(0, len(names), _AT_ONCE):
            group = names[start : start + _AT_ONCE]
            self._say(f"quantizing all parts, then each alone: {start} of {len(names)} measured")
            found |= self._measure({name: policies[name] for name in group}, tokens)
        return found.pop(""), found

    def _fewest(self, ranked: Sequence[str], everything: Distance, tokens: int) -> list[str]:
        """Return the shortest prefix of `ranked` whose exclusion is enough, by bisection."""
        if everything.use(self._limits) <= 1:
            return []
        outside, within = 0, len(ranked)
        while within - outside > 1:
            middle = (outside + within) // 2
            self._say(f"excluding {middle} of {len(ranked)} parts")
            if self._is_within(ranked[:middle], tokens):
                within = middle
            else:
                outside = middle
        if within == len(ranked) and not self._is_within(ranked, tokens):
            raise ConfigError(
                "even float32 is outside the limits, which are smaller than float32's own rounding "
                "errors; give larger limits"
            )
        return list(ranked[:within])

    def _without_needless(self, excluded: list[str], tokens: int) -> list[str]:
        """Return `excluded` without the parts that can be quantized after all.

        The last one is not tried, because the bisection has shown that it is needed.
        """
        for name in excluded[-2::-1]:
            self._say(f"trying to quantize {name} after all")
            fewer = [other for other in excluded if other != name]
            if self._is_within(fewer, tokens):
                excluded = fewer
        return excluded

    def _confirm(
        self,
        excluded: list[str],
        ranked: Sequence[str],
        tokens: int,
        open_others: OpenOthers,
        check_policy: CheckPolicy,
    ) -> tuple[PrecisionPolicy, dict[str, Distance], Report | None]:
        """Return the policy, with as many more parts excluded as longer text and check need."""
        while True:
            policy = self._policy(excluded)
            self._say(f"confirming over {tokens} tokens with {len(excluded)} parts excluded")
            others = open_others(policy)
            found = self._measure({"PyTorch": policy}, tokens, others)
            problem = _problem(found, self._limits, tokens)
            report, leaves_range = None, False
            if not problem:
                self._say(f"checking with {len(excluded)} parts excluded")
                report = check_policy(policy)
                problem, leaves_range = self._of_check(policy, report)
            if not problem:
                return policy, found, report
            left = [name for name in ranked if name not in excluded]
            if not left:
                raise ConfigError(f"even float32 {problem}")
            self._rejected.append(f"with {len(excluded)} parts in float32, the model {problem}")
            following = self._first_not_finite(left) if leaves_range else left[0]
            excluded = [*excluded, following]

    def _of_check(self, policy: PrecisionPolicy, report: Report | None) -> tuple[str, bool]:
        """Return what a check found wrong, or "", and whether that is a value that is not finite.

        Without a report, PyTorch under the policy reads repeated tokens.
        """
        if report is None:
            problem = self._not_finite(policy)
            return problem, bool(problem)
        if report.passed:
            return "", False
        problem = f"fails `check`: {report.problems()[0]}"
        return problem, any(candidate.not_finite for candidate in report.candidates)

    def _first_not_finite(self, names: Sequence[str]) -> str:
        """Return the first part that alone is not finite on repeated tokens, or the first part."""
        for name in names:
            self._say(f"quantizing {name} alone, on repeated tokens")
            alone = self._policy([other for other in self._names if other != name])
            if self._not_finite(alone):
                return name
        return names[0]

    def _not_finite(self, policy: PrecisionPolicy) -> str:
        """Return where PyTorch under a policy is not finite on repeated tokens, or ""."""
        config = self._checkpoint.config
        limits = ModelLimits(
            self._max_tokens,
            config.backbone.max_positions,
            config.vocab_size,
            config.fast_weights.anchor_interval,
            repeated=repeated_tokens(self._checkpoint.tokenizer),
        )
        (case,) = choose_cases(f"{ENDLESS}@{LENGTH}", 1, limits)
        session = self._session(policy).another(case.rows)
        for call in case.calls(self._ids, limits, 0):
            call.prepare(session)
            try:
                call.feed(session)
            except NotFiniteError as error:
                token = int(call.ids[error.row or 0, error.token or 0])
                text = self._checkpoint.tokenizer.decode([token], skip_special_tokens=False)
                return (
                    f"is not finite in PyTorch at token {error.position} of a text that repeats "
                    f"token id {token}, text {text!r}"
                )
        return ""

    def _policy(self, excluded: Sequence[str]) -> PrecisionPolicy:
        quantized = [name for name in self._names if name not in excluded]
        return PrecisionPolicy(self._target, quantized, [n for n in self._names if n in excluded])

    def _is_within(self, excluded: Sequence[str], tokens: int) -> bool:
        (distance,) = self._measure({"": self._policy(excluded)}, tokens).values()
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


def _problem(found: Mapping[str, Distance], limits: Limits, tokens: int) -> str:
    """Return what is wrong with a policy over the longer text, or ""."""
    for name, distance in found.items():
        if distance.failure:
            return f"fails in {name} {distance.failure}"
        if distance.use(limits) > 1:
            return f"is outside the limits over {tokens} tokens in {name}; give larger limits"
    return ""


def _distance(drift: RunDrift) -> Distance:
    if failure := drift.failure:
        message = f"at call {failure.step}: {failure.sentence}"
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
