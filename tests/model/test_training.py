from __future__ import annotations

import csv
import dataclasses
import subprocess
import sys
import textwrap
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from fwl_export.errors import CheckpointError, ConfigError, MissingDependencyError, TrainingError
from fwl_export.model.language_model import FWLModel
from fwl_export.model.muon import orthogonalize
from fwl_export.model.training import TrainingConfig, initialize_steps, train
from fwl_export.model.training_files import TrainingLog
from tests.bundles import TINY
from tests.tolerances import assert_close

REPOSITORY = Path(__file__).parents[2]

SETTINGS = TrainingConfig(steps=12, sequence_length=24, batch_size=2, warmup=3)


def fresh_model() -> FWLModel:
    torch.manual_seed(0)
    model = FWLModel(TINY)
    initialize_steps(model)
    return model


def repeated_text() -> torch.Tensor:
    return torch.arange(400) % 7


def test_the_loss_falls(tmp_path: Path) -> None:
    rows: list[dict[str, float]] = []
    config = TrainingConfig(steps=40, sequence_length=24, batch_size=2, warmup=3)
    train(fresh_model(), repeated_text(), config, tmp_path / "resume.pt", rows.append)
    assert [row["step"] for row in rows] == list(range(40))
    assert rows[-1]["loss"] < 0.5 * rows[0]["loss"]


@pytest.mark.parametrize("adapt", [True, False])
def test_a_killed_run_resumes_bit_for_bit(tmp_path: Path, adapt: bool) -> None:
    config = TrainingConfig(adapt=adapt, steps=12, sequence_length=24, batch_size=2, warmup=3)
    whole, parts = fresh_model(), fresh_model()
    train(whole, repeated_text(), config, tmp_path / "a.pt", lambda row: None)

    class Killed(Exception):  # noqa: N818
        pass

    def kill(row: dict[str, float]) -> None:
        if row["step"] == 7:
            raise Killed

    with pytest.raises(Killed):
        train(parts, repeated_text(), config, tmp_path / "b.pt", kill, save_every=5)
    resumed = FWLModel(TINY)
    train(resumed, repeated_text(), config, tmp_path / "b.pt", lambda row: None)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name
    assert "fast_weights.steps.up_kernel" in whole.state_dict()


def test_a_run_of_other_settings_is_not_resumed(tmp_path: Path) -> None:
    train(fresh_model(), repeated_text(), SETTINGS, tmp_path / "a.pt", lambda row: None)
    other = TrainingConfig(steps=13, sequence_length=24, batch_size=2, warmup=3)
    with pytest.raises(CheckpointError, match="belongs to a run with other settings"):
        train(fresh_model(), repeated_text(), other, tmp_path / "a.pt", lambda row: None)


@pytest.mark.parametrize("shape", [(8, 24), (24, 8), (16, 48)])
def test_orthogonalize_levels_the_singular_values(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape) @ torch.diag(torch.logspace(-1, 1, shape[1]))
    values = torch.linalg.svdvals(orthogonalize(matrix, 5))
    # The iteration does not converge; it keeps singular values in this range (Jordan et al.).
    assert values.max() < 1.3
    assert values.min() > 0.3


def trained(tmp_path: Path, **settings: Any) -> tuple[FWLModel, list[dict[str, float]]]:
    """Train a fresh model; return it with the rows of its log."""
    rows: list[dict[str, float]] = []
    model = fresh_model()
    config = dataclasses.replace(SETTINGS, **settings)
    train(model, repeated_text(), config, tmp_path / f"{len(settings)}.safetensors", rows.append)
    return model, rows


def test_a_run_killed_while_it_writes_resumes_and_logs_every_update_once(
    tmp_path: Path,
) -> None:
    """A SIGKILL while the second resume file is written leaves the first one."""
    script = f"""
        import os, signal, sys
        from pathlib import Path
        import torch
        from fwl_export.model import training_files
        from tests.model import test_training as t

        torch.set_num_threads(1)
        real, files = training_files.save_file, []

        def killed(tensors, path, metadata):
            real(tensors, path, metadata)
            files.append(path)
            if len(files) == 2:
                os.truncate(path, os.path.getsize(path) // 2)
                os.kill(os.getpid(), signal.SIGKILL)

        training_files.save_file = killed
        log = training_files.TrainingLog(Path({str(tmp_path)!r}) / "log.csv")
        t.train(t.fresh_model(), t.repeated_text(), t.SETTINGS,
                Path({str(tmp_path)!r}) / "resume.safetensors", log.add, save_every=5)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == -9, done.stderr
    log = TrainingLog(tmp_path / "log.csv")
    rows: list[dict[str, float]] = []

    def report(row: dict[str, float]) -> None:
        log.add(row)
        rows.append(row)

    model = FWLModel(TINY)
    train(model, repeated_text(), SETTINGS, tmp_path / "resume.safetensors", report)
    log.close()
    assert [row["step"] for row in rows] == list(range(5, 12))
    whole, expected = trained(tmp_path)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    with (tmp_path / "log.csv").open(newline="") as stream:
        written = [(int(row["step"]), row["loss"]) for row in csv.DictReader(stream)]
    assert written == [(int(row["step"]), f"{row['loss']:.9g}") for row in expected]
    assert {path.name for path in tmp_path.iterdir()} == {
        "log.csv",
        "resume.safetensors",
        "0.safetensors",
    }


def test_a_truncated_resume_file_is_refused(tmp_path: Path) -> None:
    train(fresh_model(), repeated_text(), SETTINGS, tmp_path / "a", lambda row: None)
    (tmp_path / "a").write_bytes((tmp_path / "a").read_bytes()[:-9])
    with pytest.raises(CheckpointError, match=r"cannot be read .* remove it to start the training"):
        train(fresh_model(), repeated_text(), SETTINGS, tmp_path / "a", lambda row: None)


def test_gradient_checkpointing_changes_no_number(tmp_path: Path) -> None:
    plain, rows = trained(tmp_path)
    checkpointed, others = trained(tmp_path, gradient_checkpointing=True)
    assert [row["loss"] for row in rows] == [row["loss"] for row in others]
    for name, tensor in plain.state_dict().items():
        assert torch.equal(checkpointed.state_dict()[name], tensor), name


def test_bfloat16_trains_nearly_as_float32_and_keeps_weights_in_float32(tmp_path: Path) -> None:
    _, rows = trained(tmp_path)
    model, others = trained(tmp_path, precision="bfloat16")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    losses = [[row["loss"] for row in part] for part in (rows, others)]
    assert losses[0] != losses[1], "autocast did nothing"
    assert_close("training.bfloat16", losses[1], losses[0])


def test_a_frozen_backbone_stays_as_it_is(tmp_path: Path) -> None:
    model, rows = trained(tmp_path, train_backbone=False, optimizer="adamw")
    before, after = fresh_model().state_dict(), model.state_dict()
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"fast_weights"}
    assert rows[-1]["loss"] < rows[0]["loss"]
    # The backbone is not in the resume file either.
    again, _ = trained(tmp_path, train_backbone=False, optimizer="adamw")
    assert torch.equal(again.fast_weights.up_kernel, model.fast_weights.up_kernel)


def test_step_sizes_have_a_learning_rate_of_their_own(tmp_path: Path) -> None:
    before = fresh_model().fast_weights
    slow, _ = trained(tmp_path, step_learning_rate=1e-9)
    fast, _ = trained(tmp_path, step_learning_rate=0.1, optimizer="adamw")
    # A rate of 1e-9 moves a logarithm by less than its rounding; one of 0.1 moves it by percents.
    for name, step in before.steps.items():
        assert torch.allclose(slow.fast_weights.steps[name], step, rtol=1e-5), name
        assert not torch.allclose(fast.fast_weights.steps[name], step, rtol=1e-2), name
    assert not torch.allclose(fast.fast_weights.horizon, before.horizon, rtol=1e-2)


def test_every_row_of_the_log_has_the_memory(tmp_path: Path) -> None:
    _, rows = trained(tmp_path)
    peaks = [row["peak_memory_mb"] for row in rows]
    assert peaks == sorted(peaks)
    assert peaks[0] > 50  # a process with torch takes more


def test_texts_and_settings_that_cannot_be_trained_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        TrainingError, match=r"have 24 tokens; expected more than training\.sequence_length, 24"
    ):
        train(fresh_model(), torch.zeros(24).long(), SETTINGS, tmp_path / "a", lambda row: None)
    model = fresh_model()
    with torch.no_grad():
        model.fast_weights.unembed_bias[0] = torch.inf
    with pytest.raises(
        TrainingError, match=r"the loss of step 0 is (nan|inf): .* lower training\.learning_rate"
    ):
        train(model, repeated_text(), SETTINGS, tmp_path / "a", lambda row: None)
    with pytest.raises(ConfigError, match=r"training\.steps is 0; expected more than 0"):
        TrainingConfig(steps=0)


def test_initial_steps_fit_the_loss_normalizer_and_one_step_per_layer() -> None:
    layer = dataclasses.replace(
        TINY.fast_weights, step_sizes="per_layer", update_dense_bias=False, loss_normalizer=40.0
    )
    model = FWLModel(dataclasses.replace(TINY, fast_weights=layer))
    initialize_steps(model)
    scaled, first = model.fast_weights.scaled_step, fresh_model().fast_weights.scaled_step
    for tensor in ("up.kernel", "down.kernel", "norm.scale"):
        assert torch.allclose(scaled(tensor), first(tensor)), tensor


def test_the_log_replaces_repeated_rows_and_drops_truncated_lines(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text("step,loss,time\n0,1.5,7\n1,1.25,7\n2,1.")
    log = TrainingLog(path)
    log.add({"step": 1, "loss": 9.0})
    log.close()
    assert [line.split(",")[:2] for line in path.read_text().splitlines()] == [
        ["step", "loss"],
        ["0", "1.5"],
        ["1", "9"],
    ]
    with pytest.raises(CheckpointError, match="this training writes step, other, time; move"):
        TrainingLog(path).add({"step": 0, "other": 1.0})


def test_tensorboard_is_optional(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'fwl-export\[tensorboard\]'"):
        TrainingLog(tmp_path / "log.csv", tmp_path / "board")
    scalars: list[tuple[str, float, int]] = []

    class Writer:
        def __init__(self, folder: str, purge_step: int) -> None:
            assert folder == str(tmp_path / "board")
            scalars.append(("begun", 0, purge_step))

        def add_scalar(self, *scalar: Any) -> None:
            scalars.append(scalar)

        def close(self) -> None:
            scalars.append(("closed", 0, 0))

    module = types.SimpleNamespace(SummaryWriter=Writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    log = TrainingLog(tmp_path / "log.csv", tmp_path / "board")
    log.add({"step": 3, "loss": 0.5})
    log.close()
    assert scalars == [("begun", 0, 3), ("loss", 0.5, 3), ("closed", 0, 0)]


def test_tensorboard_shows_each_update_of_a_resumed_training_once(tmp_path: Path) -> None:
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="needs tensorboard"
    )
    for first, loss in (
        (0, 0.5),
        (2, 0.25),
    ):  # killed after update 3, saved after update 1
        log = TrainingLog(tmp_path / "log.csv", tmp_path / "board")
        for step in range(first, 4):
            log.add({"step": step, "loss": loss})
        log.close()
    events = accumulator.EventAccumulator(str(tmp_path / "board"))
    events.Reload()
    assert events.Tags()["scalars"] == ["loss"]
    shown = [(event.step, event.value) for event in events.Scalars("loss")]
    assert shown == [(0, 0.5), (1, 0.5), (2, 0.25), (3, 0.25)]
