"""What the tests of several ranks share: batches, wrapped models, and one process as reference."""

import functools
from contextlib import contextmanager

import pytest
import torch
from oracles import loss_of, make_batches, make_model
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

N, WINDOWS = 3, 6
SCATTER = (
    "reduce_scatter_single" if hasattr(dist, "reduce_scatter_single") else "reduce_scatter_tensor"
)


def batches_of(rank):
    """Ragged micro-batches, of other sizes on every rank. Rank 1 has three fewer: a window less."""
    sizes = [[4, 4, 2, 5, 1, 3], [1, 2, 3, 4, 5, 6], [3, 3], [2, 5]][rank]
    return make_batches((sizes * 9)[: N * (WINDOWS - 1) if rank == 1 else N * WINDOWS], seed=rank)


def wrapped(model, how, ranks, mesh=None):
    if how == "ddp":
        return DistributedDataParallel(model, process_group=mesh and mesh.get_group())
    mesh = mesh or init_device_mesh("cpu", (ranks,))
    fully_shard(model[0], mesh=mesh)
    return fully_shard(model, mesh=mesh)


def made(ranks, how, dtype=torch.float64, fused=False, mesh=None):
    base = make_model(dtype)
    model = wrapped(base, how, ranks, mesh)
    return base, model, torch.optim.AdamW(model.parameters(), lr=0.01, fused=fused)


def loss_function(model, weighted):
    """A step function; a weight is the number of rows."""

    def weighted_loss(batch):
        return loss_of(model, batch), len(batch[0])

    return weighted_loss if weighted else functools.partial(loss_of, model)


def whole(model):
    return [getattr(p, "full_tensor", lambda p=p: p)().detach().clone() for p in model.parameters()]


def reference(windows, weighted=False, max_norm=None, model=None):
    """One process: every window is one mean over what all ranks have in it."""
    model = make_model() if model is None else model
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for window in windows:
        weights = [len(batch[0]) if weighted else 1 for batch in window]
        for batch, weight in zip(window, weights, strict=True):
            (loss_of(model, batch) * weight / sum(weights)).backward()
        if max_norm is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()
        optimizer.zero_grad()
    return [parameter.detach() for parameter in model.parameters()]


def windows_over(loaders, n=N):
    """Windows of n micro-batches from each loader that has them."""
    starts = range(0, max(map(len, loaders)), n)
    return [[batch for loader in loaders for batch in loader[i : i + n]] for i in starts]


def expected(ranks, weighted, max_norm):
    return reference(windows_over([batches_of(rank) for rank in range(ranks)]), weighted, max_norm)


def same_everywhere(parameters):
    for parameter in parameters:
        everywhere = [torch.empty_like(parameter) for _ in range(dist.get_world_size())]
        dist.all_gather(everywhere, parameter.contiguous())
        assert all(torch.equal(other, parameter) for other in everywhere)


@contextmanager
def counted_collectives():
    """Count the reductions of gradients and numbers, by the function that does them."""
    counted = {"all_reduce": 0, SCATTER: 0}

    def counting(name, function):
        def count(*args, **kwargs):
            counted[name] += 1
            return function(*args, **kwargs)

        return count

    with pytest.MonkeyPatch.context() as patch:
        for name in counted:
            patch.setattr(dist, name, counting(name, getattr(dist, name)))
        yield counted
