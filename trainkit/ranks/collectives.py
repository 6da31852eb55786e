"""Exchange integers and small objects between ranks, over the CPU."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist


def world_size() -> int:
    """Return the number of ranks; 1 without torch.distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return the rank of this process; 0 without torch.distributed."""
    return dist.get_rank() if world_size() > 1 else 0


def all_gather_ints(group: Any, *numbers: int) -> Tensor:
    """Return the numbers of every rank in a group, int64 ``[ranks, numbers]``.

    The host waits for the other ranks, and not for an accelerator.
    """
    mine = torch.tensor(numbers)
    carrier = _cpu_twin(group or dist.group.WORLD)
    gathered = [torch.empty_like(mine) for _ in range(dist.get_world_size(carrier))]
    dist.all_gather(gathered, mine, carrier)
    return torch.stack(gathered)


def all_gather_objects(value: Any) -> list[Any]:
    """Return the value of every rank, in the order of ranks, waiting for all of them."""
    values: list[Any] = [value] * world_size()
    if len(values) > 1:
        dist.all_gather_object(values, value, cpu_group())
    return values


def cpu_group() -> Any:
    """Return a group of all ranks that works on the CPU; None without torch.distributed."""
    initialized = dist.is_available() and dist.is_initialized()
    return _cpu_twin(dist.group.WORLD) if initialized else None


@functools.lru_cache(maxsize=4)
def _cpu_twin(group: Any) -> Any:
    """Return a group of the same ranks that exchanges CPU tensors."""
    if "gloo" in dist.get_backend_config(group):
        return group
    ranks = dist.get_process_group_ranks(group)
    return dist.new_group(ranks, backend="gloo", use_local_synchronization=True)
