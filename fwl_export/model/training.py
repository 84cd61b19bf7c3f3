"""Training of a model on one long sequence of tokens: resumable, on one process.

The recipe: Muon for the matrices inside the network, AdamW for the rest, and a learning rate
of their own for step sizes and horizon, which are trained in log space (they stay positive
and move by ratios). The loss is that of the adapting logits, differentiated through the
gradient step (second order).
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fwl_export.model.language_model import FWLModel
from fwl_export.model.muon import Muon

# Where the step sizes of unnormalised gradients start. Short runs of the demo model moved
# them to about 4e-2, 2e-3, 1e-3, 2e-3, 2e-2, 5e-3; starting there makes the first updates erratic.
INITIAL_STEPS = {
    "up_kernel": 4e-3,
    "up_bias": 3e-3,
    "down_kernel": 1e-3,
    "down_bias": 3e-3,
    "norm_scale": 1.5e-2,
    "norm_bias": 8e-3,
}


@dataclass(frozen=True)
class TrainingConfig:
    """How to train.

    Attributes:
      adapt: train the adapting logits; False trains the same network as a plain model.
      steps: number of updates.
      sequence_length: tokens per text of a batch.
      batch_size: texts per batch.
      learning_rate: of the weights.
      step_learning_rate: of the logs of step sizes and horizon.
      weight_decay: of the matrices trained by Muon.
      warmup: updates until the full learning rate.
      cooldown: last fraction of the updates, over which the learning rate falls.
      clip: largest norm of the gradient.
      seed: of the order of the texts.
    """

    adapt: bool = True
    steps: int = 440
    sequence_length: int = 1024
    batch_size: int = 2
    learning_rate: float = 4e-3
    step_learning_rate: float = 0.05
    weight_decay: float = 0.1
    warmup: int = 30
    cooldown: float = 0.6
    clip: float = 1.0
    seed: int = 0


def train(
    model: FWLModel,
    tokens: Tensor,
    config: TrainingConfig,
    resume_file: Path,
    report: Callable[[dict[str, float]], None],
    save_every: int = 50,
) -> None:
    """Train `model` in place.

    Args:
      model: on the CPU, in float32.
      tokens: [N] int64, the training text.
      config: how to train.
      resume_file: written every `save_every` updates; where it exists, training goes on from
        it and ends with the same weights as an uninterrupted run.
      report: called after every update with step, losses and seconds.
      save_every: updates between two writes of `resume_file`.
    """
    with _log_space(model):
        optimizers = _optimizers(model, config)
        first = _resume(resume_file, model, optimizers, config) if resume_file.exists() else 0
        adaptive = _adaptive_parameters(model)
        others = [p for p in model.parameters() if id(p) not in {id(q) for q in adaptive}]
        for step in range(first, config.steps):
            began = time.perf_counter()
            _set_learning_rate(optimizers, config, step)
            inputs, labels = _batch(tokens, config, step)
            loss, slow_loss = _losses(model, inputs, labels, config.adapt)
            loss.backward()
            norm = nn.utils.clip_grad_norm_(others, config.clip)
            if config.adapt:
                nn.utils.clip_grad_norm_(adaptive, config.clip)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            report(
                {
                    "step": step,
                    "loss": loss.item(),
                    "slow_loss": slow_loss.item(),
                    "gradient_norm": norm.item(),
                    "seconds": time.perf_counter() - began,
                }
            )
            if (step + 1) % save_every == 0 or step + 1 == config.steps:
                _save(resume_file, model, optimizers, config, step + 1)


def initialize_steps(model: FWLModel) -> None:
    """Set the step sizes to where training starts."""
    with torch.no_grad():
        for name, step in model.fast_weights.steps.items():
            step.fill_(INITIAL_STEPS[name])


def _losses(model: FWLModel, inputs: Tensor, labels: Tensor, adapt: bool) -> tuple[Tensor, Tensor]:
    target = labels.flatten()
    if not adapt:
        loss = F.cross_entropy(model.plain(inputs).flatten(0, 1), target)
        return loss, loss.detach()
    fast, slow = model(inputs, labels)
    with torch.no_grad():
        slow_loss = F.cross_entropy(slow.flatten(0, 1), target)
    return F.cross_entropy(fast.flatten(0, 1), target), slow_loss


def _batch(tokens: Tensor, config: TrainingConfig, step: int) -> tuple[Tensor, Tensor]:
    """Return the inputs and labels of an update; they depend on seed and step alone."""
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
    last = len(tokens) - config.sequence_length
    starts = torch.randint(0, last, (config.batch_size, 1), generator=generator)
    texts = tokens[starts + torch.arange(config.sequence_length + 1)]
    return texts[:, :-1], texts[:, 1:]


def _adaptive_parameters(model: FWLModel) -> list[nn.Parameter]:
    """Return step sizes and horizon, as trained."""
    layer = model.fast_weights
    return list(layer.steps.parameters()) + [
        p for name, p in layer.named_parameters() if "horizon" in name
    ]


def _optimizers(model: FWLModel, config: TrainingConfig) -> list[torch.optim.Optimizer]:
    adaptive = _adaptive_parameters(model)
    layer = model.fast_weights
    matrices = [layer.up_kernel, layer.down_kernel] + [
        p for p in model.backbone.blocks.parameters() if p.ndim == 2
    ]
    taken = {id(p) for p in [*adaptive, *matrices]}
    rest = [p for p in model.parameters() if id(p) not in taken]
    groups = [
        {"params": rest, "lr": config.learning_rate},
        {"params": adaptive, "lr": config.step_learning_rate},
    ]
    return [
        torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.0),
        Muon(matrices, lr=config.learning_rate, weight_decay=config.weight_decay),
    ]


def _set_learning_rate(
    optimizers: list[torch.optim.Optimizer], config: TrainingConfig, step: int
) -> None:
    left = (config.steps - step) / (config.cooldown * config.steps)
    factor = min(1.0, (step + 1) / config.warmup) * max(0.03, min(1.0, left))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group.setdefault("full_lr", group["lr"]) * factor


class _Exp(nn.Module):
    """Parametrization of a positive tensor by its log."""

    def forward(self, log: Tensor) -> Tensor:
        return log.exp()

    def right_inverse(self, value: Tensor) -> Tensor:
        return value.log()


@contextmanager
def _log_space(model: FWLModel) -> Iterator[None]:
    """Train step sizes and horizon as logs; afterwards they are plain parameters again."""
    layer = model.fast_weights
    places: list[tuple[nn.Module, str]] = [(layer.steps, name) for name in layer.steps]
    if layer.config.decay == "learned":
        places.append((layer, "horizon"))
    for module, name in places:
        parametrize.register_parametrization(module, name, _Exp())
    try:
        yield
    finally:
        for module, name in places:
            parametrize.remove_parametrizations(module, name)


def _save(
    path: Path,
    model: FWLModel,
    optimizers: list[torch.optim.Optimizer],
    config: TrainingConfig,
    step: int,
) -> None:
    state: dict[str, Any] = {
        "step": step,
        "config": dataclasses.asdict(config),
        "model": model.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
    }
    beside = path.with_suffix(".partial")
    torch.save(state, beside)
    os.replace(beside, path)


def _resume(
    path: Path,
    model: FWLModel,
    optimizers: list[torch.optim.Optimizer],
    config: TrainingConfig,
) -> int:
    state = torch.load(path, weights_only=True)
    if state["config"] != dataclasses.asdict(config):
        raise ValueError(f"{path} is of a run with other settings; remove it to start again")
    model.load_state_dict(state["model"])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    return int(state["step"])
