"""What ranks exchange besides gradients: integers and small objects, over the CPU."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist


def world_size() -> int:
    """The number of ranks that train together; 1 where torch.distributed is not in use."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The rank of this process; 0 where torch.distributed is not in use."""
    return dist.get_rank() if world_size() > 1 else 0


def all_gather_ints(group: Any, *numbers: int) -> Tensor:
    """The numbers of every rank of a group, int64 ``[ranks, numbers]``; no accelerator waits."""
    mine = torch.tensor(numbers)
    carrier = _cpu_twin(group or dist.group.WORLD)
    gathered = [torch.empty_like(mine) for _ in range(dist.get_world_size(carrier))]
    dist.all_gather(gathered, mine, carrier)
    return torch.stack(gathered)


def all_gather_objects(value: Any) -> list[Any]:
    """The value of every rank, in the order of ranks; waits for all of them."""
    values: list[Any] = [value] * world_size()
    if len(values) > 1:
        dist.all_gather_object(values, value, cpu_group())
    return values


def cpu_group() -> Any:
    """All ranks, over the CPU; None where torch.distributed is not in use."""
    initialized = dist.is_available() and dist.is_initialized()
    return _cpu_twin(dist.group.WORLD) if initialized else None


@functools.lru_cache(maxsize=4)
def _cpu_twin(group: Any) -> Any:
    """A group of the same ranks that carries tensors of the CPU."""
    if "gloo" in dist.get_backend_config(group):
        return group
    ranks = dist.get_process_group_ranks(group)
    return dist.new_group(ranks, backend="gloo", use_local_synchronization=True)
