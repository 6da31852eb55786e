"""Several ranks: what DistributedDataParallel, FSDP2 and FSDP1 are told by a step, and what the ranks tell each other.

The wrappers of PyTorch do the work. They are told which backward is a window's last, so that gradients are reduced once.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from trainkit.ranks.collectives import all_gather_ints as tell_all
from trainkit.ranks.collectives import all_gather_objects as everyone
from trainkit.ranks.collectives import cpu_group as cpu_group
from trainkit.ranks.collectives import rank as this_rank
from trainkit.ranks.collectives import world_size as count_ranks

__all__ = ["count_ranks", "cpu_group", "everyone", "tell_all", "this_rank"]


class Wrappers:
    """The data-parallel wrappers in some modules, also those that torch.compile, Accelerate or Fabric have put others around."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        inner = list({id(part): part for module in modules for part in module.modules()}.values())
        self._ddp = [
            Synchronised(part) for part in inner if isinstance(part, DistributedDataParallel)
        ]
        self._fsdp1 = [part for part in inner if _is(part, "FullyShardedDataParallel")]
        self._fsdp2 = [part for part in inner if _is(part, "FSDPModule")]
        self.found = bool(self._ddp or self._fsdp1 or self._fsdp2)
        self._sums: dict[Any, tuple[Tensor | None, Tensor | None]] = {}
        self._go_together = bool(self._fsdp1 or self._fsdp2) or any(
            isinstance(part, nn.SyncBatchNorm) for part in inner
        )

    @property
    def group(self) -> Any:
        """The process group that gradients are averaged over; None for the default one."""
        if self._ddp:
            return self._ddp[0].module.process_group
        meshes = [group.mesh_info.mesh for group in self._groups()]
        return (
            meshes[0].get_group() if meshes and meshes[0].ndim == 1 else None
        )  # with two dimensions it is all of the ranks

    @property
    def shard_norms(self) -> bool:
        """Whether gradients are parts that do not know of the others, as those of FSDP1 are."""
        return bool(self._fsdp1)

    @property
    def go_together(self) -> bool:
        """Whether every forward or backward needs all ranks."""
        return self._go_together or not all(wrapped.may_wait for wrapped in self._ddp)

    @contextmanager
    def micro_batch(self, closes: bool) -> Iterator[None]:
        """Around forward and backward: gradients are reduced only where it ``closes`` a window. All is left as it was found."""
        for wrapped in self._ddp:
            wrapped.check()
        with ExitStack() as stack:
            for wrapped in self._ddp:
                if wrapped.module.will_sync_module_buffers():  # type: ignore[no-untyped-call]
                    stack.enter_context(wrapped.broadcasting())
                if closes or not wrapped.may_wait:
                    stack.enter_context(wrapped.reducing())
                else:
                    stack.enter_context(wrapped.module.no_sync())
            for module in self._fsdp1 if not closes else ():
                stack.enter_context(module.no_sync())  # type: ignore[operator]
            for group in self._groups():
                stack.callback(_reduce, group, group.reduce_grads, group.all_reduce_grads)
            for module in self._fsdp2:
                stack.callback(module.set_is_last_backward, True)  # type: ignore[arg-type]
                module.set_requires_gradient_sync(closes, recurse=False)  # type: ignore[operator]
                module.set_is_last_backward(closes)  # type: ignore[operator]
            stack.enter_context(self._with_sums())
            yield
        for wrapped in self._ddp:
            wrapped.may_wait = wrapped.may_wait or closes

    @contextmanager
    def _with_sums(self) -> Iterator[None]:
        """Lets FSDP2 have the sums of the open window, but not of what is frozen just now: it would reduce them all the same.

        Between micro-batches it has none, or the backward of another step through this module would reduce them.
        """
        there = {
            parameter: sums
            for parameter, sums in self._sums.items()
            if parameter.sharded_param.requires_grad
        }
        try:
            for parameter, sums in there.items():
                _set_sums(parameter, *sums)
            yield
        finally:
            found = ((parameter, _sums(parameter)) for parameter in self._hidden())
            taken = {
                parameter: sums for parameter, sums in found if any(s is not None for s in sums)
            }
            self._sums = {
                parameter: sums for parameter, sums in self._sums.items() if parameter not in there
            } | taken
            for parameter in taken:
                _set_sums(parameter)

    def before_backward(self) -> None:
        """Raises RuntimeError where DistributedDataParallel would not reduce the gradients of a loss."""
        for wrapped in self._ddp:
            wrapped.before_backward()

    def buckets_rebuilt(self) -> int:
        """How many of them have put gradients into buckets of their own since the first window."""
        return sum(getattr(wrapped.module, "_has_rebuilt_buckets", False) for wrapped in self._ddp)

    def drop(self) -> None:
        """Drops the sums of gradients that FSDP2 makes until a window closes, and what a failed backward has left."""
        for module in self._fsdp2:
            # Else it takes the next backward for one that is under way, and never reduces its gradients.
            context = module._get_fsdp_state()._state_ctx  # type: ignore[operator]
            context.post_backward_final_callback_queued = False
        self._sums = {}
        for parameter in self._hidden():
            _set_sums(parameter)

    def hold_gradients(self) -> bool:
        """Whether there are such sums."""
        return bool(self._sums)

    def _hidden(self) -> Iterator[Any]:
        for group in self._groups():
            yield from group.fsdp_params

    def _groups(self) -> Iterator[Any]:
        for module in self._fsdp2:
            # Private, and nothing public leads to what it holds without gathering all parameters first.
            state = module._get_fsdp_state()  # type: ignore[operator]
            yield from getattr(state, "_fsdp_param_groups", None) or filter(
                None, [state._fsdp_param_group]
            )


def _is(module: nn.Module, name: str) -> bool:
    fsdp = sys.modules.get("torch.distributed.fsdp")  # who has not imported it has no such module
    return isinstance(module, getattr(fsdp, name, ()))


def _sums(parameter: Any) -> tuple[Tensor | None, Tensor | None]:
    """What FSDP2 has added up for a parameter: in the dtype that it reduces in, or in its own."""
    return parameter.unsharded_accumulated_grad, getattr(
        getattr(parameter, "_unsharded_param", None), "grad", None
    )


def _set_sums(parameter: Any, wide: Tensor | None = None, own: Tensor | None = None) -> None:
    parameter.unsharded_accumulated_grad = wide
    if (unsharded := getattr(parameter, "_unsharded_param", None)) is not None:
        unsharded.grad = own


def _reduce(group: Any, gradients: bool, over_replicas: bool) -> None:
    group.reduce_grads, group.all_reduce_grads = gradients, over_replicas


class Synchronised:
    """The parameters of a DistributedDataParallel module whose gradients it synchronises: those trainable when it was made."""

    def __init__(self, module: DistributedDataParallel) -> None:
        self.module = module
        # With a static graph it learns the graph from a backward that it reduces, and that must be its first.
        self.may_wait = not module.static_graph
        # Only the reducer knows, and only its buckets tell. Without them nothing is checked; one of sparse gradients has none.
        try:
            buckets: list[Any] = getattr(module.reducer, "_get_zeros_like_grad_buckets", list)()
        except RuntimeError:
            buckets = []
        self._known = {id(parameter) for bucket in buckets for parameter in bucket.parameters()}
        # Whether a backward would reduce gradients: after a forward it does, once. None before any forward.
        self._reduces: bool | None = None

    @contextmanager
    def reducing(self) -> Iterator[None]:
        """Around a micro-batch whose gradients are reduced: takes note of its forwards, for ``before_backward``."""
        handle = self.module.register_forward_pre_hook(self._after_forward)
        try:
            yield
        finally:
            handle.remove()
            self._reduces = None

    @contextmanager
    def broadcasting(self) -> Iterator[None]:
        """Around a forward that broadcasts buffers first: if it fails after that, the next one does not do so again."""

        def has_broadcast(*_: Any) -> None:
            self.module.require_forward_param_sync = False

        handle = self.module.module.register_forward_pre_hook(has_broadcast)
        try:
            yield
        finally:
            handle.remove()

    def _after_forward(self, *_: Any) -> None:
        self._reduces = True

    def before_backward(self) -> None:
        """Raises RuntimeError where the gradients of a backward would not be reduced."""
        if self._reduces is False:
            raise RuntimeError(
                "a further loss of the last micro-batch of a window, after the backward that DistributedDataParallel reduces the "
                "gradients in: add the losses, `step.backward(loss + further)`, or call the model again between the two"
            )
        if self._reduces:
            self._reduces = False

    def check(self) -> None:
        """Raises ValueError where some of them are frozen now, or others are trained."""
        module = self.module
        named = [
            item
            for item in module.module.named_parameters()
            if item[0] not in module.parameters_to_ignore
        ]
        trained = {id(parameter) for _, parameter in named if parameter.requires_grad}
        if (
            not self._known or not trained or trained == self._known
        ):  # around the step of another model all may be frozen
            return
        if added := [name for name, parameter in named if id(parameter) in trained - self._known]:
            raise ValueError(
                f"{len(added)} of {len(named)} parameters became trainable after DistributedDataParallel was made, and it never "
                f"synchronises them (first {added[0]!r}): unfreeze before it, `unfreeze(model, layers)`, "
                "`DistributedDataParallel(model)`"
            )
        missing = [name for name, parameter in named if id(parameter) in self._known - trained]
        if not module.find_unused_parameters:
            raise ValueError(
                f"{len(missing)} of {len(named)} parameters were frozen after DistributedDataParallel was made, which waits for "
                f"their gradients (first {missing[0]!r}): freeze before it, `freeze(model, layers)`, "
                "`DistributedDataParallel(model)`; or freeze all of it; or wrap with `find_unused_parameters=True`"
            )


def over_ranks(
    what: str, values: Sequence[float | Tensor], device: torch.device, group: Any
) -> Callable[[], list[Tensor]]:
    """Begins to take the "avg" or "max" of some numbers over all ranks, in one collective. Returns what waits for them: on an
    accelerator its stream does, and nobody else."""
    wide = [
        value.double() if isinstance(value, Tensor) else _full(value, device) for value in values
    ]
    together = torch.stack(wide)
    work = dist.all_reduce(
        together, dist.ReduceOp.MAX if what == "max" else dist.ReduceOp.SUM, group, async_op=True
    )

    def arrived() -> list[Tensor]:
        work.wait()
        return list(together if what == "max" else together / dist.get_world_size(group))

    return arrived


def _full(value: float, device: torch.device) -> Tensor:
    return torch.full((), value, dtype=torch.float64, device=device)
