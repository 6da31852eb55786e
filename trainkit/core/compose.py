"""Putting steps together: what a part is, and ``train_step``.

A part is an inert recipe, a piece of plan. Applying one to a function, or handing it to ``train_step``, adds it to the plan of
a ``Step``; nothing wraps anything. So the order in which parts are given cannot matter, and one part serves many steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any, ParamSpec, overload

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from trainkit.core.plan import (
    Plan,
    Surrounding,
    check_clipping,
    check_max_skips,
    check_module,
    check_optimizers,
)
from trainkit.core.step import Step

P = ParamSpec("P")
Q = ParamSpec("Q")


class UnboundStep(Step[[Any]]):
    """A step without a function: a context for micro-batches by hand, and a decorator for the function it lacks."""

    def __call__(self, function: Callable[Q, Any], *more: Any) -> Step[Q]:  # type: ignore[override]
        if more or isinstance(function, Tensor):
            raise TypeError(
                "this step has no function yet, and was called with something else: decorate one, "
                "`step = train_step(optimizer, ...)(function)`, or give it the loss by hand, `with step: step.backward(loss)`"
            )
        return _bind(self._plan, function)


class Part:
    """An inert recipe, a piece of plan. It decorates a step function, or is handed to ``train_step``; one serves many steps."""

    _text = ""  # the compiler of torch 2.6 looks at a part before it is made

    def __init__(self, plan: Plan, text: str) -> None:
        self.plan = plan
        self._text = text

    @overload
    def __call__(self, function: UnboundStep) -> UnboundStep: ...
    @overload
    def __call__(self, function: Callable[P, Any]) -> Step[P]: ...
    def __call__(self, function: Any) -> Any:
        return _bind(self.plan, function)

    def __repr__(self) -> str:
        return self._text


def train_step(
    optimizer: Optimizer | Sequence[Optimizer],
    *parts: Part | Surrounding | UnboundStep,
    module: nn.Module | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    max_skips: float | None = None,
    after: Callable[[], Any] | Sequence[Callable[[], Any]] = (),
) -> UnboundStep:
    """Makes a training step of a function that computes a loss; by itself, a context for a step written by hand.

    ``train_step(optimizer)(f)`` is equivalent to this loop, bit by bit::

        optimizer.zero_grad()
        f(*batch).backward()
        optimizer.step()

    and with ``accumulate(n), amp(), max_norm=m, after=scheduler.step``, over every n micro-batches, to this one::

        for batch in window:
            with autocast():
                loss = f(*batch)
            scaler.scale(loss * weight / sum(weights)).backward()
        scaler.unscale_(optimizer)
        clip_grad_norm_(parameters, m)
        scaler.step(optimizer)
        scaler.update()
        scheduler.step()  # if the update was not skipped
        optimizer.zero_grad()

    ``train_step(opt, a, b)(f) == train_step(opt)(a(b(f))) == train_step(opt)(b(a(f)))``. A generator function that yields its
    loss keeps the update code that it has below the yield. With fused optimizers (``AdamW(..., fused=True)``) the
    whole update takes two reads and one write of the gradients, and does not wait for the device.

    Args:
        optimizer: one, or a sequence: one norm over all of them, and all of them step or none.
        parts: ``accumulate(n)``, ``amp()``, ``frozen(module, layers)``, in any order.
        module: the module that is wrapped in DistributedDataParallel or FSDP, needed when more than one rank runs. Gradients are
            then reduced once per window, and are those of the weighted mean over all ranks.
        max_norm: clips the norm of the true gradients; ``math.inf`` only checks that they are finite.
        norm_type: 1, 2 or ``math.inf``.
        max_skips: so many updates skipped in a row, because gradients were not finite, are an error: an int, or ``math.inf``.
            None is 25. With a loss scale, which every one of them halves, that is a factor of 3e-8.
        after: one or several callables without arguments, called after each applied update, and not after a skipped one; for
            example ``scheduler.step`` or the update of an EMA. On an accelerator the call may come as late as just before
            the next update, when the verdict on this one has arrived; see ``Step.settle``. So a checkpoint is not taken in
            it, but after the call, where the state is whole.

    Returns:
        A ``Step``. Called with a function it decorates it; ``with step:`` it is one micro-batch by hand.

    Raises:
        TypeError, ValueError: if an argument has the wrong type or value, or is given twice.
        FloatingPointError: by a call, after ``max_skips``; it names parameters, the last good update and the loss scale. On an
            accelerator, which is not waited for, it may come some updates later.

    Example:
        >>> import torch
        >>> from trainkit import accumulate, train_step
        >>> model = torch.nn.Linear(3, 1)
        >>> optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        >>> @train_step(optimizer, accumulate(2), max_norm=1.0)
        ... def step(x, y):
        ...     return torch.nn.functional.mse_loss(model(x), y)
        >>> for batch in step.over([(torch.ones(4, 3), torch.ones(4, 1))] * 3):
        ...     result = step(*batch)
        >>> step.updates, result.updated
        (2, True)

    Source: the loop of https://docs.pytorch.org/docs/stable/notes/amp_examples.html
    """
    max_norm, norm_type = check_clipping(max_norm, norm_type)
    calls = tuple(after) if isinstance(after, (list, tuple)) else (after,)
    for call in calls:
        if not callable(call):
            raise TypeError(
                f"after takes callables without arguments, got {call!r}: `after=scheduler.step`"
            )
        if isinstance(getattr(call, "__self__", None), ReduceLROnPlateau):
            raise TypeError(
                "ReduceLROnPlateau.step needs a metric: call `scheduler.step(metric)` after each evaluation yourself"
            )
    plan = Plan(
        optimizers=check_optimizers(optimizer),
        modules=check_module(module),
        max_norm=max_norm,
        norm_type=norm_type,
        max_skips=check_max_skips(max_skips),
        after=calls,
    )
    for part in parts:
        plan += _plan_of(part)
    return UnboundStep(plan)


def _plan_of(part: Any) -> Plan:
    if isinstance(part, Part):
        return part.plan
    if isinstance(part, UnboundStep):
        return part._plan
    if isinstance(part, Surrounding) and not isinstance(part, type):
        return Plan(surroundings=(part,))
    remedy = "parts are `accumulate(4)`, `amp()`, `frozen(module)`"
    if isinstance(part, Optimizer):
        remedy = "several optimizers go in one list: `train_step([optimizer_a, optimizer_b])`"
    elif isinstance(part, nn.Module):
        remedy = "a module goes by name: `train_step(optimizer, module=model)`"
    elif isinstance(part, int):
        remedy = f"for windows of {part} micro-batches: `accumulate({part})`"
    elif isinstance(part, float):
        remedy = f"gradients are clipped by `train_step(optimizer, max_norm={part})`"
    elif isinstance(part, (list, tuple)):
        remedy = "they stand one by one: `train_step(optimizer, accumulate(4), amp())`, or `train_step(optimizer, *parts)`"
    elif hasattr(part, "around_step") or (isinstance(part, FunctionType) and _makes_parts(part)):
        remedy = f"it makes one: `{part.__name__}(...)`"
    elif callable(part):
        remedy = "what is called after each update goes by name: `train_step(optimizer, after=scheduler.step)`"
    elif hasattr(part, "step"):
        remedy = "a scheduler's step goes by name: `train_step(optimizer, after=scheduler.step)`"
    shown = type(part).__name__ if isinstance(part, (Optimizer, nn.Module)) else repr(part)
    raise TypeError(f"{shown} is not a part; {remedy}")


def _makes_parts(function: FunctionType) -> bool:
    # By what it says, and not by its module: lifted into a cell it is one of the user's.
    return str(function.__annotations__.get("return")).endswith(("Part", "UnboundStep"))


def _bind(plan: Plan, function: Callable[P, Any]) -> Step[P]:
    """The step of this function, or this step with more in its plan."""
    if isinstance(function, UnboundStep):
        return type(function)(plan + function._plan)  # type: ignore[return-value]
    if isinstance(function, Step):
        return _step(plan + function._plan, function._function)
    if isinstance(function, (Part, Surrounding)) or not callable(function):
        raise TypeError(
            f"only functions are decorated, got {function!r}; parts go together in `train_step(optimizer, a, b)`"
        )
    for part in getattr(function, "__trainkit_parts__", ()):
        plan += _plan_of(part)
    return _step(plan, function)


def _step(plan: Plan, function: Callable[P, Any] | None) -> Step[P]:
    step: Step[P] = (plan.step_type or Step)(plan, function)
    return step
