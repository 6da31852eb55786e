"""What a step says when something is wrong: imported only then."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from trainkit.core.warning import warn
from trainkit.core.window import Versions

SHORT_WINDOWS = (
    "several micro-batches came at the last batch of `step.over`, and each of them ends a window: "
    "let the loop over micro-batches go through `step.over`"
)
NO_LOSS = (
    "a micro-batch ended without a loss, and left gradients that the step does not count: call "
    "`step.backward(loss)` in place of `loss.backward()`"
)
_WIPED = (
    "a zero_grad() inside a micro-batch wiped the gradients of its window, which is dropped: "
    "remove `optimizer.zero_grad()`"
)
_CHANGED = (
    "something besides `step.backward` changed gradients inside a micro-batch, for example a "
    "loss.backward(): `step.backward(loss)`, or call it between two micro-batches"
)
_CAUSES = {
    "backward through the graph a second time": "the step runs backward of its loss, so remove "
    "`loss.backward()`; give a further loss to `step.backward(loss)` before the one you return",
    "modified by an inplace operation": "the step updates after backward, so remove "
    "`optimizer.step()`, or put it below the yield",
}


def explain(error: RuntimeError) -> None:
    """Add to an error of backward what usually causes it in a step; torch's advice fits a loop."""
    for said, cause in _CAUSES.items():
        if said in str(error):
            error.args = (f"{error}\nIn a step function: {cause}.",)


def disturbance(left: Versions, are_lent: bool) -> RuntimeError:
    """Return the error for gradients that something else changed inside a micro-batch."""
    now = [parameter.grad for parameter, *_ in left]
    is_wiped = are_lent and not any(grad.norm() for grad in now if grad is not None)
    return RuntimeError(_WIPED if is_wiped else _CHANGED)


def warn_of_missing(gradients: Sequence[Tensor], parameters: Sequence[nn.Parameter]) -> None:
    """Warn if most parameters take no part in the loss: torch says it vaguely, or not at all."""
    trainable = sum(p.requires_grad for p in parameters)
    if trainable and not gradients:
        warn(
            f"none of {trainable} trainable parameters received a gradient. Was the model copied "
            "or rebuilt after the optimizer was made? Make the optimizer last."
        )
    elif 2 * len(gradients) < trainable:
        warn(
            f"only {len(gradients)} of {trainable} trainable parameters received a gradient in the "
            "first window. Checkpointing above frozen layers needs `use_reentrant=False`."
        )


def too_many_skips(step: Any, count: int) -> FloatingPointError:
    """Return the error for a streak of skipped updates, with all that is known."""
    parameters, scale = step._plan.parameters(), step._updater.scale
    named = [item for module in step._plan.modules for item in module.named_parameters()]
    groups = [group for optimizer in step._plan.optimizers for group in optimizer.param_groups]
    for group in groups:
        named += zip(group.get("param_names", ()), group["params"], strict=False)
    names = {id(p): repr(name) for name, p in named}
    bad = [(i, p) for i, p in enumerate(parameters) if not _is_finite(p.grad)]
    where = "each entry here is finite, but their norm is not"
    if bad:
        shown = [names.get(id(p), f"number {i} of shape {tuple(p.shape)}") for i, p in bad[:3]]
        where = f"{len(bad)} of {len(parameters)} parameters, first {', '.join(shown)}"
        where += "" if _is_finite(bad[0][1]) else ", which is not finite itself"
    known = "" if scale is None else f" and the loss scale is {scale.item():g}"
    return FloatingPointError(
        f"{count} updates in a row were skipped because gradients are not finite: {where}. The "
        f"last good update was number {step.updates}{known}. Check the loss and the data, or resume "
        "with a lower learning rate; `max_skips=math.inf` sets no limit."
    )


def _is_finite(tensor: Tensor | None) -> bool:
    if tensor is None:
        return True
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor  # other ranks tell theirs
    local = local.coalesce().values() if local.is_sparse else local
    return bool(local.isfinite().all())
