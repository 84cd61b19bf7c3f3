"""Tiny GGUF files, written with the package gguf as llama.cpp writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.backbones import tiny_causal

_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers": "blk",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def write_gguf(path: Path, pre: str = "gpt-2", **keys: int) -> Any:
    """Write a tiny Llama with one quantized matrix in each layer, and return its model.

    Args:
      path: File to write.
      pre: How its tokenizer says that it splits texts.
      keys: Other values of keys of the architecture, e.g. `block_count`.
    """
    gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")
    pytest.importorskip("accelerate", reason="the package accelerate is not installed")
    causal = tiny_causal("Llama")
    config = causal.config
    writer = gguf.GGUFWriter(path, "llama")
    settings = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "rope.dimension_count": config.head_dim,
        "vocab_size": config.vocab_size,
    }
    for key, value in {**settings, **keys}.items():
        writer.add_uint32(f"llama.{key}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", config.rms_norm_eps)
    writer.add_float32("llama.rope.freq_base", config.rope_parameters["rope_theta"])
    _add_tokenizer(writer, config.vocab_size, pre)
    for name, tensor in causal.state_dict().items():
        _add_tensor(gguf, writer, name, tensor, config)
    for step in ("write_header_to_file", "write_kv_data_to_file", "write_tensors_to_file", "close"):
        getattr(writer, step)()
    return causal


def _add_tokenizer(writer: Any, size: int, pre: str) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    # Printable characters stand for themselves in a byte-level vocabulary, and a space for itself.
    tokens = ["<|end|>", "Ġ", *map(chr, range(33, 32 + size - 4)), "12", "Ġ1", "HI"]
    writer.add_token_list(tokens)
    writer.add_token_types([3] + [1] * (size - 1))
    writer.add_token_merges(["1 2", "Ġ 1", "H I"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_add_bos_token(False)


def _add_tensor(gguf: Any, writer: Any, name: str, tensor: Any, config: Any) -> None:
    data = tensor.numpy()
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for part, count in heads.items():
        if part in name:  # llama.cpp stores rotary pairs side by side
            data = data.reshape(count, 2, -1, data.shape[1]).swapaxes(1, 2).reshape(data.shape)
    for ours, theirs in _NAMES.items():
        name = name.replace(ours, theirs)
    if "ffn_down" in name:
        kind = gguf.GGMLQuantizationType.Q8_0
        packed = gguf.quants.quantize(np.ascontiguousarray(data), kind)
        # The model that is compared has the weights as they come out again.
        tensor.copy_(tensor.new_tensor(gguf.quants.dequantize(packed, kind)))
        writer.add_tensor(name, packed, raw_dtype=kind)
    else:
        writer.add_tensor(name, np.ascontiguousarray(data))
