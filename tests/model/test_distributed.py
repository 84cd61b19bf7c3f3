"""The model trains as an ordinary module under DDP and FSDP, in two processes with gloo."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
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


def as_it_is(model: FWLModel) -> nn.Module:
    """Return the model unwrapped, for one process."""
    return model


def replicated(model: FWLModel) -> nn.Module:
    """Return the model wrapped in DDP, with a copy in each process."""
    return DistributedDataParallel(model)


def sharded(model: FWLModel) -> nn.Module:
    """Return the model sharded over the processes by FSDP, block by block."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.backbone.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def gathered(tensor: Tensor) -> Tensor:
    """Return a copy of a whole tensor, of which this process may hold only a part."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone()


def trained(
    model: FWLModel, rows: slice, wrap: Callable[[FWLModel], nn.Module] = as_it_is
) -> dict[str, Tensor]:
    """Return the losses and gradients of all updates and the final weights, by name."""
    results: dict[str, Tensor] = {}
    with log_space(model.requires_grad_(True)):
        module = wrap(model)
        optimizers = build_optimizers(model, TrainingConfig())
        for update in range(UPDATES):
            batch = texts(rows).roll(update, 1)
            fast, _ = module(batch[:, :-1], batch[:, 1:])
            loss = F.cross_entropy(fast.flatten(0, 1), batch[:, 1:].flatten())
            loss.backward()
            results[f"loss {update}"] = loss.detach()
            for name, parameter in model.named_parameters():
                assert parameter.grad is not None
                results[f"grad {update} {name}"] = gathered(parameter.grad)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        return results | {n: gathered(p.detach()) for n, p in model.named_parameters()}


def process(rank: int, folder: str, wrap: Callable[[FWLModel], nn.Module]) -> None:
    """Train on two of the four texts as one of two processes."""
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    model = small_model()
    results = trained(model, slice(2 * rank, 2 * rank + 2), wrap)
    for update in range(UPDATES):
        dist.all_reduce(results[f"loss {update}"], dist.ReduceOp.AVG)
    torch.save(results, f"{folder}/{rank}.pt")
    if wrap is sharded:
        held = sum(p.to_local().numel() for p in model.parameters())
        assert held < 0.6 * sum(p.numel() for p in model.parameters())
        state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
        torch.save(state, f"{folder}/state-{rank}.pt")
    dist.destroy_process_group()


def check_two_processes(folder: Path, wrap: Callable[[FWLModel], nn.Module]) -> None:
    """Check that two processes compute what one does with the whole batch."""
    torch.multiprocessing.spawn(process, (str(folder), wrap), nprocs=2)
    expected = trained(small_model(), slice(0, 4))
    ranks = [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]
    assert any("steps" in name for name in expected)
    for name, tensor in expected.items():
        assert torch.equal(ranks[0][name], ranks[1][name]), name
        assert_close("training.two_processes", ranks[0][name], tensor, name)


def test_two_processes_train_as_one_with_the_whole_batch(tmp_path: Path) -> None:
    check_two_processes(tmp_path, replicated)


def test_half_of_the_batch_trains_something_else() -> None:
    expected, half = (trained(small_model(), slice(0, rows)) for rows in (4, 2))
    assert not torch.allclose(half["fast_weights.up_bias"], expected["fast_weights.up_bias"])


def test_a_sharded_model_trains_as_a_whole_one_and_is_gathered(tmp_path: Path) -> None:
    check_two_processes(tmp_path, sharded)
    expected, found = small_model(), small_model()
    trained(expected, slice(0, 4))
    with log_space(found):
        found.load_state_dict(torch.load(tmp_path / "state-0.pt", weights_only=True))
    for name, tensor in expected.state_dict().items():
        assert_close("training.two_processes", found.state_dict()[name], tensor, name)
