"""What a step looks at before it runs into it: plans that cannot work, and parameters that cannot be trained as they ask."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from trainkit.core.plan import Plan
from trainkit.core.warning import warn
from trainkit.ranks.parallel import Wrappers


def refuse_plan(plan: Plan, ranks: int, wrappers: Wrappers, by_hand: bool) -> None:
    """Raises ValueError for a plan that cannot work: what is known only once the parameters are where they will be trained."""
    parameters = plan.parameters()
    if not parameters:
        raise ValueError(
            "nothing in this plan knows the parameters: give an optimizer, `train_step(optimizer, ...)` or `amp(optimizer)`, or "
            "the module, `accumulate(4, module=model)`"
        )
    if plan.chunk is not None and by_hand:
        raise ValueError(
            "microbatch cuts the arguments of a step function, and a block by hand has none: decorate a function, "
            "`train_step(optimizer, microbatch(8))(function)`"
        )
    if ranks > 1 and not wrappers.found and not any(hasattr(p, "full_tensor") for p in parameters):
        raise ValueError(
            f"{ranks} ranks run, and would each train a model of their own: give the module that is wrapped in "
            "DistributedDataParallel or FSDP2, `train_step(..., module=ddp_model)`"
        )
    if any(getattr(parameter, "_post_accumulate_grad_hooks", None) for parameter in parameters):
        raise ValueError(
            "parameters have post-accumulate-gradient hooks, as for an optimizer that steps within backward: these see "
            "gradients that are scaled and incomplete. Remove them, `handle.remove()`, and leave the update to the step; "
            "hooks that only look are those of `parameter.register_hook`"
        )
    looks = plan.precision is not None or plan.max_norm is not None
    if plan.max_skips is not None and not looks:
        raise ValueError(
            "max_skips counts gradients that are not finite, and nothing here looks: add `max_norm=math.inf`"
        )
    if plan.sum_dtype is not None and (wrappers.found or not hasattr(parameters[0], "grad_dtype")):
        raise ValueError(
            "accumulate(dtype=torch.float32) is for one process, and for a torch whose tensors have a `grad_dtype`: keep "
            "parameters in float32, `model.float()`, and compute in half precision, `amp(dtype=torch.bfloat16)`"
        )
    if looks and ranks > 1 and wrappers.shard_norms:
        raise ValueError(
            "FullyShardedDataParallel leaves each rank a part of the gradients, and their norm and verdict would be that of "
            "the part: wrap with FSDP2, `torch.distributed.fsdp.fully_shard(model)`"
        )


def refuse_float16(parameters: Sequence[nn.Parameter]) -> None:
    """Raises ValueError where float16 parameters would be trained under a loss scale."""
    shapes = [tuple(p.shape) for p in parameters if p.dtype == torch.float16 and p.requires_grad]
    if shapes:
        raise ValueError(
            f"{len(shapes)} of {len(parameters)} parameters are float16 themselves (first of shape {shapes[0]}), and their "
            "gradients cannot be unscaled; amp keeps parameters in float32 and casts in forward: load the model with "
            "`dtype=torch.float32`, or call `model.float()` before the optimizer is made"
        )


def keep_casts_fresh(
    parameters_by_optimizer: Iterable[Sequence[nn.Parameter]],
) -> list[nn.Parameter]:
    """Has autocast forget its copies of the weights whenever a gradient of them is taken; returns those that it is told by.

    Along it a step function may move them, between two forwards of a micro-batch, as SAM does (Foret et al. 2021,
    https://arxiv.org/abs/2010.01412); and the second forward would use copies of what they were. The last weight that is
    trained stands for all of an optimizer: a hook for each would cost as much as backward through a small layer.
    """
    found = []
    for parameters in parameters_by_optimizer:
        weight = next((p for p in reversed(parameters) if p.requires_grad and p.dim() > 1), None)
        if weight is not None:
            found.append(weight)
            if _drop_casts not in (weight._backward_hooks or {}).values():
                weight.register_hook(_drop_casts)  # type: ignore[no-untyped-call]
    return found


def _drop_casts(gradient: Tensor) -> None:
    torch.clear_autocast_cache()


def warn_of_missing(gradients: Sequence[Tensor], parameters: Sequence[nn.Parameter]) -> None:
    """Warns where most parameters take no part in the loss: torch says it vaguely, or not at all."""
    trainable = sum(p.requires_grad for p in parameters)
    if trainable and not gradients:
        warn(
            f"none of {trainable} trainable parameters got a gradient, and nothing is learned: the loss is of other "
            "ones, as where a model was copied or made again after its optimizer; make the optimizer last"
        )
    elif 2 * len(gradients) < trainable:
        warn(
            f"only {len(gradients)} of {trainable} trainable parameters got a gradient in the first window; if layers below the "
            "others are frozen, this is what reentrant activation checkpointing does: use `use_reentrant=False`"
        )


def not_finite(plan: Plan) -> str:
    """The first parameters whose gradients are not finite, in words."""
    names = {id(p): f"{name!r}" for module in plan.modules for name, p in module.named_parameters()}
    for optimizer in plan.optimizers:
        for g, group in enumerate(optimizer.param_groups):
            for i, parameter in enumerate(group["params"]):
                given = group["param_names"][i] if "param_names" in group else ""
                place = f"params[{i}] of param_groups[{g}] of {type(optimizer).__name__} with shape {tuple(parameter.shape)}"
                names.setdefault(id(parameter), repr(given) if given else place)
    bad = [p for p in plan.parameters() if p.grad is not None and not _is_finite(p.grad)]
    if not bad:
        return "each entry here is, but their norm is not"
    first = ", ".join(
        names[id(p)] + ("" if _is_finite(p) else " (which is not finite itself)") for p in bad[:3]
    )
    return f"those of {len(bad)} of {len(plan.parameters())} parameters, first {first}"


def _is_finite(tensor: Tensor) -> bool:
    here = (
        tensor.to_local() if hasattr(tensor, "to_local") else tensor
    )  # what other ranks have, they say themselves
    here = here.coalesce().values() if here.is_sparse else here
    return bool(here.isfinite().all())
