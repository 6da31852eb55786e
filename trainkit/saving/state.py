"""``step.state_dict()``: counters, the loss scale, and the open window with its gradients."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

from trainkit.core.window import Window


def state_of(step: Any) -> dict[str, Any]:
    """Return copies of what a step carries from micro-batch to micro-batch."""
    _check_between(step, "state_dict")
    window, updater = step._window, step._updater
    step._warned.add("end")  # no warning of an open window: it is saved
    state: dict[str, Any] = {"updates": step.updates, "skipped": step.skipped}
    if step._reference is not None:
        state["reference"] = step._reference
    if updater.scale is not None:
        state |= {"loss_scale": updater.scale.item(), "growth_tracker": int(updater.growth)}
    if window is not None and window.losses:
        values = {name: getattr(window, name) for name in (*window.kept, "losses")}
        state["window"] = deepcopy(values)
        state["gradients"] = window.copied_sums()
    return state


def load_into(step: Any, state: Any) -> None:
    """Load a state; ValueError, before anything is changed, if it does not fit."""
    _check_between(step, "load_state_dict")
    updater, window = step._updater, None
    if isinstance(state, dict) and "growth_factor" in state:
        raise ValueError(f"got a GradScaler's state: begin with `amp(init_scale={state['scale']})`")
    try:
        skipped, applied = int(state["skipped"]), int(state["updates"])
        scale, growth = float(state.get("loss_scale", 1.0)), int(state.get("growth_tracker", 0))
        here = 1.0 if updater.scale is None else float(state.get("loss_scale", updater.scale))
        if "window" in state:
            window = _loaded_window(step, state["window"], state["gradients"], here / scale)
    except Exception as error:  # anything may be given in place of a state
        remedy = "give what `step.state_dict()` returned, for the same model and optimizer"
        raise ValueError(f"this state does not fit the step ({error!r:.150}): {remedy}") from None
    step.discard()
    updater.reset_skips()
    if updater.scale is not None and "loss_scale" in state:
        updater.scale.fill_(scale)
        updater.growth.fill_(growth)
    step._skips, step._closed = skipped, applied + skipped
    step._reference, step._window, step._verdict = state.get("reference"), window, None


def _loaded_window(step: Any, state: Any, gradients: Any, factor: float) -> Window:
    """Return a window as it was. ``factor`` makes up for another loss scale."""
    window: Window = step._new_window()
    window.may_be_open = True
    for name in (*window.kept, "losses"):
        setattr(window, name, deepcopy(state[name]))
    window.arrange(parameters := step._plan.parameters())
    for i, gradient in gradients.items():
        copied = gradient.to(parameters[i].device, copy=True)
        if (copied.shape, copied.dtype) != (parameters[i].shape, window.dtype_of(parameters[i])):
            raise ValueError(f"gradient {i} has shape {list(copied.shape)} and is {copied.dtype}")
        window.sums[i] = copied if factor == 1.0 else copied * factor
    return window


def _check_between(step: Any, name: str) -> None:
    if step._running is not None and step._running.lent is not None:
        raise RuntimeError(f"step.{name}() inside a micro-batch: call it between two micro-batches")
    if step._updater is None:
        step._prepare()
