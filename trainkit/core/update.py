"""The update: the one place where gradients become new parameters.

Every correction that a gradient needs is one scalar: the loss scale, the weight of the window, the clip coefficient. None of
them is applied in turn. Their product waits as one *divisor* and is applied where the gradients are read anyway: inside the
kernel of a fused optimizer, or in a single multiplication just before any other optimizer steps.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer

# Private in torch, so guarded: without them the same is done tensor by tensor.
_foreach_norm = getattr(torch, "_foreach_norm", None)
_foreach_mul_ = getattr(torch, "_foreach_mul_", None)
try:
    from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks
except ImportError:  # then nobody can say that there are none
    _global_optimizer_pre_hooks = _global_optimizer_post_hooks = {0: NotImplemented}  # type: ignore[assignment]


class Check:
    """What is asked of gradients before they are used: a finite norm, and no more than ``max_norm`` of it."""

    def __init__(self, max_norm: float, norm_type: float, device: torch.device) -> None:
        self.max_norm = max_norm
        self.norm_type = norm_type
        self.device = device
        # With Python numbers torch would make such tensors in every operation anew, and that costs more than the operation.
        self.zero, self.one, self._infinity, self._max_norm, self._epsilon = (
            torch.full((), value, dtype=torch.float32, device=device)
            for value in (0.0, 1.0, math.inf, max_norm, 1e-6 / max_norm)
        )

    def norm(self, gradients: Sequence[Tensor]) -> Tensor:
        """The norm of all gradients as one vector, accumulated in float32 or wider; 0-d.

        ``torch.nn.utils.get_total_norm`` rounds that of bfloat16 gradients to three digits, of float16 to inf above 65504.
        """
        meshes: list[Any] = []
        dtypes = {g.dtype for g in gradients}
        wide = functools.reduce(torch.promote_types, dtypes, torch.float32)
        if self.norm_type == math.inf:
            # Nothing has no maximum, and of a sharded gradient a rank may have nothing.
            meshes = list(
                {
                    id(g.device_mesh): g.device_mesh for g in gradients if hasattr(g, "device_mesh")
                }.values()
            )
            gradients = [
                part
                for part in (g.to_local() if hasattr(g, "to_local") else g for g in gradients)
                if part.numel()
            ]
        if not gradients:
            norms = [self.zero.to(wide)]
        elif (
            _foreach_norm is not None
            and not wide.is_complex
            and {g.layout for g in gradients} == {torch.strided}
        ):
            norms = _foreach_norm(
                gradients,
                self.norm_type,
                None if dtypes <= {torch.float32, torch.float64} else wide,
            )
        else:
            norms = [
                torch.linalg.vector_norm(_entries(g), self.norm_type, dtype=wide.to_real())
                for g in gradients
            ]
        if {g.device for g in gradients} != {self.device}:
            norms = [norm.to(self.device) for norm in norms]
        together: Tensor = torch.linalg.vector_norm(torch.stack(norms), self.norm_type)
        for mesh in meshes:
            together = _maximum_over(mesh, together)
        if hasattr(
            together, "full_tensor"
        ):  # of the shards that FSDP2 has on each rank, the norm of all
            together = together.full_tensor()
        return together

    def not_finite(self, norm: Tensor) -> Tensor:
        """0-d float32: 1 for an infinite norm or a nan, else 0."""
        return torch.where(norm < self._infinity, self.zero, self.one)  # a nan compares false

    def inverse_clip(self, norm: Tensor) -> Tensor:
        """1 / the coefficient of ``clip_grad_norm_``, which is ``max_norm / (norm + 1e-6)`` where that is below 1."""
        return torch.maximum(torch.addcdiv(self._epsilon, norm, self._max_norm), self.one)


def _maximum_over(mesh: Any, norm: Tensor) -> Tensor:
    """The largest of the norms that ranks have of their shards."""
    from torch.distributed.tensor import DTensor, Partial

    norm = torch.where(norm.isnan(), math.inf, norm)  # a nan is not found by comparing
    return DTensor.from_local(norm, mesh, [Partial("max")] * mesh.ndim).full_tensor()


def _entries(gradient: Tensor) -> Tensor:
    """What the norm of a gradient is taken of, where torch has none for it: real numbers, and each row of a sparse one once."""
    entries = gradient.coalesce().values() if gradient.is_sparse else gradient
    return entries.abs() if entries.is_complex() else entries


class Outcome(NamedTuple):
    """What became of a window.

    ``skipped``: a bool where it is known, else a 0-d float32 tensor, 1.0 for a skipped update. ``found_inf``: such a tensor, 1.0
    for gradients that are not finite; ``norm``: 0-d, of the true gradients before clipping; both None where no norm was taken.
    """

    skipped: bool | Tensor
    found_inf: Tensor | None = None
    norm: Tensor | None = None


def weigh(
    gradients: Sequence[Tensor], divisor: float | Tensor, check: Check | None, empty: bool | Tensor
) -> tuple[Outcome, Tensor | None]:
    """What ``step_all`` will make of gradients / divisor, and what its kernels divide by: that, clipped; None for 1.

    Never waits for the device. ``empty``: whether nothing in the window had a weight; a 0-d bool tensor where only the device
    knows, and else False.
    """
    grad_scale = divisor
    skipped = found_inf = norm = None
    if check is not None:
        scaled_norm = check.norm(gradients)
        skipped = found_inf = check.not_finite(scaled_norm)
        norm = _divided(scaled_norm, divisor)
        if check.max_norm < math.inf:
            grad_scale = times(divisor, check.inverse_clip(norm))
    if isinstance(empty, Tensor):
        skipped = empty.float() if found_inf is None else torch.maximum(found_inf, empty.float())
    if not isinstance(grad_scale, Tensor) and grad_scale != 1.0:
        grad_scale = torch.full((), grad_scale, device=gradients[0].device)
    outcome = Outcome(False if skipped is None else skipped, found_inf, norm)
    return outcome, grad_scale.float() if isinstance(grad_scale, Tensor) else None


def step_all(
    optimizers: Sequence[Optimizer],
    skipped: bool | Tensor = False,
    grad_scale: Tensor | None = None,
) -> None:
    """Steps optimizers; those that ``can_fuse`` with gradients / grad_scale, or not at all where ``skipped`` is 1.

    With ``weigh`` equivalent to ``unscale_``, ``clip_grad_norm_`` and ``step``, in two reads and one write of the gradients: the
    norm reads them, and the kernel, on its own read, divides by ``optimizer.grad_scale``, or returns at once where
    ``optimizer.found_inf`` is 1. Nothing waits for the device. Who calls it calls ``forget_scale`` after it, however it ended.
    """
    for optimizer in optimizers:
        if grad_scale is not None:
            optimizer.grad_scale = grad_scale  # type: ignore[attr-defined]
        if isinstance(skipped, Tensor):
            optimizer.found_inf = skipped  # type: ignore[attr-defined]
        optimizer.step()


def forget_scale(optimizers: Sequence[Optimizer]) -> None:
    """Takes back what ``step_all`` told optimizers: left behind, even as None, it would make the next GradScaler.step raise."""
    for optimizer in optimizers:
        optimizer.__dict__.pop("grad_scale", None)
        optimizer.__dict__.pop("found_inf", None)


def make_true(gradients: Sequence[Tensor], divisor: float | Tensor, check: Check | None) -> Outcome:
    """Makes gradients unscaled, normalised and clipped, in place, with one multiplication; none where the product is 1.

    Waits for the device once, where the verdict lies there. Gradients of a skipped update are left as they are.
    """
    found_inf = norm = None
    if check is None:
        norm_value, divisor_value = 0.0, float(divisor)
    else:
        scaled_norm = check.norm(gradients)
        norm = _divided(scaled_norm, divisor)
        if isinstance(divisor, Tensor):
            found_inf = check.not_finite(scaled_norm)
            norm_value, divisor_value = torch.stack([norm, divisor.to(norm)]).tolist()
        else:
            norm_value, divisor_value = norm.item(), divisor
            found_inf = check.zero if norm_value < math.inf else check.one
    if not (norm_value < math.inf and 0 < divisor_value < math.inf):
        return Outcome(True, found_inf, norm)
    clip = 1.0 if check is None else min(1.0, check.max_norm / (norm_value + 1e-6))
    if clip != divisor_value and gradients:
        _multiply(gradients, clip / divisor_value)
    return Outcome(False, found_inf, norm)


def can_fuse(optimizers: Sequence[Optimizer], gradients: Sequence[Tensor]) -> bool:
    """Whether ``step_all`` is exact for these optimizers as they are now; asked before every update.

    ``_step_supports_amp_scaling`` is no answer: wrappers pass it on and ignore ``grad_scale``, and loading a state leaves it
    as it was. float64 gradients are refused because the kernels read ``grad_scale`` as float32, and shared parameters because
    they write back what they divided, and the second kernel would divide again.
    """
    return (
        bool(gradients)
        and torch.float64 not in {g.dtype for g in gradients}
        and all(map(_is_fused, optimizers))
        and (len(optimizers) == 1 or not _share_parameters(optimizers))
    )


def _share_parameters(optimizers: Sequence[Optimizer]) -> bool:
    owned = [
        id(p)
        for optimizer in optimizers
        for group in optimizer.param_groups
        for p in group["params"]
    ]
    return len(set(owned)) < len(owned)


def _is_fused(optimizer: Optimizer) -> bool:
    if type(optimizer) not in (Adam, AdamW, SGD, Adagrad):
        return False
    for group in optimizer.param_groups:
        # What dampening means for a first step, seed_momentum cannot say.
        if group.get("fused") is not True or (group.get("momentum") and group["dampening"]):
            return False
    # A hook around the step, or somebody's own step, would see gradients that are still scaled, and run after a skipped
    # update. What a learning-rate scheduler puts in place of step only counts calls.
    hooks = (
        _global_optimizer_pre_hooks,
        _global_optimizer_post_hooks,
        optimizer._optimizer_step_pre_hooks,
        optimizer._optimizer_step_post_hooks,
    )
    step = optimizer.__dict__.get("step")
    return not any(hooks) and (step is None or hasattr(step, "_wrapped_by_lr_sched"))


def seed_momentum(optimizer: Optimizer) -> None:
    """Gives fused SGD the momentum buffers that it lacks, as zeros: from these, ``momentum * 0 + gradient`` is the first step.

    Its kernel is handed uninitialised buffers on a first step, and where found_inf is 1 it leaves them so: the next step makes
    nan of the weights. And it raises where a parameter joins the others later.
    """
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
                f"{len(joining)} of {len(states)} parameters came to fused SGD with momentum and dampening={group['dampening']} "
                "after its first step, which its kernel cannot take: make it with `fused=False`"
            )


def _multiply(gradients: Sequence[Tensor], factor: float) -> None:
    if _foreach_mul_ is not None:
        _foreach_mul_(gradients, factor)
        return
    for gradient in gradients:
        gradient.mul_(factor)


def times(divisor: float | Tensor, factor: Tensor) -> Tensor:
    """Their product, without an operation where the divisor is known to be 1."""
    return factor if not isinstance(divisor, Tensor) and divisor == 1.0 else factor * divisor


def _divided(norm: Tensor, divisor: float | Tensor) -> Tensor:
    return norm if not isinstance(divisor, Tensor) and divisor == 1.0 else norm / divisor
