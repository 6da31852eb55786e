"""What a step says when something is wrong: imported only then."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from trainkit.core.plan import Plan
from trainkit.core.warning import warn
from trainkit.core.window import Versions


def explain(error: RuntimeError) -> None:
    """Add to an error of backward what usually causes it in a step; torch's advice fits a loop."""
    for said, remedy in _REMEDIES.items():
        if said in str(error):
            error.args = (f"{error}\nIn a step function: {remedy}.",)


_REMEDIES = {
    "backward through the graph a second time": "the step runs backward of its loss, so remove "
    "`loss.backward()`; give a further loss to `step.backward(loss)` before the one you return",
    "modified by an inplace operation": "the step updates after backward, so remove "
    "`optimizer.step()`, or put it below the yield",
}


def disturbance(left: Versions, are_lent: bool) -> RuntimeError:
    """Return the error for gradients that something else changed inside a micro-batch."""
    changed = [p.grad for p, grad, version in left if p.grad is None or p.grad._version != version]
    if are_lent and all(grad is None or not bool(grad.norm()) for grad in changed):
        return RuntimeError(
            "a zero_grad() inside a micro-batch wiped the gradients that `step.backward` had added "
            "to its window: remove `optimizer.zero_grad()` there; the window is dropped"
        )
    return RuntimeError(
        "gradients were changed inside a micro-batch by something other than `step.backward`, for "
        "example a `loss.backward()`: give that loss to `step.backward(loss)`, or call it between "
        "two micro-batches"
    )


def warn_of_no_loss() -> None:
    """Warn of a block that ran its own backward."""
    warn(
        "a micro-batch ended without a loss and left gradients, which the step does not count: "
        "call `step.backward(loss)` in place of `loss.backward()`"
    )


def warn_of_short_windows() -> None:
    """Warn of a loop inside the loop that goes through ``over``."""
    warn(
        "several micro-batches came at the last batch of `step.over`, and each of them ends a "
        "window: let the loop over micro-batches go through `step.over`"
    )


def warn_of_missing(gradients: Sequence[Tensor], parameters: Sequence[nn.Parameter]) -> None:
    """Warn if most parameters take no part in the loss: torch says it vaguely, or not at all."""
    trainable = sum(p.requires_grad for p in parameters)
    if trainable and not gradients:
        warn(
            f"none of {trainable} trainable parameters received a gradient. Was the model copied or "
            "rebuilt after the optimizer was made? Make the optimizer last."
        )
    elif 2 * len(gradients) < trainable:
        warn(
            f"only {len(gradients)} of {trainable} trainable parameters received a gradient in the "
            "first window. Above frozen layers, activation checkpointing needs "
            "`use_reentrant=False`."
        )


def too_many_skips(step: Any, count: int) -> FloatingPointError:
    """Return the error for a streak of skipped updates, with all that is known."""
    scale = step._updater.scale
    shown = "" if scale is None else f", and the loss scale is {scale.item():g}"
    return FloatingPointError(
        f"{count} updates in a row were skipped because gradients are not finite: "
        f"{_not_finite(step._plan)}. The last good update was number {step.updates}{shown}. Check "
        "the loss and data of these windows, or resume with a lower learning rate; "
        "`max_skips=math.inf` never stops."
    )


def _not_finite(plan: Plan) -> str:
    """Describe the first parameters whose gradients are not finite."""
    names = {id(p): repr(name) for module in plan.modules for name, p in module.named_parameters()}
    for optimizer in plan.optimizers:
        for g, group in enumerate(optimizer.param_groups):
            for i, p in enumerate(group["params"]):
                place = f"params[{i}] of param_groups[{g}] of {type(optimizer).__name__}"
                given = group["param_names"][i] if "param_names" in group else ""
                shown = repr(given) if given else f"{place} with shape {tuple(p.shape)}"
                names.setdefault(id(p), shown)
    parameters = plan.parameters()
    bad = [p for p in parameters if p.grad is not None and not _is_finite(p.grad)]
    if not bad:
        return "each entry here is finite, but their norm is not"
    first = [names[id(p)] + ("" if _is_finite(p) else " (not finite itself)") for p in bad[:3]]
    return f"{len(bad)} of {len(parameters)} parameters, first {', '.join(first)}"


def _is_finite(tensor: Tensor) -> bool:
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor  # other ranks tell theirs
    local = local.coalesce().values() if local.is_sparse else local
    return bool(local.isfinite().all())
