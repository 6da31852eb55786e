"""Join a step to several ranks, if torch.distributed is in use."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from trainkit.core.loop import mark_last
from trainkit.core.plan import Plan, check
from trainkit.core.update import Updater
from trainkit.ranks.collectives import all_gather_ints, world_size
from trainkit.ranks.lockstep import lockstep
from trainkit.ranks.window import RankedWindow, Ranks, has_shards


def join(step: Any, updater: Updater) -> tuple[Plan, Callable[..., Iterator[Any]]]:
    """Return the plan of a step on several ranks, and its way to read a loader in ``over``.

    Raises:
        ValueError: for a plan that does not work on several ranks.
    """
    plan, deliver = step._plan, step._deliver
    if (joined := _ranks_of(plan)) is not None:  # the step that this one was made from had joined
        others = tuple(part for part in plan.surroundings if part is not joined)
        plan = replace(plan, surroundings=others, window=None)
    ranks = Ranks(step, plan, updater.zero.device)
    if ranks.size == 1 and not ranks.is_wrapped:
        return plan, deliver
    alone = f"each of {ranks.size} ranks would train its own model: give the wrapped one"
    is_shared = ranks.is_wrapped or has_shards(plan)
    check(is_shared, ValueError, f"{alone}, `train_step(..., module=ddp_model)`")
    single = "accumulate(dtype=torch.float32) is for one process: `model.float()` and `amp()`"
    check(plan.window is None, ValueError, single)
    is_partial = ranks.size > 1 and updater.checks_norm and bool(ranks.fsdp1)
    part = "under FullyShardedDataParallel a rank would clip and check a part of the gradients"
    check(not is_partial, ValueError, f"{part}: `fully_shard(model)`")
    if world_size() > 1 and ranks.device.type != "cpu":
        updater.lag = 16
    if ranks.size > 1 and deliver is mark_last:
        deliver = functools.partial(
            lockstep,
            window_length=lambda: step._new_window().length,
            exchange=functools.partial(all_gather_ints, ranks.group),
        )
    window = functools.partial(RankedWindow, ranks)
    return replace(plan, surroundings=(*plan.surroundings, ranks), window=window), deliver


def group_of(plan: Plan) -> tuple[Any, bool]:
    """Return the group of ranks that average gradients, and whether forwards need all of them.

    The group is None for the default one. Forwards need all ranks under FSDP, for example.
    """
    if (ranks := _ranks_of(plan)) is None:
        return None, has_shards(plan)
    return ranks.group, ranks.is_joint or not all(replica.may_wait for replica in ranks.replicas)


def _ranks_of(plan: Plan) -> Ranks | None:
    return next((part for part in plan.surroundings if isinstance(part, Ranks)), None)
