"""``step.state_dict()``: counters, the loss scale, and the open window with its gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trainkit.core.update import Streak


def state_of(step: Any) -> dict[str, Any]:
    """Return copies of what a step carries from micro-batch to micro-batch."""
    window, updater = step._window, step._updater
    state: dict[str, Any] = {"updates": step.updates, "skipped": step.skipped}
    if step._reference is not None:
        state["reference"] = step._reference
    if updater.scale is not None:
        state |= {"loss_scale": updater.scale.item(), "growth_tracker": int(updater.growth)}
    if window is not None and window.losses:
        sums = enumerate(window.copied_sums())
        numbers = {name: getattr(window, name) for name in window.kept}
        losses = [loss.clone() for loss in window.losses]
        state["window"] = {**numbers, "losses": losses, "weights": list(window.weights)}
        state["gradients"] = {i: tensor for i, tensor in sums if tensor is not None}
    return state


def load_into(step: Any, state: Any) -> None:
    """Load what ``state_of`` returned; ValueError before anything is changed if it does not fit."""
    updater, parameters = step._updater, step._plan.parameters()
    window = None
    try:
        skipped, applied = _count(state["skipped"]), _count(state["updates"])
        scale, growth = float(state.get("loss_scale", 1.0)), _count(state.get("growth_tracker", 0))
        if not 0 < scale <= torch.finfo(torch.float32).max:
            raise ValueError(f"a loss scale of {scale}")
        here = scale if "loss_scale" in state else updater.scale
        factor = (1.0 if updater.scale is None else float(here)) / scale
        if "window" in state:
            window = step._new_window()
            for name in window.kept:
                setattr(window, name, state["window"][name])
            window.losses = list(state["window"]["losses"])
            window.weights = list(state["window"]["weights"])
            if not all(isinstance(loss, Tensor) and not loss.dim() for loss in window.losses):
                raise ValueError("its losses are 0-d tensors")
            gradients = dict(state["gradients"])
    except Exception as error:  # anything may be given in place of a state
        raise ValueError(
            f"this is not the state of a step ({error!r}): give what `step.state_dict()` returned"
        ) from None
    if window is not None:
        window.parameters, window.lent = parameters, [False] * len(parameters)
        window.sums = [None] * len(parameters)
        for i, gradient in gradients.items():
            window.sums[i] = window.fitted(i, gradient, factor)
    step.discard()
    step._owed, updater.streak = None, Streak(updater.streak.limit)
    if updater.scale is not None and "loss_scale" in state:
        updater.scale.fill_(scale)
        updater.growth.fill_(growth)
    step._skips, step._closed = skipped, applied + skipped
    step._reference, step._window = state.get("reference"), window


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**31:
        raise ValueError(f"not a number of updates: {value!r}")
    return value
