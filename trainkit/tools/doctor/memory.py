"""The peak memory of a step, on any device."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def peak_memory(step: Callable[[], Any], device: torch.device) -> int:
    """Return the peak memory of a call, in bytes.

    Where torch counts its memory, this is all that it has allocated. Elsewhere, on a CPU for
    example, it is the tensors that the operations of the call make: neither those from before nor
    the scratch memory inside a kernel.
    """
    module: Any = torch.get_device_module(device)
    if hasattr(module, "max_memory_allocated"):
        module.reset_peak_memory_stats(device)
        step()
        return int(module.max_memory_allocated(device))
    with _Allocations() as allocations:  # type: ignore[no-untyped-call]
        step()
    return int(allocations.peak)


class _Allocations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of storages that operations make, until each is freed."""

    now = 0
    peak = 0

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = operation(*args, **(kwargs or {}))
        for storage in _storages(result) - _storages((args, kwargs)):
            self._count(storage.nbytes())
            weakref.finalize(storage, self._count, -storage.nbytes())
        return result

    def _count(self, change: int) -> None:
        self.now += change
        self.peak = max(self.peak, self.now)


def _storages(values: Any) -> set[torch.UntypedStorage]:
    tensors = (value for value in tree_leaves(values) if isinstance(value, Tensor))
    return {tensor.untyped_storage() for tensor in tensors if tensor.layout == torch.strided}
