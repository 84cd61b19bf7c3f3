"""Training of a model on one long sequence of tokens: resumable, on one process.

The recipe: Muon for the matrices inside the network, AdamW for the rest, and a learning rate
of their own for step sizes and horizon, which are trained in log space (they stay positive
and move by ratios). The loss is that of the adapting logits, differentiated through the
gradient step (second order).

A loop of one's own, under DDP or FSDP for example, needs `log_space`, then the wrapper, then
`build_optimizers`, and `model(inputs, labels)`, which is an ordinary `nn.Module`.
"""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fwl_export.errors import ConfigError, TrainingError
from fwl_export.model.language_model import FWLModel
from fwl_export.model.muon import Muon
from fwl_export.model.numerics import wide
from fwl_export.model.training_files import load_progress, save_progress

# Where the step sizes of unnormalised gradients start. Short runs of the demo model moved
# them to about 4e-2, 2e-3, 1e-3, 2e-3, 2e-2, 5e-3; starting there makes the first updates erratic.
INITIAL_STEPS = {
    "up_kernel": 4e-3,
    "up_bias": 3e-3,
    "down_kernel": 1e-3,
    "down_bias": 3e-3,
    "norm_scale": 1.5e-2,
    "norm_bias": 8e-3,
    # One per layer: that of its kernel or scale.
    "up": 4e-3,
    "down": 1e-3,
    "norm": 1.5e-2,
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
      seed: of the order of the texts, and of dropout where a backbone has it.
      first_order: take the gradient steps for constants instead of differentiating through them:
        less time and memory per update, a worse model.
      train_backbone: False trains the Fast Weight Layer on the backbone as it is.
      optimizer: of the matrices: "muon", or "adamw" like the rest.
      precision: "float32", or "bfloat16": autocast; weights, sums and losses stay float32.
      gradient_checkpointing: compute activations again in the backward pass: less memory, more
        time, the same result.
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
    first_order: bool = False
    train_backbone: bool = True
    optimizer: Literal["muon", "adamw"] = "muon"
    precision: Literal["float32", "bfloat16"] = "float32"
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        for name in ("steps", "sequence_length", "batch_size", "learning_rate", "warmup", "clip"):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise ConfigError(f"training.{name} is {value}; expected more than 0")
        if not 0 < self.cooldown <= 1:
            raise ConfigError(f"training.cooldown is {self.cooldown}; expected 0 to 1, without 0")


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
      model: in float32, on any device.
      tokens: [N] int64, the training text.
      config: how to train.
      resume_file: written every `save_every` updates; where it exists, training goes on from
        it and ends with the same weights as an uninterrupted run.
      report: called after every update with step, losses, seconds, and the highest memory so
        far in MB: of the process on a CPU, of its tensors on a GPU.
      save_every: updates between two writes of `resume_file`.

    Raises:
      TrainingError: the text is shorter than a text of a batch, or the loss is not finite.
      CheckpointError: `resume_file` is of other settings.
    """
    if len(tokens) <= config.sequence_length:
        raise TrainingError(
            f"the texts have {len(tokens)} tokens; expected more than sequence_length, "
            f"{config.sequence_length}"
        )
    device = model.fast_weights.unembed.device
    _prepare(model, config)
    with log_space(model):
        optimizers = build_optimizers(model, config)
        first = load_progress(resume_file, model, optimizers, config) if resume_file.exists() else 0
        adaptive = _adaptive_parameters(model)
        others = [p for p in _trained(model) if id(p) not in {id(q) for q in adaptive}]
        for step in range(first, config.steps):
            began = time.perf_counter()
            torch.manual_seed(_step_seed(config, step))
            _set_learning_rate(optimizers, config, step)
            inputs, labels = (part.to(device) for part in _batch(tokens, config, step))
            loss, slow_loss = _losses(model, inputs, labels, config)
            if not math.isfinite(loss.item()):
                raise TrainingError(
                    f"the loss of step {step} is {loss.item()}; lower learning_rate or "
                    f"step_learning_rate and remove {resume_file}"
                )
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
                    "peak_memory_mb": peak_memory(device) / 1e6,
                }
            )
            if (step + 1) % save_every == 0 or step + 1 == config.steps:
                save_progress(resume_file, model, optimizers, config, step + 1)


def peak_memory(device: torch.device) -> int:
    """Return the highest memory so far in bytes: of the process, or of tensors on a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def initialize_steps(model: FWLModel) -> None:
    """Set the step sizes to where training starts."""
    with torch.no_grad():
        for name, step in model.fast_weights.steps.items():
            step.fill_(INITIAL_STEPS[name] * model.fast_weights.config.loss_normalizer)


def _prepare(model: FWLModel, config: TrainingConfig) -> None:
    """Set what is trained, and how the forward pass is done; no number changes."""
    model.train().requires_grad_(True)
    model.backbone.train(config.train_backbone).requires_grad_(config.train_backbone)
    model.fast_weights.first_order = config.first_order
    model.fast_weights.gradient_checkpointing = config.gradient_checkpointing
    model.backbone.gradient_checkpointing = config.gradient_checkpointing


def _losses(
    model: FWLModel, inputs: Tensor, labels: Tensor, config: TrainingConfig
) -> tuple[Tensor, Tensor]:
    target = labels.flatten()
    half = config.precision == "bfloat16"
    with torch.autocast(inputs.device.type, torch.bfloat16, enabled=half):
        fast, slow = model(inputs, labels) if config.adapt else (model.plain(inputs), None)
    loss = F.cross_entropy(wide(fast).flatten(0, 1), target)
    if slow is None:
        return loss, loss.detach()
    with torch.no_grad():
        return loss, F.cross_entropy(wide(slow).flatten(0, 1), target)


def _batch(tokens: Tensor, config: TrainingConfig, step: int) -> tuple[Tensor, Tensor]:
    """Return the inputs and labels of an update; they depend on seed and step alone."""
    generator = torch.Generator().manual_seed(_step_seed(config, step))
    last = len(tokens) - config.sequence_length
    starts = torch.randint(0, last, (config.batch_size, 1), generator=generator)
    texts = tokens[starts + torch.arange(config.sequence_length + 1)]
    return texts[:, :-1], texts[:, 1:]


def _step_seed(config: TrainingConfig, step: int) -> int:
    return config.seed * 1_000_003 + step


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _adaptive_parameters(model: FWLModel) -> list[nn.Parameter]:
    """Return step sizes and horizon, as trained."""
    layer = model.fast_weights
    return list(layer.steps.parameters()) + [
        p for name, p in layer.named_parameters() if "horizon" in name
    ]


def build_optimizers(model: FWLModel, config: TrainingConfig) -> list[torch.optim.Optimizer]:
    """Return the optimisers of what requires a gradient, with their learning rates.

    Args:
      model: in `log_space`.
      config: how to train.
    """
    adaptive = _adaptive_parameters(model)
    layer = model.fast_weights
    matrices = [layer.up_kernel, layer.down_kernel, *_matrices(model.backbone)]
    taken = {id(p) for p in [*adaptive, *matrices]}
    rest = [p for p in _trained(model) if id(p) not in taken]
    groups = [
        {"params": rest, "lr": config.learning_rate},
        {"params": adaptive, "lr": config.step_learning_rate},
    ]
    if config.optimizer == "adamw":
        group = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
        groups.append({"params": matrices, **group})
    adamw = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.0)
    if config.optimizer == "adamw":
        return [adamw]
    return [adamw, Muon(matrices, lr=config.learning_rate, weight_decay=config.weight_decay)]


def _matrices(backbone: nn.Module) -> list[nn.Parameter]:
    """Return the matrices inside a backbone that are trained: all but embeddings."""
    return [
        parameter
        for module in backbone.modules()
        if not isinstance(module, nn.Embedding)
        for parameter in module.parameters(recurse=False)
        if parameter.ndim == 2 and parameter.requires_grad
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
    """Parametrization of a positive tensor [] or [n] by its log [1] or [n]: FSDP has no scalars."""

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self._shape = shape

    def forward(self, log: Tensor) -> Tensor:
        return log.exp().reshape(self._shape)

    def right_inverse(self, value: Tensor) -> Tensor:
        return value.log().reshape(-1)


@contextmanager
def log_space(model: FWLModel) -> Iterator[None]:
    """Train step sizes and horizon as logs; afterwards they are plain parameters again.

    In a model that `fully_shard` of FSDP has sharded meanwhile they stay logs. For a checkpoint,
    load its full state dict into another model, in `log_space` too.
    """
    layer = model.fast_weights
    places: list[tuple[nn.Module, str]] = [(layer.steps, name) for name in layer.steps]
    if layer.config.decay == "learned":
        places.append((layer, "horizon"))
    for module, name in places:
        parametrize.register_parametrization(module, name, _Exp(getattr(module, name).shape))
    try:
        yield
    finally:
        for module, name in places:
            log = cast(Any, module).parametrizations[name].original
            if not hasattr(log, "full_tensor"):  # a DTensor, whose import takes a second
                parametrize.remove_parametrizations(module, name)
