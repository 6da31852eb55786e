"""What a step says when something is wrong: imported only then."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

from trainkit.core.warning import warn

SHORT_WINDOWS = (
    "several micro-batches came at the last batch of `step.over`, and each of them ends a window: "
    "let the loop over micro-batches go through `step.over`"
)
NO_LOSS = (
    "a micro-batch ended without a loss, and left gradients that the step does not count: call "
    "`step.backward(loss)` in place of `loss.backward()`"
)
DISTURBED = (
    "something besides `step.backward` changed gradients inside a micro-batch, for example a "
    "loss.backward() or a zero_grad(): remove it, or call it between two micro-batches"
)
_CAUSES = {
    "backward through the graph a second time": "the step runs backward of its loss: remove "
    "`loss.backward()`, and give a further loss to `step.backward(loss)` before the last one",
    "modified by an inplace operation": "the step updates after backward: remove "
    "`optimizer.step()`, or put it below the yield",
}


def described(step: Any) -> str:
    """Return the plan of a step and where it is, without running ``after``."""
    plan, window = step._plan, step._window
    parts = [getattr(step._function, "__qualname__", None)]
    parts += [f"accumulate({n if callable(n) or n < math.inf else None})" for n in plan.lengths]
    parts += [type(part).__name__ for part in (*plan.optimizers, *plan.surroundings)]
    parts += ["amp()"] if plan.precision is not None else []
    skipped = int(step._skips)
    parts += [f"updates={step._closed - skipped}", f"skipped={skipped}"]
    parts += [f"open window of {len(window.losses)}"] if window and window.losses else []
    return f"Step({', '.join(filter(None, parts))})"


def explain(error: RuntimeError) -> None:
    """Add to an error of backward what usually causes it in a step; torch's advice fits a loop."""
    for said, cause in _CAUSES.items():
        if said in str(error):
            error.args = (f"{error}\nIn a step function, {cause}.",)


def warn_of_missing(received: int, parameters: list[nn.Parameter]) -> None:
    """Warn if most parameters take no part in the loss: torch says it vaguely, or not at all."""
    trainable = sum(p.requires_grad for p in parameters)
    if 2 * received < trainable or not received:
        warn(
            f"only {received} of {trainable} trainable parameters received a gradient. Was the "
            "model rebuilt after the optimizer was made? Make the optimizer last. Is it "
            "checkpointed above frozen layers? Use `use_reentrant=False`."
        )


def too_many_skips(step: Any, count: int) -> FloatingPointError:
    """Return the error for a streak of skipped updates, with all that is known."""
    parameters, scale = step._plan.parameters(), step._updater.scale
    named = [item for module in step._plan.modules for item in module.named_parameters()]
    names = {id(p): repr(name) for name, p in named}
    bad = [(i, p) for i, p in enumerate(parameters) if p.grad is not None and _is_broken(p.grad)]
    where = "each of them is finite, but their norm is not"
    if bad:
        i, p = bad[0]
        name = names.get(id(p), f"number {i} of shape {tuple(p.shape)}")
        where = f"{len(bad)} of {len(parameters)} parameters, first {name}"
        where += ", which is not finite itself" if _is_broken(p) else ""
    known = "" if scale is None else f", the loss scale is {scale.item():g}"
    return FloatingPointError(
        f"{count} updates in a row were skipped because gradients are not finite: {where}. The "
        f"last good update was number {step.updates}{known}. Check the loss and the data, or "
        "resume with a lower learning rate; `max_skips=math.inf` sets no limit."
    )


def _is_broken(tensor: Tensor) -> bool:
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor  # other ranks tell theirs
    return not bool(local.to_dense().isfinite().all())
