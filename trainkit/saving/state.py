"""``step.state_dict()``: counters, the loss scale, and the open window with its gradients."""

from __future__ import annotations

from typing import Any

import torch


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
    """Load what ``state_of`` returned; ValueError, before anything is changed, if it does not fit."""
    updater, window = step._updater, None
    try:
        skipped, applied = _count(state["skipped"]), _count(state["updates"])
        scale, growth = float(state.get("loss_scale", 1.0)), _count(state.get("growth_tracker", 0))
        if not 0 < scale <= torch.finfo(torch.float32).max:
            raise ValueError(f"a loss scale of {scale}")
        here = 1.0 if updater.scale is None else float(state.get("loss_scale", updater.scale))
        if "window" in state:
            window = _loaded_window(step, state["window"], state["gradients"], here / scale)
    except Exception as error:  # anything may be given in place of a state
        raise ValueError(
            f"this state does not fit the step ({error!r:.200}): give what `step.state_dict()` "
            "returned, with model and optimizer as they were then"
        ) from None
    step.discard()
    step._owed, updater.streak = None, updater.streak.renewed()
    if updater.scale is not None and "loss_scale" in state:
        updater.scale.fill_(scale)
        updater.growth.fill_(growth)
    step._skips, step._closed = skipped, applied + skipped
    step._reference, step._window = state.get("reference"), window


def _loaded_window(step: Any, state: Any, gradients: Any, factor: float) -> Any:
    """Return a window as it was. Its sums are multiplied by ``factor``, for another loss scale."""
    window, parameters = step._new_window(), step._plan.parameters()
    for name in window.kept:
        setattr(window, name, state[name])
    window.losses, window.weights = list(state["losses"]), list(state["weights"])
    window.mean_loss(len(window.losses))  # raises for what are no losses and weights
    window.parameters, window.lent = parameters, [False] * len(parameters)
    window.sums = [None] * len(parameters)
    for i, gradient in gradients.items():
        parameter = parameters[i]
        expected = tuple(parameter.shape), window.dtype_of(parameter)
        if (tuple(gradient.shape), gradient.dtype) != expected:
            raise ValueError(f"gradient {i} is {gradient.dtype}{list(gradient.shape)}")
        copied = gradient.to(parameter.device, copy=True)
        window.sums[i] = copied if factor == 1.0 else copied * factor
    return window


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**31:
        raise ValueError(f"not a number of updates: {value!r}")
    return value
