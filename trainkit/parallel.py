"""Several ranks: what DistributedDataParallel, FSDP2 and FSDP1 are told by a step, and what the ranks tell each other.

The wrappers of PyTorch do the work. They are told which backward is a window's last, so that gradients are reduced once.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel


def count_ranks() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


class Wrappers:
    """The data-parallel wrappers in some modules, also those that torch.compile, Accelerate or Fabric have put others around."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        inner = list({id(part): part for module in modules for part in module.modules()}.values())
        self._ddp = [Synchronised(part) for part in inner if isinstance(part, DistributedDataParallel)]
        self._fsdp1 = [part for part in inner if _is(part, "FullyShardedDataParallel")]
        self._fsdp2 = [part for part in inner if _is(part, "FSDPModule")]

    def __bool__(self) -> bool:
        return bool(self._ddp or self._fsdp1 or self._fsdp2)

    @property
    def group(self) -> Any:
        """The process group that gradients are averaged over; None for the default one."""
        return self._ddp[0].module.process_group if self._ddp else None

    @contextmanager
    def micro_batch(self, closes: bool) -> Iterator[None]:
        """Around forward and backward: gradients are reduced only where it ``closes`` a window. All is left as it was found."""
        for wrapped in self._ddp:
            wrapped.check()
        with ExitStack() as stack:
            if not closes:
                replicated = [wrapped.module for wrapped in self._ddp if wrapped.may_wait]
                for module in (*replicated, *self._fsdp1):
                    stack.enter_context(module.no_sync())  # type: ignore[operator]
            for module in self._fsdp2:
                stack.callback(_tell, module, True)
                _tell(module, closes)
            yield
        for wrapped in self._ddp:
            wrapped.may_wait = wrapped.may_wait or closes

    def drop(self) -> None:
        """Drops the sums of gradients that FSDP2 keeps to itself until a window closes."""
        for parameter in self._hidden():
            parameter.unsharded_accumulated_grad = None
            if (unsharded := getattr(parameter, "_unsharded_param", None)) is not None:
                unsharded.grad = None

    def hold_gradients(self) -> bool:
        """Whether there are such sums."""
        return any(
            parameter.unsharded_accumulated_grad is not None
            or getattr(getattr(parameter, "_unsharded_param", None), "grad", None) is not None
            for parameter in self._hidden()
        )

    def _hidden(self) -> Iterator[Any]:
        for module in self._fsdp2:
            # Private, and nothing public leads there without gathering all parameters first.
            state = module._get_fsdp_state()  # type: ignore[operator]
            for group in getattr(state, "_fsdp_param_groups", None) or filter(None, [state._fsdp_param_group]):
                yield from group.fsdp_params


def _is(module: nn.Module, name: str) -> bool:
    fsdp = sys.modules.get("torch.distributed.fsdp")  # who has not imported it has no such module
    return isinstance(module, getattr(fsdp, name, ()))


def _tell(module: Any, closes: bool) -> None:
    module.set_requires_gradient_sync(closes, recurse=False)
    module.set_is_last_backward(closes)


class Synchronised:
    """The parameters of a DistributedDataParallel module whose gradients it synchronises: those trainable when it was made."""

    def __init__(self, module: DistributedDataParallel) -> None:
        self.module = module
        # With a static graph it learns the graph from a backward that it reduces, and that must be its first.
        self.may_wait = not module.static_graph
        # Only the reducer knows, and only its buckets tell. Without them nothing is checked.
        buckets: list[Any] = getattr(module.reducer, "_get_zeros_like_grad_buckets", list)()
        self._known = {id(parameter) for bucket in buckets for parameter in bucket.parameters()}

    def check(self) -> None:
        """Raises ValueError where some of them are frozen now, or others are trained."""
        module = self.module
        named = [item for item in module.module.named_parameters() if item[0] not in module.parameters_to_ignore]
        trained = {id(parameter) for _, parameter in named if parameter.requires_grad}
        if not self._known or not trained or trained == self._known:  # around the step of another model all may be frozen
            return
        if added := [name for name, parameter in named if id(parameter) in trained - self._known]:
            raise ValueError(
                f"{len(added)} parameters became trainable after DistributedDataParallel was made, and it never synchronises "
                f"them (first {added[0]!r}): unfreeze before it, `unfreeze(model, layers)`, `DistributedDataParallel(model)`"
            )
        missing = [name for name, parameter in named if id(parameter) in self._known - trained]
        if not module.find_unused_parameters:
            raise ValueError(
                f"{len(missing)} parameters were frozen after DistributedDataParallel was made, which waits for their gradients "
                f"(first {missing[0]!r}): freeze before it, `freeze(model, layers)`, `DistributedDataParallel(model)`; "
                "or freeze all of it; or wrap with `find_unused_parameters=True`"
            )


def over_ranks(what: str, values: Sequence[float | Tensor], device: torch.device, group: Any) -> list[Tensor]:
    """The "avg" or "max" of some numbers over all ranks, in one collective; nobody waits for it on an accelerator."""
    wide = [value.double() if isinstance(value, Tensor) else _full(value, device) for value in values]
    together = torch.stack(wide)
    dist.all_reduce(together, dist.ReduceOp.MAX if what == "max" else dist.ReduceOp.SUM, group)
    return list(together if what == "max" else together / dist.get_world_size(group))


def _full(value: float, device: torch.device) -> Tensor:
    return torch.full((), value, dtype=torch.float64, device=device)


def tell_all(*numbers: int) -> Tensor:
    """What every rank has to say, int64, one row for each; over the CPU, where nobody waits for an accelerator."""
    mine = torch.tensor(numbers)
    world = _on_cpu(dist.group.WORLD)
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size(world))]
    dist.all_gather(everyone, mine, world)
    return torch.stack(everyone)


@functools.lru_cache(maxsize=1)
def _on_cpu(world: Any) -> Any:
    """A group of all ranks that carries tensors of the CPU."""
    return world if "gloo" in dist.get_backend_config(world) else dist.new_group(backend="gloo")
