"""Backbones in GGUF files, and files that are damaged or lie."""

from __future__ import annotations

import contextlib
import re
import struct
from pathlib import Path

import pytest
import torch

from fwl_export.errors import CheckpointError, FwlError
from fwl_export.model.backbones.gguf import read_header, save_gguf_tokenizer
from fwl_export.model.checkpoint import load_checkpoint
from fwl_export.model.language_model import FWLModel
from fwl_export.model.pretrained import backbone_tokenizer, join_checkpoint
from tests.gguf_files import write_gguf

IDS = (torch.arange(48) * 7 + 3)[None] % 60


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(path)
    return path


def test_a_gguf_file_is_the_model_that_it_was_made_from(tmp_path: Path) -> None:
    causal = write_gguf(tmp_path / "tiny.gguf")
    model = FWLModel.from_pretrained(tmp_path / "tiny.gguf", None)
    with torch.no_grad():
        hidden = causal.model(IDS).last_hidden_state
        # float32 roundings of 1e-7 through a few layers, whose sums are in another order.
        torch.testing.assert_close(model.backbone(IDS), hidden, atol=1e-4, rtol=1e-4)
    assert torch.equal(model.fast_weights.unembed, causal.lm_head.weight)
    assert "quantization_config" not in model.config.backbone.model


def test_its_checkpoint_is_like_any_other(file: Path, tmp_path: Path) -> None:
    join_checkpoint(file, None, tmp_path / "joined")
    loaded = load_checkpoint(tmp_path / "joined")
    assert loaded.tokenizer.encode("HI 1").tokens == ["HI", "Ġ1"]


def test_the_types_of_its_weights_are_named(file: Path) -> None:
    assert read_header(file).types_in_words == "F32 (19 tensors), Q8_0 (2)"


@pytest.mark.parametrize(
    ("pre", "tokens"),
    [("gpt-2", ["12", "Ġ", "12"]), ("smollm", ["1", "2", "Ġ", "1", "2"])],
)
def test_texts_are_split_as_the_file_says(pre: str, tokens: list[str], tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", pre)
    model = FWLModel.from_pretrained(tmp_path / "tiny.gguf")
    tokenizer = backbone_tokenizer(tmp_path / "tiny.gguf", model)
    assert tokenizer.encode("12 12").tokens[: len(tokens)] == tokens


def test_an_unknown_way_to_split_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_gguf(tmp_path / "tiny.gguf", "klingon")
    save_gguf_tokenizer(tmp_path / "tiny.gguf", tmp_path / "out")
    assert "splits texts like 'klingon', which this transformers does not know" in caplog.text


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        ({"block_count": 1 << 20}, "num_hidden_layers is 1048576; expected at most"),
        ({"feed_forward_length": 1 << 24}, "its keys describe a model of "),
        ({"vocab_size": 1 << 30}, "its keys describe a model of "),
        ({"block_count": 3}, "lacks 9 of the weights that"),
    ],
)
def test_keys_that_promise_more_than_there_is_are_refused(
    keys: dict[str, int], problem: str, tmp_path: Path
) -> None:
    write_gguf(tmp_path / "tiny.gguf", **keys)
    with pytest.raises(FwlError, match=re.escape(problem)):
        FWLModel.from_pretrained(tmp_path / "tiny.gguf")


def test_a_truncated_file_is_refused_wherever_it_ends(file: Path, tmp_path: Path) -> None:
    data = file.read_bytes()
    for size in range(0, len(data), 97):
        (tmp_path / "cut.gguf").write_bytes(data[:size])
        with pytest.raises(CheckpointError, match="cannot be read as a GGUF file: it "):
            read_header(tmp_path / "cut.gguf")


@pytest.mark.parametrize(
    ("place", "value", "problem"),
    [
        (0, b"GGML", "it does not begin with 'GGUF'"),
        (4, struct.pack("<I", 1), "its version is 1; expected 2 or 3"),
        (4, struct.pack(">I", 3), "its version is 50331648; expected 2 or 3"),
        (8, struct.pack("<Q", 1 << 62), "tensors; expected at most"),
        (16, struct.pack("<Q", 1 << 62), "keys; expected at most"),
        (24, struct.pack("<Q", 1 << 62), "the name of a key is 4611686018427387904 bytes long"),
    ],
)
def test_a_header_that_lies_is_refused(
    place: int, value: bytes, problem: str, file: Path, tmp_path: Path
) -> None:
    data = bytearray(file.read_bytes())
    data[place : place + len(value)] = value
    (tmp_path / "lies.gguf").write_bytes(data)
    with pytest.raises(CheckpointError, match=re.escape(problem)):
        FWLModel.from_pretrained(tmp_path / "lies.gguf")


def test_changed_bytes_of_the_header_end_in_a_sentence(file: Path, tmp_path: Path) -> None:
    data = file.read_bytes()
    end = data.index(b"output_norm.weight")
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        changed = bytearray(data)
        for place in torch.randint(4, end, (3,), generator=generator).tolist():
            changed[place] = int(torch.randint(256, (1,), generator=generator))
        (tmp_path / "changed.gguf").write_bytes(changed)
        with contextlib.suppress(CheckpointError):  # a changed name or number may still be one
            read_header(tmp_path / "changed.gguf")
