"""What people give in place of a checkpoint, and the sentence that each gets."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from fwl_export.errors import CheckpointError
from fwl_export.model import source
from fwl_export.model.source import check_language_model, what_is
from tests.backbones import tiny_pretrained, write_backbone, write_layer
from tests.bundles import write_checkpoint

LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}


def test_what_is_taken_is_recognised(tmp_path: Path, tiny_bundle: Path) -> None:
    (tmp_path / "model.GGUF").touch()
    for path, kind in (
        (write_checkpoint(tmp_path / "checkpoint"), source.CHECKPOINT),
        (write_backbone(tmp_path / "llama", "Llama"), source.HUGGING_FACE),
        (write_layer(tmp_path / "layer", tiny_pretrained("Llama")), source.LAYER),
        (tiny_bundle, source.BUNDLE),
        (tmp_path / "model.GGUF", source.GGUF),
    ):
        assert what_is(path).kind == kind


@pytest.mark.parametrize(
    ("name", "files", "message"),
    [
        ("org/name", {}, "does not exist; nothing is downloaded here. If it is a name on the Hugg"),
        ("none", {}, "does not exist; EXPECTED"),
        (
            "a.bin",
            {"": "x"},
            "is a pickle, which can run code when it is loaded; load it in PyTorc",
        ),
        ("a.safetensors", {"": "x"}, "is one file of weights; give the folder that holds it"),
        ("a.onnx", {"": "x"}, "is an ONNX file; give the checkpoint that it was exported from"),
        ("a.tar.gz", {"": "x"}, "is an archive; unpack it and give the folder"),
        ("config.json", {"": "{}"}, "is a JSON file; give the folder that holds it"),
        ("notes", {"": "x"}, "is not a folder; EXPECTED"),
        (
            "empty",
            {"readme": "x"},
            "has no config.json; expected a folder with config.json, model.s",
        ),
        (
            "peft",
            {
                "adapter_config.json": '{"base_model_name_or_path": "org/base"}',
                "config.json": "{}",
            },
            "is a PEFT adapter, which only changes another model; load it on its base model, 'org",
        ),
        (
            "hub",
            {"snapshots/abc/config.json": "{}"},
            "Hugging Face cache; give '{folder}/snapshots/a",
        ),
        ("hub", {"snapshots/abc/x": "{}"}, "cache; it holds no snapshot of a model"),
        ("run", {"checkpoint/config.json": "{}"}, "training run; give '{folder}/checkpoint'"),
        ("sd", {"model_index.json": "{}"}, "is a pipeline of diffusers; give a language model"),
        ("meta", {"params.json": "{}", "consolidated.00.pth": ""}, "in their authors' own format"),
        (
            "ggufs",
            {"b.gguf": "", "a.gguf": ""},
            "it has GGUF files; give one of them, such as '",
        ),
        ("bare", {"model.safetensors": ""}, "it has weights only; copy config.json and tokenizer"),
        (
            "odd",
            {"config.json": '{"a": 1, "b": 2}'},
            "config.json of an unknown kind, with 'a, b'; ex",
        ),
        ("odd", {"config.json": "[3]"}, "has a config.json of an unknown kind, with [3]; expected"),
    ],
)
def test_what_is_not_taken_gets_one_sentence(
    name: str, files: dict[str, str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = Path(name)
    for file, content in files.items():
        path = folder / file if file else folder
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    found = what_is(folder)
    assert found.kind == source.OTHER
    text = str(found.refusal("checkpoint", "EXPECTED"))
    assert message.replace("{folder}", name) in text
    assert "\n" not in text


@pytest.mark.parametrize(
    ("config", "files", "message"),
    [
        (
            {"model_type": "t5", "is_encoder_decoder": True},
            {},
            "is an encoder-decoder model ('t5')",
        ),
        (
            {"model_type": "bert", "architectures": ["BertForMaskedLM"]},
            {},
            "is a BertForMaskedLM; expected a decoder-only language model",
        ),
        (
            {"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]},
            {},
            "is a LlamaForSequenceClassification; expected a decoder-only",
        ),
        (
            {"model_type": "clip", "architectures": ["CLIPVisionModelWithProjection"]},
            {},
            "is a CLIP",
        ),
        (
            LLAMA,
            {"pytorch_model.bin": ""},
            "has no safetensors but a pickle; other formats can run",
        ),
        (LLAMA, {"tf_model.h5": ""}, "has no safetensors but TensorFlow's weights"),
        (LLAMA, {"flax_model.msgpack": ""}, "has no safetensors but Flax's weights"),
        (
            LLAMA,
            {
                "model-00001-of-00002.safetensors": "x",
                source.INDEX_FILE: json.dumps(
                    {"weight_map": {f"w{n}": f"model-0000{n}-of-00002.safetensors" for n in (1, 2)}}
                ),
            },
            "lacks 1 of the 2 files of weights that model.safetensors.index.json names, e.g. 'mod",
        ),
        (
            LLAMA,
            {"a.safetensors": "", source.INDEX_FILE: "{}"},
            "has no weight_map; copy or downloa",
        ),
        (
            LLAMA,
            {"model.safetensors": "version https://git-lfs.github.com/spec/v1\noid sha256:0"},
            "is a pointer of Git LFS and not the weights; run `git lfs pull` in",
        ),
    ],
)
def test_a_folder_of_hugging_face_that_cannot_be_a_backbone(
    config: dict[str, object], files: dict[str, str], message: str, tmp_path: Path
) -> None:
    for name, content in (files or {"model.safetensors": "x"}).items():
        (tmp_path / name).write_text(content)
    with pytest.raises(CheckpointError, match=re.escape(message)) as error:
        check_language_model(tmp_path, config)
    assert "\n" not in str(error.value)
