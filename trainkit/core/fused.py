"""Optimizers: stepping them, which of them divide gradients in their kernels, and gradient norms."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks


def step_all(optimizers: Sequence[Optimizer], told: dict[str, Tensor]) -> None:
    """Step the optimizers. Fused kernels read ``told``: they divide the gradients by ``grad_scale``
    where they read them, and return at once where ``found_inf`` is 1. Call ``forget`` afterwards.
    """
    for optimizer in optimizers:
        vars(optimizer).update(told)
        optimizer.step()


def forget(optimizers: Sequence[Optimizer]) -> None:
    """Remove what ``step_all`` told: left behind, it makes the next GradScaler.step raise."""
    for optimizer in optimizers:
        vars(optimizer).pop("grad_scale", None)
        vars(optimizer).pop("found_inf", None)


def can_fuse(optimizers: Sequence[Optimizer], gradients: Sequence[Tensor]) -> bool:
    """Return whether the kernels of all optimizers may divide these gradients.

    ``_step_supports_amp_scaling`` does not tell: wrappers pass it on and ignore ``grad_scale``, and
    loading a state leaves it unchanged. Kernels read ``grad_scale`` in float32, too little for
    float64. And they write back what they divided, so a shared parameter would be divided twice.
    """
    return (
        bool(gradients)
        and torch.float64 not in {gradient.dtype for gradient in gradients}
        and all(map(_is_fused, optimizers))
        and (len(optimizers) == 1 or not _share_parameters(optimizers))
    )


def _is_fused(optimizer: Optimizer) -> bool:
    if type(optimizer) not in (Adam, AdamW, SGD, Adagrad):
        return False
    for group in optimizer.param_groups:
        # seed_momentum cannot express what dampening does in a first step.
        if group.get("fused") is not True or (group.get("momentum") and group["dampening"]):
            return False
    # Hooks, and a ``step`` that somebody replaced, would see scaled gradients and run after a skip.
    # The ``step`` that a learning-rate scheduler puts there only counts calls.
    step = vars(optimizer).get("step")
    return (step is None or hasattr(step, "_wrapped_by_lr_sched")) and not (
        _global_optimizer_pre_hooks
        or _global_optimizer_post_hooks
        or optimizer._optimizer_step_pre_hooks
        or optimizer._optimizer_step_post_hooks
    )


def _share_parameters(optimizers: Sequence[Optimizer]) -> bool:
    owned = [id(p) for o in optimizers for group in o.param_groups for p in group["params"]]
    return len(set(owned)) < len(owned)


def seed_momentum(optimizers: Sequence[Optimizer]) -> None:
    """Give fused SGD the momentum buffers that it lacks, as zeros.

    Its kernel gets uninitialised buffers in a first step, and leaves them so if that step is
    skipped: the next step turns the weights into nan. It also raises if a parameter joins later.
    """
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            if not (group.get("momentum") and group.get("fused")):
                continue
            states = {p: optimizer.state[p] for p in group["params"] if p.grad is not None}
            joining = [p for p, state in states.items() if state.get("momentum_buffer") is None]
            if not group["dampening"]:
                for parameter in joining:
                    states[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
            elif 0 < len(joining) < len(states):
                raise ValueError(
                    f"{len(joining)} of {len(states)} parameters joined fused SGD with momentum and "
                    f"dampening={group['dampening']} after its first step, and its kernel cannot "
                    "take them: `SGD(..., fused=False)`"
                )


def total_norm(gradients: Sequence[Tensor], norm_type: float, zero: Tensor) -> Tensor:
    """Return the norm of all gradients as one vector, 0-d, in float32 or wider.

    ``torch.nn.utils.get_total_norm`` rounds the norm of bfloat16 gradients to three digits, and
    returns inf for float16 above 65,504.
    """
    if any(hasattr(gradient, "full_tensor") for gradient in gradients):
        from trainkit.ranks.fsdp import sharded_norm

        return sharded_norm(gradients, norm_type, zero)
    dtypes = {gradient.dtype for gradient in gradients}
    wide = functools.reduce(torch.promote_types, dtypes, torch.float32)
    if not gradients:
        return zero
    if wide.is_complex or {gradient.layout for gradient in gradients} != {torch.strided}:
        norms: Any = [_norm(gradient, norm_type, wide.to_real()) for gradient in gradients]
    else:
        if norm_type == float("inf"):  # an empty tensor has no maximum
            gradients = [g for g in gradients if g.numel()] or [zero]
        as_found = dtypes <= {torch.float32, torch.float64}
        norms = torch._foreach_norm(gradients, norm_type, None if as_found else wide)
    if {gradient.device for gradient in gradients} != {zero.device}:
        norms = [norm.to(zero.device) for norm in norms]
    total: Tensor = torch.linalg.vector_norm(torch.stack(norms), norm_type)
    return total


def _norm(gradient: Tensor, norm_type: float, dtype: torch.dtype) -> Tensor:
    """Return the norm of complex or sparse entries, for which torch has none."""
    entries = gradient.coalesce().values() if gradient.is_sparse else gradient
    entries = entries.abs() if entries.is_complex() else entries
    if not entries.numel():
        return torch.zeros((), dtype=dtype, device=entries.device)
    norm: Tensor = torch.linalg.vector_norm(entries, norm_type, dtype=dtype)
    return norm
