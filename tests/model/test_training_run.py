from __future__ import annotations

import dataclasses
import re
import tomllib
from pathlib import Path

import pytest

from fwl_export.bundle.config import BackboneConfig, FastWeightsConfig
from fwl_export.errors import CheckpointError, ConfigError, FwlError, OutputExistsError
from fwl_export.model.checkpoint import load_checkpoint
from fwl_export.model.training import TrainingConfig
from fwl_export.model.training_run import RunConfig, read_run_config, run_training
from tests.bundles import tiny_tokenizer, write_checkpoint

EXAMPLE = Path(__file__).parents[2] / "docs" / "train.toml"
HEAD = 'output = "run"\ntexts = ["*.txt"]\n'
TOKENIZER = 'tokenizer = "tokenizer.json"\n'
MODEL = "[model.backbone]\nwidth = 16\nheads = 2\nlayers = 1\nwindow = 8\n"
TRAINING = "[training]\nsteps = 6\nsequence_length = 20\nwarmup = 2\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_tokenizer().save(str(tmp_path / "tokenizer.json"))
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("THE QUICK BROWN FOX. " * 5)
    return tmp_path


def write(folder: Path, text: str) -> Path:
    (folder / "train.toml").write_text(text)
    return folder / "train.toml"


def test_texts_and_a_tokenizer_in_a_checkpoint_out(folder: Path) -> None:
    config = read_run_config(write(folder, HEAD + TOKENIZER + MODEL + TRAINING))
    said: list[str] = []
    rows: list[dict[str, float]] = []
    assert run_training(config, rows.append, said.append) == folder / "run" / "checkpoint"
    assert "210 tokens, 6 updates" in said[0]
    assert [row["step"] for row in rows] == list(range(6))
    loaded = load_checkpoint(folder / "run" / "checkpoint")
    sizes = loaded.config.fast_weights
    assert (loaded.config.vocab_size, sizes.hidden_size, sizes.output_size) == (64, 64, 16)
    assert {path.name for path in (folder / "run").iterdir()} == {
        "checkpoint",
        "log.csv",
        "resume.safetensors",
    }


def test_the_example_has_every_key_and_trains(tmp_path: Path) -> None:
    data = tomllib.loads(EXAMPLE.read_text(encoding="utf-8"))
    tables = data.pop("model")
    without = {
        "type",
        "checkpoint",
        "backbone",
        "fast_weights",
    }  # fixed, or described elsewhere
    for kind, table in (
        (RunConfig, data),
        (TrainingConfig, data["training"]),
        (BackboneConfig, tables["backbone"]),
        (FastWeightsConfig, tables["fast_weights"]),
    ):
        assert set(table) == {field.name for field in dataclasses.fields(kind)} - without
    config = read_run_config(EXAMPLE)
    config = dataclasses.replace(
        config, output=tmp_path / "run", training=dataclasses.replace(config.training, steps=2)
    )
    rows: list[dict[str, float]] = []
    folder = run_training(config, rows.append)
    assert [row["step"] for row in rows] == [0, 1]
    assert load_checkpoint(folder).config.backbone == config.backbone


def test_a_finished_run_is_not_trained_again_and_other_settings_are_refused(folder: Path) -> None:
    text = HEAD + TOKENIZER + MODEL + TRAINING
    run_training(read_run_config(write(folder, text)))
    rows: list[dict[str, float]] = []
    run_training(read_run_config(write(folder, text)), rows.append)
    assert rows == []
    other = read_run_config(write(folder, text + "seed = 3\n"))
    with pytest.raises(CheckpointError, match="belongs to a run with other settings"):
        run_training(other)


def test_training_starts_from_a_checkpoint(folder: Path) -> None:
    write_checkpoint(folder / "start")
    text = HEAD + 'checkpoint = "start"\n' + TRAINING + "train_backbone = false\n"
    trained = load_checkpoint(run_training(read_run_config(write(folder, text)))).model
    start = load_checkpoint(folder / "start").model
    before, after = start.state_dict(), trained.state_dict()
    changed = {name.split(".")[0] for name in before if not before[name].equal(after[name])}
    assert changed == {"fast_weights"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("output = ", "is not TOML"),
        (HEAD + TOKENIZER + "stepz = 3\n", "unknown key 'stepz'; known keys: checkpoint, device"),
        (HEAD + TOKENIZER + "save_every = true\n", "'save_every' is True; expected a whole number"),
        (HEAD + TOKENIZER + "save_every = 0\n", "save_every is 0; expected 1 or more"),
        (HEAD + TOKENIZER + "[training]\nstepz = 3\n", "unknown key 'training.stepz'"),
        (HEAD + TOKENIZER + '[training]\nsteps = "3"\n', "'training.steps' is '3'; expected int"),
        (HEAD + TOKENIZER + '[training]\nprecision = "fp8"\n', "expected 'float32' or 'bfloat16'"),
        (HEAD + TOKENIZER + "[model.layers]\n", "'model' has 'layers'; expected the tables"),
        (HEAD + TOKENIZER + "[model.backbone]\nheads = 5\n", "expected an even whole number"),
        (HEAD + TOKENIZER + 'checkpoint = "a"\n', "has its own tokenizer and model; remove"),
        (HEAD, "key 'tokenizer' is missing; give the path of a tokenizer.json"),
        (TOKENIZER + 'texts = ["a"]\n', "key 'output' is missing or empty"),
        (TOKENIZER + 'output = "a"\ntexts = []\n', "key 'texts' is missing or empty"),
    ],
)
def test_a_wrong_config_is_named(folder: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        read_run_config(write(folder, text))


@pytest.mark.parametrize(
    ("head", "kind", "message"),
    [
        ('output = "run"\ntexts = ["c*.txt"]\n', ConfigError, "c*.txt'"),
        (HEAD + 'device = "tpu"\n', ConfigError, "device is 'tpu'; expected 'cpu' or 'cuda'"),
        ('output = "a.txt/x"\ntexts = ["*.txt"]\n', OSError, "Not a directory"),
    ],
)
def test_a_config_that_cannot_run_is_refused(
    folder: Path, head: str, kind: type[FwlError], message: str
) -> None:
    config = read_run_config(write(folder, head + TOKENIZER + MODEL + TRAINING))
    with pytest.raises(kind, match=re.escape(message)):
        run_training(config)


def test_something_else_at_the_output_is_not_replaced(folder: Path) -> None:
    (folder / "run" / "checkpoint").mkdir(parents=True)
    (folder / "run" / "checkpoint" / "thesis.tex").touch()
    config = read_run_config(write(folder, HEAD + TOKENIZER + MODEL + TRAINING))
    with pytest.raises(OutputExistsError, match="exists and is not a checkpoint"):
        run_training(config)
