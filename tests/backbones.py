"""Tiny random language models from Hugging Face transformers, made without a download."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from fwl_export.bundle.config import FastWeightsConfig
from fwl_export.model.fwl_checkpoint import FastWeightsCheckpoint, save_fast_weights
from fwl_export.model.language_model import FWLModel
from tests.bundles import VOCABULARY, tiny_tokenizer

os.environ["HF_HUB_OFFLINE"] = "1"

WINDOW = 5
LIMIT = 96  # largest number of positions

_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": LIMIT,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
_GROUPED = {**_COMMON, "num_key_value_heads": 1, "head_dim": 8}
_GEMMA = {**_GROUPED, "query_pre_attn_scalar": 8, "sliding_window": WINDOW}

# The transformers model_type and its settings, by the name in the support table.
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "GPT-2": (
        "gpt2",
        {
            "vocab_size": VOCABULARY,
            "n_embd": 16,
            "n_layer": 2,
            "n_head": 2,
            "n_positions": LIMIT,
            "bos_token_id": 0,
            "eos_token_id": 0,
        },
    ),
    "OPT": (
        "opt",
        {
            **{k: v for k, v in _COMMON.items() if k != "intermediate_size"},
            "ffn_dim": 32,
            "word_embed_proj_dim": 12,
        },
    ),
    "GPT-NeoX (Pythia)": ("gpt_neox", {**_COMMON, "rotary_pct": 0.5}),
    "Llama": ("llama", {**_GROUPED, "tie_word_embeddings": False}),
    "Mistral": ("mistral", {**_GROUPED, "sliding_window": WINDOW}),
    "Qwen2": ("qwen2", {**_GROUPED, "use_sliding_window": False}),
    "Qwen2, sliding layers": (
        "qwen2",
        {**_GROUPED, "use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    ),
    "Qwen3": ("qwen3", _GROUPED),
    "Gemma": ("gemma", _GROUPED),
    "Gemma 2": ("gemma2", {**_GEMMA, "final_logit_softcapping": 3.0}),
    "Gemma 3": (
        "gemma3_text",
        {**_GEMMA, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "Phi": ("phi", _COMMON),
    "Phi-3": ("phi3", {**_COMMON, "num_key_value_heads": 1}),
    "Cohere": ("cohere", {**_COMMON, "num_key_value_heads": 1, "logit_scale": 0.5}),
    "Granite": ("granite", {**_GROUPED, "logits_scaling": 0.5}),
    "OLMo 2": ("olmo2", {**_COMMON, "num_key_value_heads": 1}),
    "StarCoder2": ("starcoder2", {**_GROUPED, "sliding_window": WINDOW}),
    "GPT-J": (
        "gptj",
        {
            "vocab_size": VOCABULARY,
            "n_embd": 16,
            "n_layer": 2,
            "n_head": 2,
            "n_positions": LIMIT,
            "rotary_dim": 4,
            "bos_token_id": 0,
            "eos_token_id": 0,
        },
    ),
}


def tiny_causal(name: str, **changes: Any) -> Any:
    """Return a random float32 language model from transformers, in evaluation mode."""
    import transformers

    kind, settings = ARCHITECTURES.get(name, (name, _COMMON))
    config = transformers.AutoConfig.for_model(kind, **{**settings, **changes})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for parameter in model.parameters():  # large enough that a wrong mask, bias or norm shows
        parameter.data.normal_(0, 0.3 if parameter.ndim > 1 else 0.1)
    return model.requires_grad_(False)


def tiny_layer(width: int, size: int) -> FastWeightsConfig:
    """Return the configuration of a small Fast Weight Layer."""
    return FastWeightsConfig(width, 24, size)


def tiny_pretrained(name: str, **options: Any) -> FWLModel:
    """Return a tiny backbone with a layer whose fast weights clearly change its logits."""
    causal = tiny_causal(name)
    _, width = causal.get_output_embeddings().weight.shape
    torch.manual_seed(1)
    model = FWLModel.from_pretrained(causal, tiny_layer(width, width), **options)
    layer = model.requires_grad_(False).fast_weights
    for parameter in (layer.up_kernel, layer.down_kernel):
        parameter.copy_(torch.randn_like(parameter) * 0.25)
    for step in layer.steps.values():
        step.fill_(0.05)
    layer.horizon.fill_(30.0)
    return model


def write_backbone(folder: Path, name: str, **changes: Any) -> Path:
    """Write a tiny model and tokenizer in the layout of transformers, and return the folder."""
    tiny_causal(name, **changes).save_pretrained(folder)
    tiny_tokenizer(VOCABULARY - 3).save(str(folder / "tokenizer.json"))
    return folder


def write_layer(folder: Path, model: FWLModel) -> Path:
    """Write the model's Fast Weight Layer without the backbone's head, and return the folder."""
    layer = model.fast_weights
    tensors = {n: t for n, t in layer.state_dict().items() if not n.startswith("unembed")}
    save_fast_weights(folder, FastWeightsCheckpoint(layer.config, tensors))
    return folder
