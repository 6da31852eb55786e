"""The update: the one place where the gradients of a window become new parameters.

Every correction that a gradient needs is one scalar: the loss scale, the weights of the window, the
clip coefficient. Their product is applied once, where gradients are read anyway: in the kernel of a
fused optimizer, or in a single multiplication before any other optimizer steps.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trainkit.core.fused import can_fuse, seed_momentum, step_all, total_norm
from trainkit.core.plan import Plan
from trainkit.core.window import Weight, Window


class Answer:
    """A number on its way from the device. A CPU has it at once; an accelerator starts a copy."""

    def __init__(self, number: Any) -> None:
        self._number, self._event = number, None
        if isinstance(number, Tensor) and number.device.type in ("cuda", "xpu"):
            self._number = number.to("cpu", non_blocking=True)
            self._event = torch.Event(number.device)
            self._event.record()

    def known(self) -> bool:
        """Return whether the number has arrived, without waiting for it."""
        return self._event is None or self._event.query()

    def read(self) -> Any:
        """Return the number, waiting for the copy if necessary."""
        if self._event is not None:
            self._event.synchronize()
        return self._number


class Verdict(NamedTuple):
    """What became of a window."""

    skipped: bool | Tensor  # a 0-d float32 tensor, 1.0 for True, where only the device knows
    found_inf: Tensor | None = None  # 0-d float32, 1.0 if the norm is not finite; None without one
    norm: Tensor | None = None  # 0-d, of the true gradients before clipping


Apply = Callable[[], Any] | None


class Updater:
    """``GradScaler`` and ``clip_grad_norm_`` in one, for any precision and several optimizers."""

    skips: int  # in a row
    uncounted: list[Tensor]  # verdicts on the last updates, until their skips are counted
    pending: Answer | None  # verdicts on their way

    def __init__(self, plan: Plan, is_scaled: bool) -> None:
        device, precision = plan.parameters()[0].device, plan.precision
        self.plan = plan
        self.checks_norm = precision is not None or plan.max_norm is not None
        self.max_norm = float(plan.max_norm or math.inf)
        # Made once: torch would make a tensor of a Python number again in every operation.
        self.zero, self.one, self.infinity, self.clip, self.epsilon = (
            torch.full((), value, dtype=torch.float32, device=device)
            for value in (0.0, 1.0, math.inf, self.max_norm, 1e-6 / self.max_norm)
        )
        self.scale: Tensor | None = None
        if precision is not None and is_scaled:
            self.scale = torch.full_like(self.zero, precision.init_scale)
            self.growth = torch.zeros((), dtype=torch.int32, device=device)
        self.max_skips = plan.max_skips or 25
        self.lag = 0  # in updates: all ranks read the number of skips so late, at the same update
        self.reset_skips()

    def seed(self, loss: Tensor, share: Weight) -> Tensor:
        """Return what backward starts from in place of 1: the share, times the loss scale.

        Always a new tensor: the gradient of a parameter of one element may take its memory.
        """
        if self.scale is not None:  # in float32: 65,536 is inf in float16, a third of it is not
            wide = torch.promote_types(loss.dtype, torch.float32)
            share = self.scale.to(loss.device, wide) * share
            return share.to(loss.device, loss.dtype)
        if isinstance(share, Tensor):
            return share.to(loss.device, loss.dtype, copy=True)
        return torch.full_like(loss, share)

    def decide(self, window: Window, gradients: list[Tensor], code: Apply) -> tuple[Verdict, Apply]:
        """Return the verdict on a complete window, and what applies it; None if it is skipped.

        ``code`` is the update code of a step function, which finds true gradients in ``.grad``.
        Fused optimizers never wait for the device; otherwise there is one wait.
        """
        optimizers, empty = self.plan.optimizers, window.is_empty()
        if empty is True:
            return Verdict(True), None
        seed_momentum(optimizers)
        divisor = window.divisor()
        if self.scale is not None:
            divisor = _times(divisor, self.scale)
        norm = found_inf = None
        has_graph = any(map(requires_grad, gradients))  # of ``backward(create_graph=True)``
        if self.checks_norm:
            seen = [gradient.detach() for gradient in gradients] if has_graph else gradients
            scaled = total_norm(seen, self.plan.norm_type, self.zero)
            found_inf = torch.where(scaled < self.infinity, self.zero, self.one)  # 1 for a nan
            norm = scaled / divisor if isinstance(divisor, Tensor) or divisor != 1.0 else scaled
        if code is None and window.can_fuse and not has_graph and can_fuse(optimizers, gradients):
            inputs = self._kernel_inputs(divisor, norm, found_inf, empty)
            verdict = Verdict(inputs.get("found_inf", False), found_inf, norm)
            window.narrow()
            return verdict, functools.partial(step_all, optimizers, inputs)
        factor = self._factor(divisor, norm)
        if factor is None:
            return Verdict(True, found_inf, norm), None
        if factor != 1.0 and has_graph:
            for parameter in window.parameters:
                parameter.grad = None if parameter.grad is None else parameter.grad * factor
        elif factor != 1.0 and gradients:
            torch._foreach_mul_(gradients, factor)
        window.narrow()
        return Verdict(False, found_inf, norm), code or functools.partial(step_all, optimizers, {})

    def _kernel_inputs(
        self, divisor: Weight, norm: Tensor | None, found_inf: Tensor | None, empty: bool | Tensor
    ) -> dict[str, Tensor]:
        """Return what fused kernels divide by, and whether they skip."""
        inputs: dict[str, Tensor] = {} if found_inf is None else {"found_inf": found_inf}
        scale = divisor
        if norm is not None and self.max_norm < math.inf:
            # 1 / the coefficient of clip_grad_norm_, which is max_norm / (norm + 1e-6), at most 1.
            clip = torch.maximum(torch.addcdiv(self.epsilon, norm, self.clip), self.one)
            scale = _times(divisor, clip)
        if isinstance(scale, Tensor):
            inputs["grad_scale"] = scale.float()
        elif scale != 1.0:
            inputs["grad_scale"] = torch.full_like(self.zero, scale)
        if isinstance(empty, Tensor):  # the maximum, since kernels compare found_inf with 1
            inputs["found_inf"] = torch.maximum(inputs.get("found_inf", self.zero), empty.float())
        return inputs

    def _factor(self, divisor: Weight, norm: Tensor | None) -> float | None:
        """Return the number that makes gradients true and clipped; None to skip. The one wait."""
        if norm is None:
            value, by = 0.0, float(divisor)
        elif isinstance(divisor, Tensor):
            value, by = torch.stack([norm, divisor.to(norm)]).tolist()
        else:
            value, by = norm.item(), divisor
        if not (value < math.inf and 0 < by < math.inf):
            return None
        return min(1.0, self.max_norm / (value + 1e-6)) / by

    def learn(self, found_inf: Tensor) -> int:
        """Move the loss scale. Return the number of skips in a row if it is too high, else 0.

        The loss scale moves by the rule of ``GradScaler``: halved by an overflow, doubled after
        ``growth_interval`` updates without one. Skips are counted when there may be too many. Only
        several ranks wait.

        Source: Micikevicius et al. 2018, https://arxiv.org/abs/1710.03740
        """
        if self.scale is not None and self.plan.precision is not None:
            interval = self.plan.precision.growth_interval
            torch._amp_update_scale_(self.scale, self.growth, found_inf, 2.0, 0.5, interval)
        self.uncounted.append(found_inf)
        if self.pending is None and len(self.uncounted) >= min(self.max_skips - self.skips, 256):
            self.pending, self.uncounted = Answer(torch.stack(self.uncounted)), []
        pending, count = self.pending, len(self.uncounted)
        if pending is None or count < self.lag or not (self.lag or pending.known()):
            return 0
        skips = pending.read().tolist()
        self.skips = self.skips + len(skips) if all(skips) else skips[::-1].index(0.0)
        self.pending = None
        return self.skips if self.skips >= self.max_skips else 0

    def reset_skips(self) -> None:
        """Forget the skips so far."""
        self.skips, self.uncounted, self.pending = 0, [], None


requires_grad = operator.attrgetter("requires_grad")


def _times(divisor: Weight, factor: Tensor) -> Tensor:
    """Multiply, without an operation where the divisor is known to be 1."""
    return factor * divisor if isinstance(divisor, Tensor) or divisor != 1.0 else factor
