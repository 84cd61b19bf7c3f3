"""Import a language model of transformers: load it safely, and find out whether it fits.

There is no list of architectures. Instead, a trial reads some tokens with the model's own forward
pass and, in ragged parts, with our cache, and rejects the model if the results differ. A second
trial, with positions far from the beginning, shows whether positions are relative. If they are not,
a session ends where the model's table of positions ends.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fwl_export.bundle.config import FastWeightsConfig, HuggingFaceConfig, check_module_counts
from fwl_export.errors import CheckpointError, ConfigError
from fwl_export.json_files import read_json
from fwl_export.model.backbones.gguf import is_gguf, load_gguf
from fwl_export.model.backbones.huggingface import (
    HuggingFaceBackbone,
    import_transformers,
    layer_types,
    refuse_code,
)
from fwl_export.model.source import HUGGING_FACE, check_language_model, what_is
from fwl_export.model.stored import ZeroWeights, all_finite

# Caches for a model's whole context may not fit into memory; pass `context` for more than this.
DEFAULT_CONTEXT = 2048

_PROBE_WINDOW = 3
_PROBE_CALLS = ((2, 0), (1, 3), (4, 2), (2, 4))  # tokens of each of two rows
_PROBE_OFFSET = 3 << 20
# Relative to the largest value: float32 errors are below 1e-5, but a token that sees a wrong key
# changes the result by 0.1.
_SAME = 1e-3


@dataclass(frozen=True)
class Imported:
    """A backbone, and the unembedding that its head becomes.

    Attributes:
      backbone: The backbone, with the model's weights in float32.
      vocab_size: Number of tokens in the vocabulary, V.
      unembed: The head's weights times the model's factor on the logits, [V, size].
      unembed_bias: The head's bias times the same factor, [V]; zeros if it has no bias.
      logit_softcap: Soft cap of the logits, see `FastWeightsConfig`; 0 for none.
    """

    backbone: HuggingFaceBackbone
    vocab_size: int
    unembed: Tensor
    unembed_bias: Tensor
    logit_softcap: float

    def layer_config(self, layer: FastWeightsConfig, vocab_size: int | None) -> FastWeightsConfig:
        """Return the config of a Fast Weight Layer between this backbone and its head.

        Args:
          layer: The layer's config, which gets the head's soft cap.
          vocab_size: The vocabulary that the layer was trained with; None if unknown.

        Raises:
          ConfigError: The layer and the backbone do not fit each other.
        """
        width, size = self.backbone.config.width, self.unembed.shape[1]
        if vocab_size not in (None, self.vocab_size):
            raise ConfigError(
                f"the Fast Weight Layer has a vocabulary of {vocab_size} tokens, but the backbone "
                f"has {self.vocab_size}; give the backbone that the layer was trained on"
            )
        for name, found, expected in (
            ("input_size", layer.input_size, width),
            ("output_size", layer.output_size, size),
            ("logit_softcap", layer.logit_softcap or self.logit_softcap, self.logit_softcap),
        ):
            if found != expected:
                raise ConfigError(
                    f"fast_weights.{name} is {found}, but the backbone requires {expected}; give "
                    "the backbone that the layer was trained on"
                )
        return replace(layer, logit_softcap=self.logit_softcap)

    def untie(self) -> None:
        """Give the Fast Weight Layer an unembedding that it does not share with the backbone."""
        self.backbone.config = replace(self.backbone.config, tied=False)


def import_backbone(
    source: str | Path | Any, context: int | None = None, slide: bool = False
) -> Imported:
    """Import a language model.

    Args:
      source: Folder with config.json and safetensors, a GGUF file, or a model of transformers.
      context: Number of tokens that layers with full attention see. None means as many as the model
        was made for, but at most DEFAULT_CONTEXT if its positions are relative.
      slide: Whether to read on past the context, where each token sees the `context - 1` tokens
        before it, instead of ending there.

    Raises:
      CheckpointError: Files are missing or damaged, or weights are not finite.
      ConfigError: The architecture does not fit, or the context is not possible.
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
    """Return the attention window, and the number of tokens that a session may read (0: no end).

    Args:
      config: The configuration object of transformers.
      kinds: The type of every layer.
      limit: The number of tokens that the model was made for, or None.
      relative: Whether the model's positions are relative.
      context: The argument of `import_backbone`.
      slide: The argument of `import_backbone`.
    """
    if context is not None and context < 1:
        raise ConfigError(f"context is {context}; expected 1 or more")
    if context is not None and limit is not None and context > limit:
        raise ConfigError(
            f"context is {context}, but this {config.model_type} model was made for {limit} tokens "
            f"(max_position_embeddings); give {limit} or less"
        )
    full = "full_attention" in kinds
    if not full and relative:
        if context is not None or slide:
            raise ConfigError(
                f"this {config.model_type} model has sliding-window attention over "
                f"{config.sliding_window} tokens in all layers and can read any number of tokens; "
                "leave out context and slide"
            )
        return int(config.sliding_window), 0
    if slide and not relative:
        raise ConfigError(
            f"this {config.model_type} model counts positions from the beginning of the text, so "
            "its context cannot slide; leave out slide"
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
    """Compare the model's own forward pass with ours, and return whether positions are relative.

    Args:
      causal: The model of transformers.
      backbone: The backbone with the same weights.
      head: The model's head, a linear layer.
      scale: The model's factor on the logits.
      softcap: The model's soft cap of the logits, or 0.
      limit: The number of tokens that the model was made for, or None.

    Raises:
      ConfigError: The two differ, or ours does not run.
    """
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
        except (IndexError, RuntimeError):  # the position is beyond the model's table
            return False


def _unfit(name: str, reason: str) -> ConfigError:
    return ConfigError(
        f"architecture '{name}' cannot be a backbone ({reason}); expected attention that stores "
        "keys and values in transformers' Cache and takes position_ids and a 4-D mask. To add an "
        "architecture that does not, see 'A backbone' in CONTRIBUTING.md"
    )


def _streamed(backbone: HuggingFaceBackbone, ids: Tensor) -> Tensor:
    """Read ids [2, T] in ragged parts; return the hidden states, [2, T, width]."""
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
    """Context in which sliding windows are so short that the trial goes beyond them."""
    before = [(c, w) for c in configs if (w := getattr(c, "sliding_window", None))]
    try:
        for config, _ in before:
            config.sliding_window = _PROBE_WINDOW
        yield
    finally:
        for config, window in before:
            config.sliding_window = window


def _load(path: Path) -> Any:
    """Return the model in a folder or a GGUF file, once it is known to be complete."""
    causal, info = load_gguf(path) if is_gguf(path) else _load_folder(path)
    missing = sorted(info["missing_keys"])
    if _reads_both_ways(causal.config):
        raise CheckpointError(
            f"backbone '{path}' is an encoder ({causal.config.model_type}), which reads texts in "
            "both directions; expected a decoder-only language model, such as LlamaForCausalLM"
        )
    head = causal.get_output_embeddings()
    head_names = {n for n, module in causal.named_modules() if module is head}
    if any(name.rpartition(".")[0] in head_names for name in missing):
        raise CheckpointError(
            f"backbone '{path}' has no weights of the head ('{missing[0]}'), and its config.json "
            "does not tie them to the token embedding; set tie_word_embeddings to true there if "
            "they are tied, or save the model again"
        )
    if missing:
        raise CheckpointError(
            f"backbone '{path}' lacks {len(missing)} of the weights that its config.json "
            f"requires, e.g. '{missing[0]}'; expected a complete language model, not an encoder or "
            "a model without its head"
        )
    return causal.eval()


def _load_folder(folder: Path) -> tuple[Any, dict[str, Any]]:
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
    except Exception as error:  # transformers raises exceptions of many unrelated classes
        lines = [line for line in str(error).splitlines() if line.strip()]
        raise CheckpointError(
            f"transformers {transformers.__version__} cannot load '{folder}' as a language model "
            f"({type(error).__name__}: {lines[0] if lines else ''})"
        ) from None
    return causal, info


def _reads_both_ways(config: Any) -> bool:
    """Return whether an architecture is an encoder's, such as BERT's, and not used as a decoder."""
    names = importlib.import_module("transformers.models.auto.modeling_auto")
    masked = getattr(names, "MODEL_FOR_MASKED_LM_MAPPING_NAMES", {})
    return config.model_type in masked and not getattr(config, "is_decoder", False)


def _check_folder(folder: Path) -> None:
    expected = (
        "expected the folder of a transformers model, with config.json and safetensors. Nothing is "
        "downloaded here: save the model with save_pretrained first"
    )
    found = what_is(folder)
    if found.kind != HUGGING_FACE:
        raise found.refusal("backbone", expected)
    config = read_json(folder / "config.json", CheckpointError)
    check_module_counts(config, str(folder / "config.json"))
    check_language_model(folder, config)
    refuse_code(config, CheckpointError)
    if config.get("quantization_config"):
        raise CheckpointError(
            f"backbone '{folder}' is quantized; give the original model with float weights"
        )


def _copied(model: Any) -> Any:
    transformers = import_transformers()
    if not isinstance(model, transformers.PreTrainedModel):
        raise ConfigError(
            f"backbone is a {type(model).__name__}; expected the path of a folder, or a language "
            "model of transformers"
        )
    causal = copy.deepcopy(model).float().cpu().eval()
    causal.set_attn_implementation("eager")
    return causal


def _check_finite(causal: Any, source: str) -> None:
    for name, tensor in causal.state_dict().items():
        if tensor.is_floating_point() and not all_finite(tensor):
            raise CheckpointError(
                f"backbone '{source}': tensor '{name}' holds NaN or infinite values; copy "
                "or download the weights again"
            )


def _head(causal: Any) -> Any:
    head = causal.get_output_embeddings()
    if not isinstance(head, torch.nn.Linear):
        raise ConfigError(
            f"architecture '{causal.config.model_type}' has no language-model head; expected "
            "get_output_embeddings to return one linear layer"
        )
    return head


def _logit_scale(config: Any) -> float:
    """Return the model's constant factor on the logits; Cohere multiplies them, Granite divides."""
    factor = getattr(config, "logit_scale", None) or 1.0
    return float(factor) / float(getattr(config, "logits_scaling", None) or 1.0)


def _settings(config: Any) -> dict[str, Any]:
    """Return the config as JSON data, without what depends on this machine or on the loading."""
    data = json.loads(json.dumps(config.to_dict(), default=str))
    dropped = ("dtype", "torch_dtype", "transformers_version", "auto_map")
    return {k: v for k, v in data.items() if not k.startswith("_") and k not in dropped}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Context in which transformers logs nothing; what matters is raised as an error."""
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
