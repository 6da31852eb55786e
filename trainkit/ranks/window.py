"""A window on several ranks, and the wrappers that average its gradients.

PyTorch's wrappers average gradients over ranks. A step tells them which backward is the last of a
window, so that gradients are reduced once, and averages the weights of the window itself.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from trainkit.core.plan import Plan, check
from trainkit.core.window import Size, Weight, Window, power_of_two_near
from trainkit.ranks.collectives import all_gather_ints
from trainkit.ranks.ddp import Replica
from trainkit.ranks.fsdp import Unsharded, groups_of, modules_of, reduce_sums, set_reducing


class Ranks:
    """The wrappers in the modules of a plan, at any depth: a surrounding of every micro-batch."""

    def __init__(self, step: Any, plan: Plan, device: torch.device) -> None:
        modules = list(nn.ModuleList(plan.modules).modules())
        self.step, self.device = step, device
        self.replicas = [Replica(m) for m in modules if isinstance(m, DistributedDataParallel)]
        self.fsdp1 = modules_of(modules, "FullyShardedDataParallel")
        self.fsdp2 = modules_of(modules, "FSDPModule")
        self.unsharded = [Unsharded(p) for g in groups_of(self.fsdp2) for p in g.fsdp_params]
        self.is_wrapped = bool(self.replicas or self.fsdp1 or self.fsdp2)
        has_batch_norm = any(isinstance(module, nn.SyncBatchNorm) for module in modules)
        self.is_joint = bool(self.fsdp1 or has_batch_norm or has_shards(plan))
        meshes = [] if self.replicas else [g.mesh_info.mesh for g in groups_of(self.fsdp2)]
        self.group = self.replicas[0].module.process_group if self.replicas else None
        if meshes and meshes[0].ndim == 1:  # with two dimensions, all ranks belong to it
            self.group = meshes[0].get_group()
        self.size = dist.get_world_size(self.group)
        # The number of ranks whose gradients the wrappers average.
        self.averaged = meshes[0].size() if meshes else self.size if self.is_wrapped else 1
        buckets = any(replica.module.gradient_as_bucket_view for replica in self.replicas)
        self.can_watch = not (buckets or self.fsdp1 or self.fsdp2)  # wrappers move gradients
        self.closes = False  # whether this micro-batch reduces gradients

    @contextmanager
    def around_step(self) -> Iterator[None]:
        """Reduce gradients in this micro-batch only if it closes a window."""
        self.closes = closes = self.step._closes()
        with ExitStack() as stack:
            for replica in self.replicas:
                replica.enter(closes, stack)
            for module in () if closes else self.fsdp1:
                stack.enter_context(module.no_sync())
            set_reducing(closes, self.fsdp2, stack)
            yield

    def all_reduce(self, *numbers: Weight, by: Any = dist.ReduceOp.SUM) -> tuple[Tensor, Any]:
        """Begin to reduce numbers over ranks, in float64 and one collective.

        The result is ready after ``wait()``. On an accelerator the stream waits, not the host.
        """
        # torch.full, because copying a tensor of Python floats to an accelerator would wait.
        kind: Any = {"dtype": torch.float64, "device": self.device}
        wide = [
            n.to(**kind) if isinstance(n, Tensor) else torch.full((), n, **kind) for n in numbers
        ]
        reduced = torch.stack(wide)
        return reduced, dist.all_reduce(reduced, by, self.group, async_op=True)


class RankedWindow(Window):
    """A window whose gradients and weights are averaged over ranks.

    One collective per window averages the sum of the weights and the number of micro-batches. It
    begins before the last backward, which hides it.
    """

    kept = (*Window.kept, "absent")  # type: ignore[assignment]

    def __init__(
        self, ranks: Ranks, length: float, reference: Weight | None, is_sum: bool = False
    ) -> None:
        super().__init__(length, reference, is_sum)
        self.ranks, self.can_watch = ranks, ranks.can_watch
        self.can_save = not (ranks.fsdp1 or ranks.fsdp2)
        self.absent = 0.0  # micro-batches that a rank lacks, on average
        # The sum of the weights and the number of micro-batches, summed over ranks; their means.
        self._reduced: tuple[Tensor, Any] | None = None
        self._means: Tensor | None = None
        self._is_reduced = False  # by step.close()

    def share(self, weight: Weight | None, size: Size = 1) -> Weight:
        """Return the share of a loss, 0 on a rank that has no batch. Begin to average weights."""
        ranks = self.ranks
        if weight is not None and self.reference is None and not self.is_sum and ranks.size > 1:
            largest, work = ranks.all_reduce(weight, by=dist.ReduceOp.MAX)
            work.wait()
            self.reference = power_of_two_near(largest[0])
        share, (is_filler, absent) = super().share(weight, size), self._place(size)
        may_differ = self.weighted or ranks.step._delivery.is_last
        if ranks.closes and ranks.size > 1 and may_differ:
            counted = 0.0 if is_filler else float(size) if weight is None else weight
            count = float(self.size + size) - self.absent - absent
            self._reduced = ranks.all_reduce(super().total() + counted, count)
        return 0.0 if is_filler else share

    def add(self, loss: Tensor, weight: Weight | None, size: Size = 1) -> None:
        """Count a micro-batch, with weight 0 on a rank that has no batch."""
        is_filler, absent = self._place(size)
        self.absent += absent
        super().add(loss, 0.0 if is_filler else weight, size)

    def _place(self, size: Size) -> tuple[bool, float]:
        """Return whether this rank has no batch, and the share of ranks without one times size."""
        delivery = self.ranks.step._delivery
        return size == 0 or delivery.is_filler, (1.0 - delivery.present) * float(size)

    def total(self) -> Weight:
        """Return the sum of the weights, averaged over ranks once the window is complete."""
        return super().total() if self._means is None else self._means[0]

    def divisor(self) -> Weight:
        """Return the number by which the sums are still to be divided."""
        if self.is_sum:
            return 1.0 / self.ranks.averaged
        return super().divisor() if self.weighted else self._count() / self.parts

    def next_reference(self) -> Weight | None:
        """Return the reference for the next window, the same on all ranks."""
        if not self.weighted or self.reference is None:
            return self.reference
        return power_of_two_near(self.total() / self._count(), self.reference / 2, self.reference)

    def _count(self) -> Weight:
        return float(self.size) - self.absent if self._means is None else self._means[1]

    def lend(self, parameters: list[nn.Parameter]) -> None:
        """Lend the sums for a backward; RuntimeError if its gradients would not be reduced."""
        for replica in self.ranks.replicas:
            replica.before_backward()
        self._lend(parameters)

    def _lend(self, parameters: list[nn.Parameter]) -> None:
        everything: list[Any] = [*parameters, *self.ranks.unsharded]
        super().lend(everything)
        for i in range(len(parameters), len(everything)):
            if self.lent[i]:  # FSDP2 frees its sums one by one while it reduces them
                self.sums[i] = None

    def take(self) -> None:
        """Take the sums. FSDP1 reads its sums in ``.grad``: they stay there."""
        if self.ranks.fsdp1:
            return
        super().take()
        # After a reduction the sums may be views of buckets, which any other backward overwrites.
        if any(r.module.gradient_as_bucket_view and not r.may_wait for r in self.ranks.replicas):
            self.sums = [None if total is None else total.clone() for total in self.sums]

    def reduce(self, parameters: list[nn.Parameter]) -> bool:
        """Reduce the sums of an open window. Return whether any rank has an open window.

        RuntimeError, before anything is changed, for sums that only a backward can reduce.
        """
        ranks = self.ranks
        replicas = ranks.replicas if ranks.size > 1 else []
        replicated = [p for replica in replicas for p in replica.named_parameters().values()]
        sums = dict(zip(map(id, self.parameters), self.sums, strict=True))
        reduced: list[Any] = [*replicated, *ranks.unsharded]
        own = [sums.get(id(p)) if p.requires_grad else None for p in reduced]
        kinds = [0 if total is None else 1 + total.is_sparse for total in own]
        told = all_gather_ints(ranks.group, bool(self.losses), self.weighted, *kinds)
        is_open, is_weighted, *kinds = told.amax(0).tolist()
        if not is_open or ranks.step._yields:
            return bool(is_open)
        is_even = bool((told == told[0])[:, 2 + len(replicated) :].all())
        can = is_even and 2 not in kinds and (ranks.size == 1 or not ranks.fsdp1)
        late = "step.close() cannot reduce sparse gradients, FSDP1's, or FSDP2's that a rank lacks"
        remedy = "`step.last(batch)`, or the end of `step.over(loader)`"
        check(can, RuntimeError, f"{late}: {remedy}")
        ranks.step._running.lent = self  # an error from here on drops the window
        self._lend(parameters)
        reduce_sums(ranks.fsdp2)
        for parameter in itertools.compress(replicated, kinds):
            total = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parameter.grad = (total.detach() / ranks.size).contiguous()
            dist.all_reduce(parameter.grad, group=ranks.group)
        self.weighted = bool(is_weighted)
        if not self.losses:
            super().add(torch.zeros((), device=ranks.device), 0.0, 0)
        self._reduced = ranks.all_reduce(super().total(), self._count())
        self._is_reduced = True
        return True

    def close(self, parameters: list[nn.Parameter]) -> list[Tensor]:
        """Lend the reduced sums for the update, and return them.

        RuntimeError if the last backward did not reduce them.
        """
        ranks = self.ranks
        self._lend(parameters)
        lent = list(itertools.compress(self.parameters, self.lent))
        is_late = not ranks.closes or any(replica.has_missed(lent) for replica in ranks.replicas)
        is_late = is_late and ranks.size > 1 and not self._is_reduced
        is_late = is_late or any(parameter.grad is not None for parameter in ranks.unsharded)
        fault = "gradients of this window were not reduced over ranks"
        remedy = "call the wrapped module in its last micro-batch, and `next(loader)` outside of it"
        check(not is_late, RuntimeError, f"{fault}: {remedy}")
        for replica in ranks.replicas:
            replica.may_wait, replica.reduces = True, None
        if self._reduced is not None:
            reduced, work = self._reduced
            work.wait()
            self._means = reduced / ranks.size
        return super().close(parameters)

    def drop(self) -> None:
        """Forget the sums, and what a failed backward left."""
        super().drop()
        for module in self.ranks.fsdp2:
            # Otherwise FSDP2 counts the next backward as a part of this one, and never reduces.
            module._get_fsdp_state()._state_ctx.post_backward_final_callback_queued = False

    def copied_sums(self) -> dict[int, Tensor]:
        """Return copies of the sums; RuntimeError if FSDP keeps them."""
        kept = "FSDP keeps the gradients of an open window, which no state can hold"
        remedy = "`step.close()` before `step.state_dict()` and before the end of `resumable`"
        check(self.can_save, RuntimeError, f"{kept}: {remedy}")
        return super().copied_sums()


def has_shards(plan: Plan) -> bool:
    """Return whether parameters are sharded, by a wrapper or by hand."""
    return any(hasattr(parameter, "full_tensor") for parameter in plan.parameters())
