"""Backbones of transformers, read in ragged parts, equal the model's own forward pass."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fwl_export.errors import CheckpointError, ConfigError
from fwl_export.model.backbones.huggingface import ExactRotary, HuggingFaceBackbone
from fwl_export.model.checkpoint import load_checkpoint, save_checkpoint
from fwl_export.model.language_model import FWLModel
from fwl_export.model.pretrained import join_checkpoint
from fwl_export.model.streaming import StreamingModel
from fwl_export.precision.policy import in_precision
from tests.backbones import (
    ARCHITECTURES,
    LIMIT,
    VOCABULARY,
    WINDOW,
    tiny_causal,
    tiny_layer,
    tiny_pretrained,
    write_backbone,
    write_layer,
)
from tests.bundles import tiny_tokenizer
from tests.tolerances import assert_close

LENGTH = 41
MAX_TOKENS = 7


def ragged(rows: int, length: int) -> list[list[int]]:
    """Return calls that give each row `length` tokens, at most MAX_TOKENS at a time."""
    rng = np.random.default_rng(0)
    left, calls = np.full(rows, length), []
    while left.any():
        call = np.minimum(rng.integers(0, MAX_TOKENS + 1, rows), left)
        calls.append(call.tolist())
        left = left - call
    return calls


def streamed(backbone: Any, ids: Tensor) -> Tensor:
    """Read ids [B, T] in ragged parts, padded with garbage; return the hidden states."""
    capacity = backbone.config.window + MAX_TOKENS - 1
    kind = backbone.body.dtype
    caches = [torch.zeros(len(ids), *s, dtype=kind) for _, s in backbone.cache_specs(capacity)]
    done = torch.zeros(len(ids), dtype=torch.int64)
    parts: list[list[Tensor]] = [[] for _ in ids]
    for call in ragged(*ids.shape):
        lengths = torch.tensor(call)
        tokens = torch.randint(0, VOCABULARY, (len(ids), max(1, *call)))
        for row, size in enumerate(call):
            tokens[row, :size] = ids[row, done[row] : done[row] + size]
        hidden, present = backbone.stream(tokens, done, lengths, caches)
        for row, size in enumerate(call):
            parts[row].append(hidden[row, :size])
            if not size:
                assert all(
                    torch.equal(a[row], b[row]) for a, b in zip(caches, present, strict=True)
                )
        caches, done = present, done + lengths
    return torch.stack([torch.cat(part) for part in parts])


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_streaming_equals_the_models_own_forward_pass(name: str) -> None:
    own, model = tiny_causal(name), tiny_pretrained(name)
    ids = torch.randint(0, VOCABULARY, (3, LENGTH))
    expected = own.base_model(input_ids=ids, use_cache=False).last_hidden_state
    scale = float(expected.abs().max())
    found = streamed(model.backbone, ids)
    assert_close("backbone.float32", found / scale, expected / scale)
    assert_close("backbone.float32", model.backbone(ids) / scale, expected / scale)
    logits = model.fast_weights.logits(expected)
    own_logits = own(input_ids=ids, use_cache=False).logits
    size = float(own_logits.abs().max())
    assert_close("backbone.float32", logits / size, own_logits / size)
    double = in_precision(model, "fp64").backbone
    assert_close("model.float64", streamed(double, ids), double(ids))


@pytest.mark.parametrize("name", ["Llama", "Gemma 2"])
def test_any_split_gives_the_parallel_result(name: str) -> None:
    model = in_precision(tiny_pretrained(name), "fp64")
    ids = torch.randint(0, VOCABULARY, (2, LENGTH + 1))
    expected, slow = model(ids[:, :-1], ids[:, 1:])
    assert (expected - slow).abs().max() > 0.01, "the layer did not adapt"
    streaming = StreamingModel(model, MAX_TOKENS)
    state = [torch.zeros(2, *s.shape, dtype=getattr(torch, s.dtype)) for s in streaming.specs]
    done, parts = [0, 0], [[], []]
    for call in ragged(2, LENGTH):
        tokens = torch.zeros(2, max(1, *call), dtype=torch.int64)
        for row, size in enumerate(call):
            tokens[row, :size] = ids[row, done[row] : done[row] + size]
        places = torch.arange(tokens.shape[1]).repeat(2, 1)
        weights = torch.ones(tokens.shape)
        logits, *state = streaming(
            tokens, weights, torch.tensor(call), places, torch.ones(2), *state
        )
        for row, size in enumerate(call):
            parts[row].append(logits[row, :size])
            done[row] += size
    assert_close("model.float64", torch.stack([torch.cat(part) for part in parts]), expected)


def test_the_last_position_of_each_model() -> None:
    ends = {
        name: (b.window, b.max_positions)
        for name in ("GPT-2", "Llama", "Mistral")
        if (b := tiny_pretrained(name).backbone.config)
    }
    assert ends == {"GPT-2": (LIMIT, LIMIT), "Llama": (LIMIT, LIMIT), "Mistral": (WINDOW, 0)}
    sliding = tiny_pretrained("Llama", context=9, slide=True).backbone
    assert (sliding.config.window, sliding.config.max_positions) == (9, 0)
    ids = torch.randint(0, VOCABULARY, (1, 300))  # far beyond window and trained positions
    double = in_precision(tiny_pretrained("Mistral"), "fp64").backbone
    for backbone in (sliding.double(), double):
        assert_close("model.float64", streamed(backbone, ids), backbone(ids))


def test_positions_beyond_the_last_give_nan() -> None:
    model = tiny_pretrained("GPT-2", context=10)
    streaming = StreamingModel(model, MAX_TOKENS)
    state = [torch.zeros(2, *s.shape, dtype=getattr(torch, s.dtype)) for s in streaming.specs]
    places, ones = torch.arange(7).repeat(2, 1), torch.ones(2)
    ids, weights = torch.randint(0, VOCABULARY, (2, 7)), torch.ones(2, 7)
    first, *state = streaming(ids, weights, torch.tensor([7, 3]), places, ones, *state)
    assert first.isfinite().all()
    logits, *_ = streaming(ids, weights, torch.tensor([4, 7]), places, ones, *state)
    assert logits[0].isnan().all()
    assert logits[1].isfinite().all(), "the other row ends at the limit"
    with pytest.raises(ConfigError, match="texts have 11 tokens, but this model takes at most 10"):
        model.backbone(torch.zeros(1, 11, dtype=torch.int64))


def test_rotary_phases_are_exact_far_from_the_beginning() -> None:
    backbone = tiny_pretrained("Llama").backbone
    assert any(isinstance(module, ExactRotary) for module in backbone.modules())
    ids = torch.randint(0, VOCABULARY, (1, 12))
    assert_close("backbone.float32", backbone(ids, 10**9), backbone(ids))


def test_a_model_in_float16_stays_near() -> None:
    model = tiny_pretrained("Gemma 2")
    ids = torch.randint(0, VOCABULARY, (2, 20))
    half = streamed(in_precision(model, "fp16").backbone, ids)
    expected = model.backbone(ids)
    scale = float(expected.abs().max())
    assert half.dtype == torch.float16
    assert_close("backbone.float16", half / scale, expected / scale)


@pytest.mark.parametrize("name", ["Gemma 2", "Llama"])
def test_a_checkpoint_holds_everything_once(name: str, tmp_path: Path) -> None:
    model = tiny_pretrained(name)
    save_checkpoint(tmp_path / "checkpoint", model, tiny_tokenizer(VOCABULARY - 3))
    loaded = load_checkpoint(tmp_path / "checkpoint").model
    assert loaded.config == model.config
    for key, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], tensor), key
    stored = load_file(tmp_path / "checkpoint" / "model.safetensors")
    assert ("fast_weights.unembed" in stored) == (name == "Llama")
    text = (tmp_path / "checkpoint" / "config.json").read_text()
    assert "_name_or_path" not in text
    assert str(tmp_path) not in text


def test_backbone_and_layer_are_joined(tmp_path: Path) -> None:
    model = tiny_pretrained("Gemma 2")
    backbone = write_backbone(tmp_path / "backbone", "Gemma 2")
    layer = write_layer(tmp_path / "layer", model)
    joined = join_checkpoint(backbone, layer, tmp_path / "checkpoint")
    ids = torch.randint(0, VOCABULARY, (1, 9))
    for found in (joined, load_checkpoint(tmp_path / "checkpoint").model):
        assert torch.equal(found(ids, ids)[0], model(ids, ids)[0])


def joining_fails(
    folder: Path, message: str, kind: type[Exception] = CheckpointError, **options: Any
) -> None:
    with pytest.raises(kind, match=re.escape(message)) as error:
        join_checkpoint(folder / "backbone", folder / "layer", folder / "out", **options)
    assert "\n" not in str(error.value)
    assert not (folder / "out").exists()


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_backbone(tmp_path / "backbone", "Llama")
    write_layer(tmp_path / "layer", tiny_pretrained("Llama"))
    return tmp_path


def test_damaged_weights_of_a_backbone(folder: Path) -> None:
    path = folder / "backbone" / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.0.mlp.up_proj.weight"
    save_file({k: v for k, v in tensors.items() if k != "lm_head.weight"}, path)
    joining_fails(folder, "has no weights of the head ('lm_head.weight'), and its config.json")
    save_file({k: v for k, v in tensors.items() if k != name}, path)
    joining_fails(folder, f"lacks 1 of the weights that its config.json requires, e.g. '{name}'")
    save_file({**tensors, name: torch.full_like(tensors[name], np.nan)}, path)
    joining_fails(folder, f"'{name}' holds NaN or infinite values")
    path.write_bytes(path.read_bytes()[:1000])
    joining_fails(folder, "as a language model (")
    path.rename(path.with_name("pytorch_model.bin"))
    joining_fails(folder, "has no safetensors but a pickle; other formats can run code when")


def test_unusable_folders_of_a_backbone(folder: Path) -> None:
    (folder / "backbone" / "tokenizer.json").unlink()
    joining_fails(folder, "has no tokenizer.json; write it with")
    tiny_tokenizer(VOCABULARY + 20).save(str(folder / "backbone" / "tokenizer.json"))
    joining_fails(folder, "has 84 entries, of which 20 have ids of 64 and more")
    change_config(folder / "backbone", quantization_config={"quant_method": "gptq"})
    joining_fails(folder, "is quantized; give the original model with float weights")
    (folder / "backbone" / "config.json").unlink()
    joining_fails(folder, "has no config.json; it has weights only")
    (folder / "backbone").rename(folder / "elsewhere")
    joining_fails(folder, "does not exist; expected the folder of a transformers model")


def test_a_config_that_would_run_code_is_refused(folder: Path) -> None:
    code = "raise SystemExit('ran')\n"
    (folder / "backbone" / "own.py").write_text(code)
    auto = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    change_config(folder / "backbone", model_type="own", auto_map=auto)
    joining_fails(folder, "as a language model (")


def test_a_layer_of_another_backbone(folder: Path) -> None:
    layer = tiny_pretrained("Llama").fast_weights
    tensors = dict(layer.state_dict())
    own = {n: t for n, t in tensors.items() if not n.startswith("unembed")}
    save_file(
        {**own, "unembed": torch.zeros(9, 16), "unembed_bias": torch.zeros(9)}, weights(folder)
    )
    joining_fails(folder, "has a vocabulary of 9 tokens, but the backbone has 64", ConfigError)
    other = write_backbone(folder / "other", "OPT")
    save_file(own, weights(folder))
    (folder / "backbone").rename(folder / "llama")
    other.rename(folder / "backbone")
    joining_fails(folder, "fast_weights.input_size is 16, but the backbone requires", ConfigError)


def weights(folder: Path) -> Path:
    return folder / "layer" / "model.safetensors"


def test_a_layer_may_bring_its_own_unembedding(folder: Path) -> None:
    model = tiny_pretrained("Llama")
    unembed = torch.randn(VOCABULARY, 16)
    own = {**model.fast_weights.state_dict(), "unembed": unembed}
    save_file({name: tensor.contiguous() for name, tensor in own.items()}, weights(folder))
    joined = join_checkpoint(folder / "backbone", folder / "layer", folder / "out")
    assert torch.equal(joined.fast_weights.unembed, unembed)
    assert torch.equal(load_checkpoint(folder / "out").model.fast_weights.unembed, unembed)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("Llama", {"context": 97}, "context is 97, but this llama model was made for 96 tokens"),
        ("Llama", {"context": 0}, "context is 0; expected 1 or more"),
        (
            "Mistral",
            {"context": 9},
            "sliding-window attention over 5 tokens in all layers and can read any",
        ),
        ("GPT-2", {"slide": True}, "counts positions from the beginning of the text, so its"),
    ],
)
def test_impossible_contexts_are_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        FWLModel.from_pretrained(tiny_causal(name), **options)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("bloom", {}, "architecture 'bloom' cannot be a backbone ("),
        ("mamba", {}, "has layers of type 'linear_attention'; expected full_attention or"),
        ("bert", {}, "cannot be a backbone (read in parts, its hidden states are not"),
        (
            "Llama",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "rope_type 'dynamic' changes the rotary frequencies with the length of the text",
        ),
    ],
)
def test_an_unsuitable_architecture_is_named(
    kind: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        FWLModel.from_pretrained(tiny_causal(kind, **changes))


def test_an_object_that_is_not_a_model_is_refused() -> None:
    with pytest.raises(ConfigError, match="backbone is a Linear; expected the path of a folder,"):
        FWLModel.from_pretrained(torch.nn.Linear(2, 2))


def test_a_planted_wrong_mask_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HuggingFaceBackbone, "window", lambda self, kind: 2)
    with pytest.raises(ConfigError, match="cannot be a backbone"):
        FWLModel.from_pretrained(tiny_causal("Llama"))


def test_the_given_model_is_not_changed() -> None:
    causal = tiny_causal("GPT-2").to(torch.bfloat16)
    model = FWLModel.from_pretrained(causal, tiny_layer(16, 16))
    assert causal.dtype == torch.bfloat16
    assert model.backbone.body.dtype == torch.float32
    assert dataclasses.asdict(model.config)["backbone"]["tied"]
