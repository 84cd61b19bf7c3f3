"""Take a language model of transformers in: load it safely, and find out whether it fits.

Nobody has to name an architecture here. A model is read twice, by its own forward pass and in
ragged parts with our cache, and refused if the two differ; read again far from the beginning, it
shows whether positions count from the start of the text (then it ends where its table ends).
"""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fwl_export.bundle.config import FastWeightsConfig, HuggingFaceConfig
from fwl_export.errors import CheckpointError, ConfigError
from fwl_export.model.backbones.huggingface import (
    HuggingFaceBackbone,
    import_transformers,
    layer_types,
)
from fwl_export.model.stored import ZeroWeights, all_finite

# A cache for a model's whole context may not fit into memory; `context` asks for more.
DEFAULT_CONTEXT = 2048

_PROBE_WINDOW = 3
_PROBE_CALLS = ((2, 0), (1, 3), (4, 2), (2, 4))  # tokens per row
_PROBE_OFFSET = 3 << 20
# Errors of float32 are below 1e-5; a token that sees a wrong key makes a difference of 0.1.
_SAME = 1e-3


@dataclass(frozen=True)
class Imported:
    """A backbone and what its head becomes.

    Attributes:
      backbone: with the model's weights, float32.
      vocab_size: V.
      unembed: [V, size], the head's weights times a factor on the logits.
      unembed_bias: [V], the same of its bias; zeros where it has none.
      logit_softcap: see `FastWeightsConfig`.
    """

    backbone: HuggingFaceBackbone
    vocab_size: int
    unembed: Tensor
    unembed_bias: Tensor
    logit_softcap: float

    def layer_config(
        self, layer: FastWeightsConfig | None, vocab_size: int | None
    ) -> FastWeightsConfig:
        """Return the config of a layer between this backbone and its head.

        Args:
          layer: None: one of the usual sizes. The head's soft cap becomes the layer's.
          vocab_size: with which the layer was trained, where that is known.

        Raises:
          ConfigError: they do not fit.
        """
        width, size = self.backbone.config.width, self.unembed.shape[1]
        if layer is None:
            layer = FastWeightsConfig(width, 4 * width, size)
        if vocab_size not in (None, self.vocab_size):
            raise ConfigError(
                f"the fast weights have a vocabulary of {vocab_size}, but the backbone has "
                f"{self.vocab_size}; give the backbone they were trained on"
            )
        for name, found, expected in (
            ("input_size", layer.input_size, width),
            ("output_size", layer.output_size, size),
            ("logit_softcap", layer.logit_softcap or self.logit_softcap, self.logit_softcap),
        ):
            if found != expected:
                raise ConfigError(
                    f"fast_weights.{name} is {found}, but the backbone's is {expected}; give the "
                    "backbone they were trained on"
                )
        return replace(layer, logit_softcap=self.logit_softcap)

    def untie(self) -> None:
        """Let the layer have an unembedding of its own."""
        self.backbone.config = replace(self.backbone.config, tied=False)


def import_backbone(
    source: str | Path | Any, context: int | None = None, slide: bool = False
) -> Imported:
    """Take in a language model.

    Args:
      source: folder with config.json and safetensors, or a model of transformers.
      context: tokens that layers with full attention see; None: as many as the model was made
        for, at most DEFAULT_CONTEXT.
      slide: read on past the context, each token seeing the `context - 1` before it, instead of
        ending there.

    Raises:
      CheckpointError: files are missing or damaged, or weights are not finite.
      ConfigError: the architecture does not fit, or the context is not possible.
      MissingDependencyError: transformers is not installed.
    """
    with _quiet():
        path = isinstance(source, str | Path)
        causal = _load(Path(source)) if path else _copied(source)
        name = causal.config.model_type
        _check_finite(causal, str(source) if path else name)
        head = _head(causal)
        settings = _settings(causal.config)
        kinds = layer_types(causal.base_model.config)
        limit = getattr(causal.config, "max_position_embeddings", None)
        probe = HuggingFaceConfig("huggingface", head.weight.shape[1], 64, 0, False, settings)
        with ZeroWeights():
            backbone = HuggingFaceBackbone(probe, head.weight.shape[0])
        backbone.body.load_state_dict(causal.base_model.state_dict())
        softcap = float(getattr(causal.config, "final_logit_softcapping", None) or 0.0)
        scale = _logit_scale(causal.config)
        relative = _probe(causal, backbone, head, scale, softcap, limit)
        embedding = causal.get_input_embeddings().weight
        tied = head.weight.data_ptr() == embedding.data_ptr() and scale == 1
    window, ends = _window(causal.config, kinds, limit, relative, context, slide)
    backbone.config = replace(probe, window=window, max_positions=ends, tied=tied)
    weight = head.weight.detach() * scale
    bias = weight.new_zeros(len(weight)) if head.bias is None else head.bias.detach() * scale
    return Imported(backbone.requires_grad_(True), len(weight), weight, bias, softcap)


def _window(
    config: Any,
    kinds: list[str],
    limit: int | None,
    relative: bool,
    context: int | None,
    slide: bool,
) -> tuple[int, int]:
    """Return the window and how many tokens a session may read, 0 for no end."""
    if context is not None and context < 1:
        raise ConfigError(f"context is {context}; expected 1 or more")
    if context is not None and limit is not None and context > limit:
        raise ConfigError(
            f"context is {context}, but this {config.model_type} model was made for {limit} tokens "
            "(max_position_embeddings); choose that or fewer"
        )
    full = "full_attention" in kinds
    if not full and relative:
        if context is not None or slide:
            raise ConfigError(
                f"this {config.model_type} model has sliding attention of {config.sliding_window} "
                "tokens in all layers and reads without end; leave context and slide out"
            )
        return int(config.sliding_window), 0
    if slide and not relative:
        raise ConfigError(
            f"this {config.model_type} model counts positions from the beginning of the text, so "
            "its context cannot slide; leave slide out"
        )
    size = context or min(limit or DEFAULT_CONTEXT, DEFAULT_CONTEXT if relative else 1 << 30)
    return size, 0 if slide else size


def _probe(
    causal: Any,
    backbone: HuggingFaceBackbone,
    head: Any,
    scale: float,
    softcap: float,
    limit: int | None,
) -> bool:
    """Compare the model's own forward pass with ours; return whether positions are relative."""
    name = causal.config.model_type
    length = min(sum(call[0] for call in _PROBE_CALLS), limit or 1 << 30)
    ids = (torch.arange(2 * length) * 7919 + 1).remainder(len(head.weight)).reshape(2, length)
    with torch.no_grad(), _short_windows(causal.base_model.config, backbone.body.config):
        hidden = causal.base_model(input_ids=ids, use_cache=False).last_hidden_state
        logits = causal(input_ids=ids, use_cache=False).logits
        try:
            streamed = _streamed(backbone, ids)
            whole = backbone(ids)
        except (RuntimeError, ValueError, TypeError, IndexError, AttributeError, KeyError) as error:
            raise _unfit(name, str(error).splitlines()[0]) from None
        for what, found in (("read in parts", streamed), ("read at once", whole)):
            if not _same(found, hidden):
                raise _unfit(name, f"{what}, its hidden states are not those of its own forward")
        raw = F.linear(hidden, head.weight, head.bias) * scale
        if not _same(softcap * torch.tanh(raw / softcap) if softcap else raw, logits):
            raise _unfit(name, "its logits are not those of its head at the last hidden state")
        try:
            return _same(backbone(ids, _PROBE_OFFSET), hidden)
        except (IndexError, RuntimeError):  # beyond the end of a table of positions
            return False


def _unfit(name: str, reason: str) -> ConfigError:
    return ConfigError(
        f"architecture '{name}' does not follow the interface ({reason}); expected attention that "
        "keeps keys and values in transformers' Cache and takes position_ids and a 4-D mask: see "
        "'A backbone' in CONTRIBUTING.md"
    )


def _streamed(backbone: HuggingFaceBackbone, ids: Tensor) -> Tensor:
    """Read ids [2, T] in ragged parts; returns hidden states [2, T, width]."""
    specs = backbone.cache_specs(backbone.config.window + 7)
    caches = [torch.zeros(2, *shape) for _, shape in specs]
    done = torch.zeros(2, dtype=torch.int64)
    parts: list[list[Tensor]] = [[], []]
    for call in _PROBE_CALLS:
        lengths = torch.minimum(torch.tensor(call), ids.shape[1] - done)
        columns = done[:, None] + torch.arange(max(call))
        taken = ids.gather(1, columns.clamp(max=ids.shape[1] - 1))
        hidden, caches = backbone.stream(taken, done, lengths, caches)
        for row in (0, 1):
            parts[row].append(hidden[row, : lengths[row]])
        done = done + lengths
    return torch.stack([torch.cat(part) for part in parts])


def _same(found: Tensor, expected: Tensor) -> bool:
    if found.shape != expected.shape:
        return False
    error = (found - expected).abs().max()
    return bool(error <= _SAME * expected.abs().max())


@contextlib.contextmanager
def _short_windows(*configs: Any) -> Iterator[None]:
    """Let sliding windows be so short that the probe goes beyond them."""
    before = [(c, w) for c in configs if (w := getattr(c, "sliding_window", None))]
    try:
        for config, _ in before:
            config.sliding_window = _PROBE_WINDOW
        yield
    finally:
        for config, window in before:
            config.sliding_window = window


def _load(folder: Path) -> Any:
    transformers = import_transformers()
    _check_folder(folder)
    try:
        causal, info = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            dtype=torch.float32,
            attn_implementation="eager",
            output_loading_info=True,
        )
    except Exception as error:  # the library raises nothing narrower
        lines = [line for line in str(error).splitlines() if line.strip()]
        raise CheckpointError(
            f"transformers {transformers.__version__} cannot load '{folder}' as a language model "
            f"({type(error).__name__}: {lines[0] if lines else ''})"
        ) from None
    missing = sorted(info["missing_keys"])
    head = causal.get_output_embeddings()
    head_names = {n for n, module in causal.named_modules() if module is head}
    if any(name.rpartition(".")[0] in head_names for name in missing):
        raise CheckpointError(
            f"'{folder}' has no weights of the head ('{missing[0]}'), and its config does not tie "
            "them to the token embedding; set tie_word_embeddings to true if they are tied, or "
            "save the model again"
        )
    if missing:
        raise CheckpointError(
            f"'{folder}' lacks {len(missing)} weights that its config asks for, e.g. "
            f"'{missing[0]}'; is it complete, and a language model?"
        )
    return causal.eval()


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise CheckpointError(
            f"backbone '{folder}' is not a folder; expected one of transformers, with config.json "
            "and safetensors (nothing is downloaded here)"
        )
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"backbone '{folder}' has no config.json; is it of transformers?")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{folder / 'config.json'} is not JSON ({error})") from None
    if not any(folder.glob("*.safetensors")):
        raise CheckpointError(
            f"backbone '{folder}' has no safetensors; other formats can run code when they are "
            "loaded: convert it with save_pretrained of transformers"
        )
    if isinstance(config, dict) and config.get("quantization_config"):
        raise CheckpointError(
            f"backbone '{folder}' is quantised; expected float weights, from which it was made"
        )


def _copied(model: Any) -> Any:
    transformers = import_transformers()
    if not isinstance(model, transformers.PreTrainedModel):
        raise ConfigError(
            f"backbone is a {type(model).__name__}; expected a folder or a language model of "
            "transformers"
        )
    causal = copy.deepcopy(model).float().cpu().eval()
    causal.set_attn_implementation("eager")
    return causal


def _check_finite(causal: Any, source: str) -> None:
    for name, tensor in causal.state_dict().items():
        if tensor.is_floating_point() and not all_finite(tensor):
            raise CheckpointError(
                f"'{source}': '{name}' holds NaN or infinite values; get the weights again"
            )


def _head(causal: Any) -> Any:
    head = causal.get_output_embeddings()
    if not isinstance(head, torch.nn.Linear):
        raise ConfigError(
            f"architecture '{causal.config.model_type}' has no language model's head; expected "
            "one linear layer (get_output_embeddings)"
        )
    return head


def _logit_scale(config: Any) -> float:
    """Return the constant factor on the logits; Cohere multiplies, Granite divides."""
    factor = getattr(config, "logit_scale", None) or 1.0
    return float(factor) / float(getattr(config, "logits_scaling", None) or 1.0)


def _settings(config: Any) -> dict[str, Any]:
    """Return the config as plain JSON data, without what is of this machine or of its loading."""
    data = json.loads(json.dumps(config.to_dict(), default=str))
    dropped = ("dtype", "torch_dtype", "transformers_version", "auto_map")
    return {k: v for k, v in data.items() if not k.startswith("_") and k not in dropped}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hold back what transformers logs: what matters is raised here."""
    logging = import_transformers().utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
