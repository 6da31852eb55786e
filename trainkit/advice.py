"""Messages for when something is wrong with a step. Imported only then."""

from __future__ import annotations

import math
import re
import types
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from trainkit.core.plan import ABILITIES, shown
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
    "something besides `step.backward` changed gradients inside a micro-batch: loss.backward() and "
    "zero_grad() may stand above or below `with step:`, and clipping is "
    "`train_step(optimizer, max_norm=1.0)`"
)
CLIPPED = (
    "gradients are clipped in a step function, and come only after its return: "
    "`train_step(optimizer, max_norm=1.0)`, or `yield loss` and clip below it"
)
_CAUSES = {  # by a pattern in a message, which is torch's or Python's
    "graph a second time": "In a step, either the loss depends on a tensor of an earlier "
    "micro-batch: `state = state.detach()`. Or the function runs backward itself: remove "
    "`loss.backward()`, and give a further loss to `step.backward(loss)`.",
    "by an inplace operation": "In a step, either weights changed before backward: remove "
    "`optimizer.step()`, or put it below the yield. Or an activation did: `x = x + y`.",
    r"keyword argument '\w*sched": "Here it is `train_step(optimizer, after=scheduler.step)`.",
    r"keyword argument '(n'|\w*(accum|steps))": "Here it is `accumulate(4)`, a part.",
    r"keyword argument '\w*(clip|norm)": "Here it is `train_step(optimizer, max_norm=1.0)`.",
    r"keyword argument '(amp|auto|\w*(scaler|16|precision))": "Here it is `amp()`, a part.",
    r"keyword argument 'model": "Optimizers have the parameters; wrapped in DDP, `module=model`.",
    r"keyword argument '(loss|crit)": "It is in the function: `train_step(optimizer)(function)`.",
    r"keyword argument 'enabled": "Here it is `amp(dtype=torch.float32)`.",
    r"keyword argument 'device_type": "Here it is `amp(device='cuda')`.",
}


def described(step: Any) -> str:
    """Return the plan, the counts and the open window of a step, without running ``after``."""
    plan, window, function = step._plan, step._window, step._function
    lengths = (None if n == math.inf else getattr(n, "__qualname__", n) for n in plan.lengths)
    parts = [type(optimizer).__name__ for optimizer in plan.optimizers]
    reduction = ", reduction='sum'" * plan.is_sum
    parts += [f"accumulate({n}{reduction})" for n in lengths]
    parts += [f"{type(part).__name__}(...)" for part in plan.surroundings]
    parts += ["amp()"] if plan.precision is not None else []
    parts += ["microbatch(...)"] if plan.step is not None else []
    parts += [f"max_norm={plan.max_norm:g}"] if plan.max_norm is not None else []
    made = f"train_step({', '.join(parts)})" if plan.optimizers else ", ".join(parts)
    if function is not None:
        made += f"({getattr(function, '__qualname__', type(function).__name__)})"
    elif not plan.optimizers:  # a part
        return made
    skipped = int(step._skips)
    at = f"updates={step._closed - skipped}, skipped={skipped}"
    at += f", open window of {window.size}" if window and window.losses else ""
    return f"<{made}: {at}>"


def explain(error: Exception) -> None:
    """Add to an error its usual cause in a step. Torch's own advice is for a loop."""
    for said, cause in _CAUSES.items():
        if re.search(said, str(error)):
            error.args = (f"{error}\n{cause}",)
            break


def not_an_optimizer(given: Any) -> TypeError:
    """Return the error for anything given in place of an optimizer."""
    came, remedy = f"{type(given).__name__} {shown(given)}", "AdamW(model.parameters())"
    missing = [name for name in ABILITIES if not hasattr(given, name)]
    if isinstance(given, type):
        came, remedy = f"the class {given.__name__}", f"{given.__name__}(model.parameters())"
    elif isinstance(given, LRScheduler):
        remedy = "train_step(optimizer, after=scheduler.step)"
    elif isinstance(given, (str, torch.dtype)):
        remedy = "amp(dtype=torch.float16)"
    elif isinstance(given, types.FunctionType):
        remedy = "@train_step(optimizer)"
    elif isinstance(given, (list, tuple, dict)):
        remedy = "train_step([optimizer_a, optimizer_b])"
    elif hasattr(given, "step") or hasattr(given, "param_groups"):
        came += f" without {', '.join(missing)}"
        remedy = f"{missing[0]} = property(lambda self: self.optimizer.{missing[0]})"
    return TypeError(f"expected an optimizer, got {came}: `{remedy}`")


def no_loss(output: Any) -> Exception:
    """Return the error for an output of a step function that is no loss."""
    got, kind = shown(output), type(output).__name__
    if not isinstance(output, Tensor):
        came, remedy = f"{got} ({kind})", "`return loss`, or `{'loss': loss, 'weight': weight}`"
        if hasattr(output, "__float__"):
            remedy = "`return loss` or `return loss, weight`, not `loss.item()`, which has no graph"
        elif isinstance(output, (list, tuple)):
            came = f"a {kind} of {len(output)}"
            remedy = "`return loss, weight`, or `{'loss': loss, 'logits': logits}`"
        else:
            remedy += "; a model's output has a loss only if it was given labels"
        if isinstance(output, Mapping):
            names = ", ".join(map(repr, output))[:60]
            came = f"{kind} of {names}, where 'loss' is missing or None"
        return TypeError(f"a step function returns or yields a loss, not {came}: {remedy}")
    if output.dim():
        return ValueError(f"the loss must be a single number, got {got}: `loss.mean()`")
    if not output.is_floating_point():
        return TypeError(f"the loss must be floating, got {got}: `return loss, weight`")
    if not torch.is_grad_enabled():
        off = "a step trains, and no_grad or inference_mode is on"
        return ValueError(f"{off}: to validate call the model, `with torch.no_grad(), amp():`")
    hint = "is all below it frozen (a tied head is, with its embedding)?"
    return ValueError(f"the loss has no graph: return it without `.detach()` or `no_grad`; {hint}")


def warn_of_missing(received: int, parameters: list[nn.Parameter]) -> None:
    """Warn if most parameters got no gradient: torch says it vaguely, or not at all."""
    trainable = sum(p.requires_grad for p in parameters)
    if 2 * received < trainable or not received:
        warn(
            f"only {received} of {trainable} trainable parameters received a gradient. Was the "
            "model rebuilt after the optimizer was made? Make the optimizer last. Is it "
            "checkpointed above frozen layers? Use `use_reentrant=False`. Unused experts are fine."
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
