"""Optimizers and gradients: which kernels divide gradients themselves, steps, and norms."""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adagrad, Adam, AdamW
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from trainkit.core.plan import parameters_of


def step_all(optimizers: Sequence[Any], inputs: dict[str, Tensor]) -> None:
    """Step the optimizers. Call ``forget`` afterwards.

    Fused kernels read ``inputs``: they divide gradients by ``grad_scale`` where they read them, and
    return at once where ``found_inf`` is 1.
    """
    for optimizer in optimizers:
        if inputs:
            vars(optimizer).update(inputs)
        optimizer.step()


def forget(optimizers: Sequence[Any]) -> None:
    """Remove the inputs of ``step_all``, which would make the next GradScaler.step raise."""
    for optimizer in optimizers:
        if type(optimizer) in _HAVE_FUSED:  # another may keep something under these names
            vars(optimizer).pop("grad_scale", None)
            vars(optimizer).pop("found_inf", None)


_HAVE_FUSED = Adam, AdamW, SGD, Adagrad


def can_fuse(optimizers: Sequence[Any], gradients: Sequence[Tensor]) -> bool:
    """Return whether the kernels of all optimizers may divide these gradients.

    ``_step_supports_amp_scaling`` does not tell: wrappers pass it on and ignore ``grad_scale``, and
    loading a state leaves it unchanged. Kernels read ``grad_scale`` in float32, too little for
    float64. And they write back what they divided, so a shared parameter would be divided twice.
    """
    dtypes = set(map(_dtype, gradients))
    if not dtypes or torch.float64 in dtypes or not all(map(_is_fused, optimizers)):
        return False
    if len(optimizers) == 1:
        return True
    owned = [id(p) for optimizer in optimizers for p in parameters_of(optimizer)]
    return len(set(owned)) == len(owned)


def _is_fused(optimizer: Any) -> bool:
    if type(optimizer) not in _HAVE_FUSED:
        return False
    for group in optimizer.param_groups:
        # seed_momentum cannot express what dampening does in a first step.
        if group.get("fused") is not True or (group.get("momentum") and group["dampening"]):
            return False
    # Hooks, and a ``step`` that somebody replaced, would see scaled gradients and run after a skip.
    # The ``step`` that a learning-rate scheduler puts there only counts calls.
    step = vars(optimizer).get("step")
    hooks = itertools.chain(
        _global_optimizer_pre_hooks.values(),
        _global_optimizer_post_hooks.values(),
        optimizer._optimizer_step_pre_hooks.values(),
        optimizer._optimizer_step_post_hooks.values(),
    )
    return (step is None or hasattr(step, "_wrapped_by_lr_sched")) and not any(map(_acts, hooks))


def _acts(hook: Any) -> bool:
    return not hasattr(getattr(hook, "__self__", None), "only_looks")  # the hooks of Evidence do


def seed_momentum(optimizers: Sequence[Any]) -> None:
    """Give fused SGD the momentum buffers that it lacks, as zeros.

    Its kernel gets uninitialised buffers in a first step, and leaves them so if that step is
    skipped: the next step turns the weights into nan. It also raises if a parameter joins later.
    """
    for optimizer in optimizers:
        for group in optimizer.param_groups if isinstance(optimizer, SGD) else ():
            if not (group["momentum"] and group["fused"]):
                continue
            states = {p: optimizer.state[p] for p in group["params"] if p.grad is not None}
            joining = [p for p, state in states.items() if state.get("momentum_buffer") is None]
            if group["dampening"] and 0 < len(joining) < len(states):
                late = f"{len(joining)} of {len(states)} parameters joined after the first step"
                raise ValueError(f"{late} of fused SGD with dampening: `SGD(..., fused=False)`")
            for parameter in () if group["dampening"] else joining:
                states[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def total_norm(gradients: Sequence[Tensor], norm_type: float, zero: Tensor) -> Tensor:
    """Return the norm of all gradients as one vector, 0-d, in float32 or wider.

    ``torch.nn.utils.get_total_norm`` rounds the norm of bfloat16 gradients to three digits, and
    returns inf for float16 above 65,504.
    """
    if "DTensor" in map(_name, map(type, gradients)):
        from trainkit.ranks.fsdp import sharded_norm

        norm: Tensor = sharded_norm(gradients, norm_type, zero)
        return norm
    dtypes = set(map(_dtype, gradients))
    wide = functools.reduce(torch.promote_types, dtypes, torch.float32)
    if wide.is_complex or set(map(_layout, gradients)) != {torch.strided}:  # torch has no norm
        gradients = [g.coalesce().values() if g.is_sparse else g for g in gradients]
        gradients = [g.abs() if g.is_complex() else g for g in gradients]
    if 0 in map(Tensor.numel, gradients) or not gradients:  # the largest of nothing
        gradients = [gradient for gradient in gradients if gradient.numel()] or [zero]
    dtype = None if dtypes <= {torch.float32, torch.float64} else wide.to_real()
    norms: Any = torch._foreach_norm(list(gradients), norm_type, dtype)
    if set(map(_device, norms)) != {zero.device}:
        norms = [norm.to(zero.device) for norm in norms]
    total: Tensor = torch.linalg.vector_norm(torch.stack(norms), norm_type)
    return total


# Read in C: many gradients are looked at before each update.
_dtype, _layout = operator.attrgetter("dtype"), operator.attrgetter("layout")
_device, _name = operator.attrgetter("device"), operator.attrgetter("__name__")
