from __future__ import annotations

import dataclasses
import re
import tomllib
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from fwl_export.bundle.config import BackboneConfig, FastWeightsConfig
from fwl_export.errors import CheckpointError, ConfigError, FwlError, OutputExistsError
from fwl_export.model.checkpoint import load_checkpoint
from fwl_export.model.language_model import FWLModel
from fwl_export.model.training import TrainingConfig
from fwl_export.model.training_run import RunConfig, read_run_config, run_training
from tests.backbones import tiny_pretrained, write_backbone, write_layer
from tests.bundles import tiny_tokenizer, write_checkpoint

EXAMPLE = Path(__file__).parents[2] / "docs" / "train.toml"
HEAD = 'output = "run"\ntexts = ["*.txt"]\n'
TOKENIZER = 'tokenizer = "tokenizer.json"\n'
MODEL = "[model.backbone]\nwidth = 16\nheads = 2\nlayers = 1\nwindow = 8\n"
PROSE = "the quick brown fox jumps over the lazy dog and the other dog " * 20
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
    # Fixed, described elsewhere, or in a comment, since they exclude others.
    without = {"type", "checkpoint", "backbone", "fast_weights", "layer"}
    without |= {"pretrained", "context", "slide", "vocab_size"}
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
        (
            HEAD + TOKENIZER + "stepz = 3\n",
            "unknown key 'stepz'; did you mean 'training.steps'? Known keys: backbone, checkpoint",
        ),
        (HEAD + TOKENIZER + "save_every = true\n", "'save_every' is True; expected a whole number"),
        (HEAD + TOKENIZER + "save_every = 0\n", "save_every is 0; expected 1 or more"),
        (HEAD + TOKENIZER + "[training]\nstepz = 3\n", "unknown key 'training.stepz'"),
        (HEAD + TOKENIZER + '[training]\nsteps = "3"\n', "'training.steps' is '3'; expected int"),
        (HEAD + TOKENIZER + '[training]\nprecision = "fp8"\n', "expected 'float32' or 'bfloat16'"),
        (
            HEAD + TOKENIZER + "[model.layers]\n",
            "unknown key 'model.layers'; did you mean 'model.backbone.layers'? Known keys: backb",
        ),
        (HEAD + TOKENIZER + "[model.backbone]\nheads = 5\n", "expected an even whole number"),
        (HEAD + TOKENIZER + 'checkpoint = "a"\n', "has its own tokenizer and model; remove"),
        (
            HEAD + TOKENIZER + "sequence_length = 3\n",
            "unknown key 'sequence_length'; did you mean 'training.sequence_length'?",
        ),
        (
            HEAD + TOKENIZER + "[training]\nlr = 3\n",
            "unknown key 'training.lr'; did you mean 'training.learning_rate'? Known keys: adapt",
        ),
        (
            HEAD + TOKENIZER + "[training]\nwidth = 3\n",
            "unknown key 'training.width'; did you mean 'model.backbone.width'?",
        ),
        (
            HEAD + TOKENIZER + "[model.fast_weights]\ninput_size = 3\n",
            "train.toml: model.fast_weights.input_size is 3, but the backbone's width is 192",
        ),
        (
            HEAD + TOKENIZER + "[model.backbone]\nlayers = 0\n",
            "train.toml: model.backbone.layers is 0; expected more than 0",
        ),
        (
            HEAD + TOKENIZER + "[training]\nsequence_length = 0\n",
            "train.toml: training.sequence_length is 0; expected more than 0",
        ),
        (
            HEAD + "[backbone]\nwidth = 3\n",
            "'backbone' is a table; expected the path of a language model of Hugging Face. The "
            "table of a new backbone is [model.backbone]",
        ),
        (HEAD + 'backbone = "a"\ncheckpoint = "b"\n', "remove one of the two"),
        (HEAD + TOKENIZER + 'backbone = "a"\n', "has its own tokenizer and sizes; remove"),
        (HEAD + 'backbone = "a"\n[model.backbone]\nwidth = 3\n', "has its own tokenizer and sizes"),
        (HEAD + "context = 64\n", "'context' needs a 'backbone' of Hugging Face"),
        (HEAD + "[tokenizer]\nvocab_sise = 300\n", "did you mean 'tokenizer.vocab_size'? Known"),
        (HEAD + '[tokenizer]\nvocab_size = "1"\n', "'tokenizer.vocab_size' is '1'; expected a wh"),
        (
            HEAD + "[tokenizer]\nvocab_size = 9\n",
            "train.toml: tokenizer.vocab_size is 9; expected 256",
        ),
        (
            HEAD + 'backbone = "a"\n[tokenizer]\nvocab_size = 300\n',
            "[tokenizer] makes a new tokenizer, but the 'backbone' has its own",
        ),
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


def test_a_tokenizer_is_made_of_the_texts_and_used_again(folder: Path) -> None:
    (folder / "a.txt").write_text(PROSE)
    text = HEAD + MODEL + TRAINING + "[tokenizer]\nvocab_size = 280\n"
    said: list[str] = []
    trained = run_training(read_run_config(write(folder, text)), say=said.append)
    assert said[0] == f"made a tokenizer of 280 entries from the texts: {folder}/run/tokenizer.json"
    loaded = load_checkpoint(trained)
    assert loaded.config.vocab_size == 280
    exotic = "naïve 漢字 \x00\r\n\t 🎭"
    assert loaded.tokenizer.decode(loaded.tokenizer.encode(exotic).ids) == exotic
    before = (folder / "run" / "tokenizer.json").stat().st_mtime_ns
    run_training(read_run_config(write(folder, text)))
    assert (folder / "run" / "tokenizer.json").stat().st_mtime_ns == before
    with pytest.raises(CheckpointError, match=r"has 280 entries, but tokenizer\.vocab_size is 290"):
        run_training(read_run_config(write(folder, text.replace("280", "290"))))


def test_a_run_is_not_resumed_on_other_texts(folder: Path) -> None:
    text = HEAD + TOKENIZER + MODEL + TRAINING
    run_training(read_run_config(write(folder, text)))
    (folder / "b.txt").write_text("THE SLOW BROWN FOX. " * 5)
    with pytest.raises(CheckpointError, match="belongs to a run on other texts, or on another fro"):
        run_training(read_run_config(write(folder, text)))


def test_a_path_without_a_tokenizer_is_named(folder: Path) -> None:
    config = read_run_config(write(folder, HEAD + 'tokenizer = "tokeniser.json"\n'))
    with pytest.raises(ConfigError, match="does not exist; leave the key out to make a tokenizer"):
        run_training(config)


def test_what_is_no_checkpoint_is_named(folder: Path, tiny_bundle: Path) -> None:
    write_backbone(folder / "llama", "Llama")
    write_layer(folder / "layer", tiny_pretrained("Llama"))
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_config.json").write_text('{"base_model_name_or_path": "a/b"}')
    for key, name, message in (
        ("checkpoint", "llama", "write `backbone = ` in place of `checkpoint = `"),
        ("checkpoint", "layer", "is a Fast Weight Layer alone, without a backbone"),
        ("checkpoint", "adapter", "is a PEFT adapter, which only changes another model; load it"),
        ("checkpoint", "llama/model.safetensors", "is one file of weights; give the folder that"),
        ("checkpoint", "a.txt", "is not a folder; expected a checkpoint, as `fwl-export train` wr"),
        ("backbone", "layer", "is a Fast Weight Layer alone"),
        ("backbone", "none", "does not exist; expected a language model of Hugging Face"),
        ("backbone", str(tiny_bundle), "write `checkpoint = ` in place of `backbone = `"),
    ):
        config = read_run_config(write(folder, HEAD + f'{key} = "{name}"\n' + TRAINING))
        with pytest.raises(CheckpointError, match=re.escape(message)):
            run_training(config)


def test_training_starts_from_the_checkpoint_in_a_bundle(folder: Path, tiny_bundle: Path) -> None:
    config = read_run_config(write(folder, HEAD + f'checkpoint = "{tiny_bundle}"\n' + TRAINING))
    assert load_checkpoint(run_training(config)).config.vocab_size == 64


@pytest.mark.parametrize("name", ["Llama", "Gemma 2"])  # the head's own weights, and tied ones
def test_a_layer_is_trained_on_a_frozen_backbone(name: str, folder: Path) -> None:
    write_backbone(folder / "hf", name)
    text = HEAD + 'backbone = "hf"\ncontext = 40\n' + TRAINING + "batch_size = 1\n"
    layer = "[model.fast_weights]\ndecay = 'none'\n"
    config = read_run_config(write(folder, text + layer))
    assert not config.training.train_backbone
    assert config.training.learning_rate == 1e-4
    trained = load_checkpoint(run_training(config)).model
    start = FWLModel.from_pretrained(folder / "hf", context=40)
    assert trained.config.backbone == start.config.backbone
    assert trained.config.fast_weights.decay == "none"
    before, after = start.state_dict(), trained.state_dict()
    same = {n for n in before if n in after and before[n].equal(after[n])}
    pretrained = {n for n in before if n.startswith(("backbone.", "fast_weights.unembed"))}
    assert pretrained <= same
    assert not {"fast_weights.up_kernel", "fast_weights.steps.up_kernel"} & same


def test_a_killed_run_on_a_backbone_resumes_bit_for_bit(folder: Path) -> None:
    write_backbone(folder / "hf", "Llama")
    text = HEAD + 'backbone = "hf"\nsave_every = 2\n' + TRAINING + "train_backbone = true\n"
    config = read_run_config(write(folder, text))

    class KilledError(Exception):
        pass

    def kill(row: dict[str, float]) -> None:
        if row["step"] == 4:
            raise KilledError

    with pytest.raises(KilledError):
        run_training(dataclasses.replace(config, output=folder / "killed"), kill)
    whole = load_checkpoint(run_training(config)).model.state_dict()
    resumed = run_training(dataclasses.replace(config, output=folder / "killed"))
    for key, tensor in load_checkpoint(resumed).model.state_dict().items():
        assert tensor.equal(whole[key]), key


def test_another_backbone_under_the_same_name_is_not_resumed_on(folder: Path) -> None:
    write_backbone(folder / "hf", "Llama")
    text = HEAD + 'backbone = "hf"\n' + TRAINING
    run_training(read_run_config(write(folder, text)))
    weights = load_file(folder / "hf" / "model.safetensors")
    changed = {**weights, "model.norm.weight": weights["model.norm.weight"] * 2}
    save_file(changed, folder / "hf" / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="or on another frozen backbone"):
        run_training(read_run_config(write(folder, text)))


def test_texts_longer_than_the_context_are_refused_by_their_key(folder: Path) -> None:
    write_backbone(folder / "hf", "GPT-2")
    text = HEAD + 'backbone = "hf"\n' + TRAINING.replace("= 20", "= 200")
    with pytest.raises(ConfigError, match=r"training\.sequence_length is 200, but this backb"):
        run_training(read_run_config(write(folder, text)))
