"""`fwl-export build`: its table, its JSON, and wrong command lines."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from fwl_export.cli import build as verb
from fwl_export.engines import EngineMetadata
from fwl_export.engines.metadata import ProfileMetadata
from fwl_export.errors import EngineError
from tests.cli.run import run


def metadata(name: str, sm: int, path: str = "function body") -> EngineMetadata:
    shapes = {"input_ids": {"min": [1, 1], "opt": [1, 256], "max": [8, 256]}}
    return EngineMetadata(
        name=name,
        variant=name.split("-", maxsplit=1)[0],
        version="1.2.3",
        sm=sm,
        precision="fp32",
        tf32=False,
        inputs=[],
        outputs=[],
        profiles=[ProfileMetadata("decode", {}), ProfileMetadata("prefill", shapes)],
        layers=1746,
        plugin_layers=0 if path == "function body" else 2,
        plugin_sha256="" if path == "function body" else "2" * 64,
        plugin_embedded=False,
        in_place_state=False,
        update_path=path,
        build_seconds=12.345,
        engine_bytes=126_600_000,
        sha256="0" * 64,
        model_id="1" * 64,
        versions={"fwl-export": "0.1.0"},
    )


class Builder:
    """A fake of `build_engines`."""

    def __init__(self) -> None:
        self.result = [
            metadata("tensorrt-10.14.1.48-sm120-fp32", 120),
            metadata("rtx-1.7.1.116-sm80-fp32", 80, "plugin"),
        ]
        self.arguments: list[Any] = []

    def __call__(self, *arguments: Any) -> list[EngineMetadata]:
        *self.arguments, progress = arguments
        for message in ("loading", "engine 1 of 1 for SM80", "engine 1 of 1 for SM80, 1 s"):
            progress(message)
        return self.result


@pytest.fixture
def builder(monkeypatch: pytest.MonkeyPatch) -> Builder:
    builder = Builder()
    monkeypatch.setattr("fwl_export.engines.build_engines", builder)
    monkeypatch.setattr("fwl_export.bundle.manifest.read_bundle", lambda folder: folder)
    return builder


def test_the_table_fits_a_terminal(builder: Builder, capsys: pytest.CaptureFixture[str]) -> None:
    printed = run(capsys, "build", "b")
    assert printed.code == 0
    assert max(map(len, printed.out.splitlines())) <= 80
    for text in ("rtx-1.7.1.116-sm80-fp32", "126.6 MB", "1746", "12.3 s", "1 to 256; 1 to 8 rows"):
        assert text in printed.out
    assert "`make plugins`" in " ".join(printed.out.split())
    # Nothing is drawn in place here, so the message of every second is left out.
    assert printed.err.splitlines() == ["build: loading", "build: engine 1 of 1 for SM80"]


def test_defaults_and_options_reach_the_builder(
    builder: Builder, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(capsys, "build", "b").code == 0
    assert builder.arguments == [Path("b"), "rtx", None, None, None, 8, "auto", False, False]
    options = (
        "--variant tensorrt --sm 80,sm_86 --precision fp16 --chunk 32 --max-batch 2 "
        "--plugin required --in-place-state --embed-plugin"
    )
    assert run(capsys, "build", "b", *options.split()).code == 0
    values = [Path("b"), "tensorrt", [80, 86], "fp16", 32, 2, "required", True, True]
    assert builder.arguments == values


def test_json(builder: Builder, capsys: pytest.CaptureFixture[str]) -> None:
    printed = json.loads(run(capsys, "build", "b", "--json").out)
    assert printed == [json.loads(json.dumps(metadata.to_dict())) for metadata in builder.result]


def test_an_engine_with_plugins_only_says_nothing_of_a_function_body(
    builder: Builder, capsys: pytest.CaptureFixture[str]
) -> None:
    builder.result = builder.result[1:]
    printed = run(capsys, "build", "b")
    assert printed.code == 0
    assert "function body" not in printed.out


def test_a_mistake_is_one_sentence_and_exit_code_1(
    builder: Builder, capsys: pytest.CaptureFixture[str]
) -> None:
    printed = run(capsys, "build", "b", "--sm", "eighty")
    assert printed.code == 1
    assert printed.err.splitlines()[-1] == (
        "error: --sm 'eighty': 'eighty' is not a GPU architecture; expected numbers such as "
        "80,86,89,120"
    )
    assert builder.arguments == []


def test_a_folder_that_is_not_a_bundle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    printed = run(capsys, "build", tmp_path)
    assert printed.code == 1
    assert "is not a bundle: it has no manifest.json" in printed.err


@pytest.mark.parametrize(
    ("text", "sms"),
    [("80", [80]), ("80, 86,120", [80, 86, 120]), ("sm89,SM_90,8.6,12.0", [89, 90, 86, 120])],
)
def test_architectures_are_read(text: str, sms: list[int]) -> None:
    assert verb.parse_sms(text) == sms


@pytest.mark.parametrize(
    ("text", "wrong"),
    [("eighty", "eighty"), ("", ""), ("80,", ""), ("80 86", "80 86"), ("8", "8"), ("-80", "-80")],
)
def test_what_is_not_an_architecture(text: str, wrong: str) -> None:
    with pytest.raises(EngineError, match=re.escape(f"'{wrong}' is not a GPU architecture")):
        verb.parse_sms(text)
