"""The model as an ordinary module under DistributedDataParallel, in two processes with gloo."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fwl_export.model.language_model import FWLModel
from fwl_export.model.training import TrainingConfig, build_optimizers, log_space
from tests.model.models import VOCABULARY, small_model
from tests.tolerances import assert_close

UPDATES, LENGTH = 2, 20


def texts(rows: slice) -> Tensor:
    """Return the rows of a batch of four texts, [B, T + 1]."""
    generator = torch.Generator().manual_seed(7)
    return torch.randint(0, VOCABULARY, (4, LENGTH + 1), generator=generator)[rows]


def trained(model: FWLModel, rows: slice, distributed: bool = False) -> dict[str, Tensor]:
    """Return gradients of the first update and weights after all, by name."""
    results: dict[str, Tensor] = {}
    with log_space(model.requires_grad_(True)):
        optimizers = build_optimizers(model, TrainingConfig())
        module: nn.Module = DistributedDataParallel(model) if distributed else model
        for update in range(UPDATES):
            batch = texts(rows).roll(update, 1)
            fast, _ = module(batch[:, :-1], batch[:, 1:])
            F.cross_entropy(fast.flatten(0, 1), batch[:, 1:].flatten()).backward()
            if not update:
                results = {f"grad {n}": p.grad.clone() for n, p in model.named_parameters()}
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        return results | {n: p.detach().clone() for n, p in model.named_parameters()}


def process(rank: int, folder: str) -> None:
    """Train on two of the four texts as one of two processes."""
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    results = trained(small_model(), slice(2 * rank, 2 * rank + 2), distributed=True)
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_train_as_one_with_the_whole_batch(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(process, (str(tmp_path),), nprocs=2)
    expected = trained(small_model(), slice(0, 4))
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    assert any("steps" in name for name in expected)
    for name, tensor in expected.items():
        assert torch.equal(ranks[0][name], ranks[1][name]), name
        assert_close("training.two_processes", ranks[0][name], tensor, name)
    half = trained(small_model(), slice(0, 2))
    assert not torch.allclose(half["fast_weights.up_bias"], expected["fast_weights.up_bias"])
