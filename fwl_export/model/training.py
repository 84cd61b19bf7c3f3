"""Train a model on one long sequence of tokens, in one process, so that a run can be resumed.

The recipe: Muon trains the matrices inside the network, AdamW the rest. Step sizes and horizon have
a learning rate of their own and are trained in log space, where they stay positive and change by
ratios. The loss is that of the adapting logits, differentiated through the gradient steps (second
order).

To write your own loop, for example under DDP or FSDP, enter `log_space`, wrap the model, call
`build_optimizers`, and call `model(inputs, labels)`; the model is an ordinary `nn.Module`.
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

from fwl_export.bundle.config import HuggingFaceConfig, KeyValueError
from fwl_export.errors import TrainingError
from fwl_export.model.language_model import FWLModel
from fwl_export.model.muon import Muon
from fwl_export.model.numerics import wide
from fwl_export.model.training_files import fingerprint, load_progress, save_progress

# Initial step sizes, for gradients that are not divided by the loss normalizer. Short runs of the
# demo model moved them to about 4e-2, 2e-3, 1e-3, 2e-3, 2e-2, 5e-3, but starting there makes the
# first updates erratic.
INITIAL_STEPS = {
    "up_kernel": 4e-3,
    "up_bias": 3e-3,
    "down_kernel": 1e-3,
    "down_bias": 3e-3,
    "norm_scale": 1.5e-2,
    "norm_bias": 8e-3,
    # With one step size per layer: that of the layer's kernel or scale.
    "up": 4e-3,
    "down": 1e-3,
    "norm": 1.5e-2,
}


@dataclass(frozen=True)
class TrainingConfig:
    """How to train; the table [training] of a run's TOML file.

    Attributes:
      adapt: Whether to train the adapting logits; False trains the same network as a plain model.
      steps: Number of updates.
      sequence_length: Number of tokens in each text of a batch.
      batch_size: Number of texts per batch.
      learning_rate: Learning rate of the weights.
      step_learning_rate: Learning rate of the logarithms of step sizes and horizon.
      weight_decay: Weight decay of the matrices inside the network.
      warmup: Number of updates over which the learning rate rises to its full value.
      cooldown: The last fraction of the updates, in (0, 1], over which the learning rate falls.
      clip: Largest norm of the gradient; larger gradients are scaled down to it.
      seed: Seed of the choice of texts, and of dropout in a backbone that has it.
      first_order: Whether to treat the gradient steps as constants instead of differentiating
        through them. An update takes less time and memory; the model becomes worse.
      train_backbone: Whether to train the backbone too; False trains only the Fast Weight Layer,
        and of one on a backbone of Hugging Face not the head, which is the backbone's.
      optimizer: Optimizer of the matrices: "muon", or "adamw" as for the rest.
      precision: "float32", or "bfloat16" for autocast, which leaves weights, sums and losses in
        float32.
      gradient_checkpointing: Whether to compute activations again in the backward pass. It takes
        less memory and more time, for the same result.
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
                raise _out_of_range(name, value, "more than 0")
        for name in ("step_learning_rate", "weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise _out_of_range(name, getattr(self, name), "0 or more")
        if not 0 <= self.seed < 1 << 63:
            raise _out_of_range("seed", self.seed, "0 or more, of 63 bits")
        if not 0 < self.cooldown <= 1:
            raise _out_of_range("cooldown", self.cooldown, "more than 0, at most 1")


def _out_of_range(name: str, value: float, expected: str) -> KeyValueError:
    return KeyValueError("training.", name, f"is {value}; expected {expected}")


def train(
    model: FWLModel,
    tokens: Tensor,
    config: TrainingConfig,
    resume_file: Path,
    report: Callable[[dict[str, float]], None],
    save_every: int = 50,
) -> None:
    """Train a model in place.

    Args:
      model: The model, in float32, on any device.
      tokens: The training text, [N] int64.
      config: How to train.
      resume_file: File to write every `save_every` updates. If it exists, training resumes from it
        and ends bit for bit like an uninterrupted run.
      report: Called after every update with the step, the losses, the norm of the gradient, the
        seconds, and the peak memory so far in MB, see `peak_memory`.
      save_every: Number of updates between two writes of `resume_file`.

    Raises:
      TrainingError: The training text is too short for one text of a batch, or the loss is not
        finite.
      CheckpointError: `resume_file` cannot be read, or was written with other settings.
    """
    if len(tokens) <= config.sequence_length:
        raise TrainingError(
            f"the texts have {len(tokens)} tokens; expected more than training.sequence_length, "
            f"{config.sequence_length}: give more text, or lower training.sequence_length"
        )
    device = model.fast_weights.unembed.device
    _prepare(model, config)
    with log_space(model):
        optimizers = build_optimizers(model, config)
        identity = fingerprint(model, tokens)
        first = 0
        if resume_file.exists():
            first = load_progress(resume_file, model, optimizers, config, identity)
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
                    f"the loss of step {step} is {loss.item()}: the training has diverged; lower "
                    "training.learning_rate or training.step_learning_rate, remove "
                    f"{resume_file}, and start again"
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
                save_progress(resume_file, model, optimizers, config, step + 1, identity)


def peak_memory(device: torch.device) -> int:
    """Return the peak memory so far in bytes: the process's on a CPU, its tensors' on a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def initialize_steps(model: FWLModel) -> None:
    """Set the step sizes to their initial values for training."""
    with torch.no_grad():
        for name, step in model.fast_weights.steps.items():
            step.fill_(INITIAL_STEPS[name] * model.fast_weights.config.loss_normalizer)


def _prepare(model: FWLModel, config: TrainingConfig) -> None:
    """Set which parameters are trained, and how the forward pass runs; no weight changes."""
    model.train().requires_grad_(True)
    model.backbone.train(config.train_backbone).requires_grad_(config.train_backbone)
    if not config.train_backbone and isinstance(model.config.backbone, HuggingFaceConfig):
        # The unembedding is the backbone's head, whether it is tied to the embedding or not.
        model.fast_weights.unembed.requires_grad_(False)
        model.fast_weights.unembed_bias.requires_grad_(False)
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
    """Return the inputs and labels of an update, [B, T] each; they depend only on seed and step."""
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
    """Return the trained parameters of step sizes and horizon: their logarithms in `log_space`."""
    layer = model.fast_weights
    return list(layer.steps.parameters()) + [
        p for name, p in layer.named_parameters() if "horizon" in name
    ]


def build_optimizers(model: FWLModel, config: TrainingConfig) -> list[torch.optim.Optimizer]:
    """Return the optimizers of all parameters that require a gradient, with their learning rates.

    Args:
      model: The model, in `log_space`.
      config: How to train.
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
    """Return the matrices of a backbone that are trained, without embeddings."""
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
    """Parametrizes a positive tensor, [] or [n], by its logarithm, [1] or [n].

    A scalar becomes [1] because FSDP does not shard scalars.
    """

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self._shape = shape

    def forward(self, log: Tensor) -> Tensor:
        return log.exp().reshape(self._shape)

    def right_inverse(self, value: Tensor) -> Tensor:
        return value.log().reshape(-1)


@contextmanager
def log_space(model: FWLModel) -> Iterator[None]:
    """Context in which step sizes and horizon are parameters in log space.

    Afterwards they are plain parameters again, except in a model that FSDP's `fully_shard` has
    sharded in the meantime. To write a checkpoint of such a model, load its full state dict into
    another model that is in `log_space` too.
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
            if not hasattr(log, "full_tensor"):  # FSDP's DTensor, whose import takes a second
                parametrize.remove_parametrizations(module, name)
