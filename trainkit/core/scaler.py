"""The scaler: whether the gradients of a window become an update, and what the next window learns from that."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from trainkit.core.answer import Answer
from trainkit.core.gradients import Gradients
from trainkit.core.plan import Plan
from trainkit.core.precautions import not_finite, warn_of_missing
from trainkit.core.update import (
    Check,
    Outcome,
    can_fuse,
    make_true,
    seed_momentum,
    step_all,
    times,
    weigh,
)
from trainkit.core.window import Window

# Private in torch, so guarded: without it the same is done tensor by tensor.
_amp_update_scale_ = getattr(torch, "_amp_update_scale_", None)


class Scaler:
    """What ``torch.amp.GradScaler`` and ``clip_grad_norm_`` are to a loop, in every precision, and for all optimizers at once.

    ``dtype`` is that of forward. ``loss_scale`` is None where that needs none.
    """

    def __init__(self, plan: Plan, dtype: torch.dtype, ranks: int) -> None:
        self._plan = plan
        self._check: Check | None = None
        self.loss_scale: LossScale | None = None
        device, precision = plan.parameters()[0].device, plan.precision
        self._streak = Streak(
            plan.max_skips or 25, lag=16 if ranks > 1 and device.type != "cpu" else 0
        )
        if precision is not None or plan.max_norm is not None:
            self._check = Check(plan.max_norm or math.inf, plan.norm_type, device)
        if precision is not None and dtype == torch.float16:
            self.loss_scale = LossScale(precision.init_scale, precision.growth_interval, device)

    def seed(self, loss: Tensor, share: float | Tensor) -> Tensor:
        """What backward starts from in place of 1: the micro-batch's share of the window, times the loss scale.

        A new tensor every time, as that 1 is: the gradient of a parameter of one element may come to lie in its memory.
        """
        if self.loss_scale is not None:
            # Wider than the loss may be: 65,536 is inf in float16, a third of it is not.
            wide = torch.promote_types(loss.dtype, torch.float32)
            return (self.loss_scale.value.to(loss.device, wide) * share).to(loss.device, loss.dtype)
        if isinstance(share, Tensor):
            return share.to(loss.device, loss.dtype, copy=True)
        return torch.full_like(loss, share)

    def decide(
        self,
        window: Window,
        gradients: Gradients,
        own_update: Callable[[], None] | None,
        is_first: bool,
    ) -> tuple[Outcome, Callable[[], None] | None]:
        """What becomes of a complete window, and what turns its gradients into an update; None where it is skipped.

        ``own_update``: of a step function that has update code; it finds gradients that are true.
        """
        empty = window.empty()
        if empty is True:
            return Outcome(skipped=True), None
        found, optimizers = gradients.found(), self._plan.optimizers
        if is_first or not found:
            warn_of_missing(found, self._plan.parameters())
        for optimizer in optimizers:
            seed_momentum(optimizer)
        divisor = window.divisor()
        if self.loss_scale is not None:
            divisor = times(divisor, self.loss_scale.value)
        if own_update is None and can_fuse(optimizers, found) and gradients.fit():
            outcome, grad_scale = weigh(found, divisor, self._check, empty)
            gradients.narrow()
            return outcome, functools.partial(step_all, optimizers, outcome.skipped, grad_scale)
        outcome = make_true(found, divisor, self._check)
        if outcome.skipped:
            return outcome, None
        gradients.narrow()
        return outcome, own_update or functools.partial(step_all, optimizers)

    def update(self, found_inf: Tensor, updates: Callable[[], int]) -> None:
        """Takes in the verdict over one window. Raises FloatingPointError, with all that is known, where that is one too many."""
        if self.loss_scale is not None:
            self.loss_scale.update(found_inf)
        if not self._streak.add(found_inf):
            return
        count, self._streak.length = self._streak.length, 0
        scale = (
            ""
            if self.loss_scale is None
            else f"; the loss scale is {self.loss_scale.value.item():g}"
        )
        raise FloatingPointError(
            f"{count} updates in a row were skipped, because gradients are not finite: {not_finite(self._plan)}. The last good "
            f"update was number {updates()}, and the parameters are as it left them{scale}. Look at the loss and the data of "
            "these windows, or go back to a checkpoint with a lower learning rate; `max_skips=math.inf` goes on for ever"
        )

    def state_dict(self) -> dict[str, Any]:
        """The loss scale, where there is one."""
        scale = self.loss_scale
        return (
            {}
            if scale is None
            else {"loss_scale": scale.value.item(), "growth_tracker": int(scale.growth_tracker)}
        )

    def check_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises where the state has a loss scale that none can have been."""
        if "loss_scale" in state:
            check_count(state["growth_tracker"])
            if not 0 < (scale := float(state["loss_scale"])) <= torch.finfo(torch.float32).max:
                raise ValueError(f"a loss scale of {scale}")

    def load_state_dict(self, state: Mapping[str, Any]) -> float:
        """Goes on from there. Returns what scaled gradients are to be multiplied by: another precision may be picked here."""
        self._streak = Streak(self._streak.limit, self._streak.lag)
        there = float(state.get("loss_scale", 1.0))
        if self.loss_scale is None:
            return 1.0 / there
        if "loss_scale" in state:
            self.loss_scale.value.fill_(there)
            self.loss_scale.growth_tracker.fill_(state["growth_tracker"])
        return self.loss_scale.value.item() / there


def check_count(value: Any) -> int:
    """value, if it is a number of updates; else ValueError."""
    if type(value) is not int or not 0 <= value < 2**31:
        raise ValueError(f"not a number of updates: {value!r}")
    return value


class LossScale:
    """The dynamic loss scale, by the rule of ``torch.amp.GradScaler``: halved by an overflow, doubled after
    ``growth_interval`` updates in a row without one (Micikevicius et al. 2018, https://arxiv.org/abs/1710.03740)."""

    def __init__(self, init_scale: float, growth_interval: int, device: torch.device) -> None:
        self.value = torch.full((), init_scale, dtype=torch.float32, device=device)
        self.growth_tracker = torch.full((), 0, dtype=torch.int32, device=device)
        self.growth_interval = growth_interval

    def update(self, found_inf: Tensor) -> None:
        """Takes in the verdict over one window, without waiting for the device."""
        found_inf = found_inf.to(self.value.device)
        if _amp_update_scale_ is not None:
            _amp_update_scale_(
                self.value, self.growth_tracker, found_inf, 2.0, 0.5, self.growth_interval
            )
            return
        overflow, grown = found_inf > 0, self.growth_tracker + 1 == self.growth_interval
        scaled = self.value * torch.where(overflow, 0.5, torch.where(grown, 2.0, 1.0))
        self.value.copy_(torch.where(scaled.isfinite(), scaled, self.value))
        self.growth_tracker.copy_(torch.where(overflow | grown, 0, self.growth_tracker + 1))


class Streak:
    """How many updates in a row were skipped because gradients were not finite; looked at only when it could be ``limit``.

    Nobody waits for it, so on an accelerator it is known late. Several ranks must come to know it at the same time: then it is
    looked at ``lag`` updates later, by when the answer is there.
    """

    def __init__(self, limit: float, lag: int) -> None:
        self.limit = limit
        self.lag = lag
        self.length = 0
        self._latest: list[Tensor] = []
        self._asked: Answer | None = None

    def add(self, found_inf: Tensor) -> bool:
        """Takes in whether the gradients of an update were not finite. Returns whether the limit is known to be reached."""
        self._latest.append(found_inf)
        enough = min(self.limit - self.length, 256)  # and no more than that are kept
        if self._asked is None and len(self._latest) >= enough:
            self._asked, self._latest = Answer(torch.stack(self._latest)), []
        if (
            self._asked is None
            or len(self._latest) < self.lag
            or not (self.lag or self._asked.known())
        ):
            return False
        found = [bool(value) for value in self._asked.read().tolist()]  # type: ignore[union-attr]
        self._asked = None
        self.length = self.length + len(found) if all(found) else found[::-1].index(False)
        return self.length >= self.limit
