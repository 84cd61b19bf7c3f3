from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fwl_export.model.language_model import FWLModel
from fwl_export.model.muon import orthogonalize
from fwl_export.model.training import TrainingConfig, initialize_steps, train
from tests.bundles import TINY

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
def test_a_killed_run_goes_on_as_if_nothing_had_happened(tmp_path: Path, adapt: bool) -> None:
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
    with pytest.raises(ValueError, match="is of a run with other settings"):
        train(fresh_model(), repeated_text(), other, tmp_path / "a.pt", lambda row: None)


@pytest.mark.parametrize("shape", [(8, 24), (24, 8), (16, 48)])
def test_orthogonalize_levels_the_singular_values(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape) @ torch.diag(torch.logspace(-1, 1, shape[1]))
    values = torch.linalg.svdvals(orthogonalize(matrix, 5))
    # The quintic does not converge; it keeps singular values in this range (Jordan et al.).
    assert values.max() < 1.3
    assert values.min() > 0.3
