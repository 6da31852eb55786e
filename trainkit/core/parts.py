"""``train_step``, and the parts ``accumulate`` and ``amp``. A part holds a plan, and no state.

A part that decorates a function, or is given to ``train_step``, adds its plan to the plan of a
step. So parts may be given in any order, and one part serves many steps.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, ParamSpec

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from trainkit.core.plan import (
    OptimizerLike,
    Plan,
    Surrounding,
    check,
    check_length,
    check_stepping,
    optimizers_of,
    options_of,
    shown,
)
from trainkit.core.precision import Precision, between_graphs, current_device
from trainkit.core.result import StepResult
from trainkit.core.step import Step
from trainkit.core.warning import warn

P = ParamSpec("P")


class Part(Step[[Any]]):
    """A step without a function: decorates one, joins others in ``train_step``, or is a context."""

    def __call__(self, function: Callable[P, Any], *more: Any) -> Step[P]:  # type: ignore[override]
        """Return the step of this function, or this step with more in its plan."""
        if more or isinstance(function, Tensor):
            remedy = "`train_step(...)(function)`, or `with step: step.backward(loss)`"
            raise TypeError(f"this step has no function to call yet: {remedy}")
        if isinstance(function, Part):
            return Part(self._plan + function._plan)  # type: ignore[return-value]
        plan, parts = self._plan, getattr(function, "__trainkit_parts__", ())
        if isinstance(function, Step):
            plan, parts, function = plan + function._plan, (), function._function  # type: ignore[assignment]
        is_function = callable(function) and not isinstance(function, Surrounding)
        fault = f"a part decorates functions, got {shown(function)}"
        check(is_function, TypeError, f"{fault}; parts go together, `train_step(optimizer, a, b)`")
        for part in parts:
            plan += _plan_of(part)
        step: Step[P] = (plan.step or Step)(plan, function)
        called = " ".join(getattr(getattr(function, "__code__", None), "co_names", ()))
        if "clip_grad" in called and "backward" not in called and not step._yields:
            from trainkit.advice import CLIPPED

            warn(CLIPPED)
        return step

    def last(self, *args: Any, **kwargs: Any) -> StepResult:
        remedy = "`step.close()` below the block, or a loop over `step.over(loader)`"
        raise TypeError(f"a step without a function has no last(): {remedy} closes the window")

    def __reduce__(self) -> Any:
        return super().__reduce__() if self._plan.optimizers else (type(self), (self._plan,))

    def __enter__(self) -> StepResult:
        cut = "a block has no arguments to cut: `train_step(optimizer, ...)(function)`"
        check(self._plan.step is None, ValueError, cut)
        if not self._closed:
            check_stepping(self._plan)
        return super().__enter__()


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """Say what an unknown keyword is called here."""
    try:
        yield
    except TypeError as error:
        from trainkit.advice import explain

        explain(error)
        raise


@_explained()
def train_step(
    optimizer: OptimizerLike | Sequence[OptimizerLike],
    *parts: Part | Surrounding,
    module: nn.Module | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    max_skips: float | None = None,
    after: Callable[[], Any] | Sequence[Callable[[], Any]] = (),
) -> Part:
    """Make a training step of a function that computes a loss, or a context for one by hand.

    ``train_step(opt, accumulate(n), amp(), max_norm=m, after=scheduler.step)(f)`` is this loop::

        for batch in window:  # of n micro-batches
            with autocast():
                loss = f(*batch)
            scaler.scale(loss * weight / sum(weights)).backward()
        scaler.unscale_(opt), clip_grad_norm_(parameters, m)
        scaler.step(opt), scaler.update()
        scheduler.step(), opt.zero_grad()  # the scheduler only if the update was not skipped

    Args:
        optimizer: one, or several: one norm over all of them, and all of them step or none.
        parts: ``accumulate(n)``, ``amp()``, ``frozen(module, layers)``..., in any order.
        module: the module in its DistributedDataParallel or FSDP wrapper, on several ranks.
        max_norm, norm_type: clip the norm of the true gradients; ``math.inf`` only checks it.
        max_skips: raise FloatingPointError after this many skipped updates in a row; None is 25.
        after: callables that run after each applied update, before the step returns. If all are
            ``step`` of learning-rate schedulers, they run when the verdict has arrived, before the
            next update.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(1))
        >>> step = train_step(torch.optim.SGD([weight]), accumulate(2))(lambda x: (weight * x)[0])
        >>> [step(x).updated for x in step.over([1.0, 2.0, 3.0])]
        [False, True, True]
    """
    calls = tuple(after) if isinstance(after, (list, tuple)) else (after,)
    for call in calls:
        needs_metric = isinstance(getattr(call, "__self__", None), ReduceLROnPlateau)
        remedy = "`plateau.step(metric)` in your loop" if needs_metric else "`after=scheduler.step`"
        fault = f"after takes callables without arguments, got {shown(call)}"
        check(callable(call) and not needs_metric, TypeError, f"{fault}: {remedy}")
    options = options_of(module, max_norm, norm_type, max_skips)
    plan = Plan(optimizers=optimizers_of(optimizer), after=calls, **options)
    for part in parts:
        plan += _plan_of(part)
    return Part(plan)


@_explained()
def accumulate(
    n: int | Callable[[int], int | None] | None,
    module: nn.Module | None = None,
    *,
    reduction: Literal["mean", "sum"] = "mean",
    dtype: torch.dtype | None = None,
) -> Part:
    """Make one update from every n micro-batches.

    The gradient of a window is the gradient of ``sum(w_i * loss_i) / sum(w_i)`` over its
    micro-batches: equivalent to one big batch, however it is cut::

        loss_fn(model(torch.cat(xs)), torch.cat(ys)).backward()

    w_i is the weight of a loss, ``return loss, count``, or 1. A last window of k < n micro-batches
    is divided by its own weights. ``accumulate(a)`` with ``accumulate(b)`` is
    ``accumulate(a * b)``.

    Args:
        n: micro-batches in a window, or a function of the number of updates so far, for which each
            window waits once. With None only ``step.close()``, ``step.last`` and the end of
            ``step.over`` close a window.
        reduction: "sum" adds up the losses instead of taking their mean.
        module: the module to train, needed only in a plan without an optimizer.
        dtype: torch.float32 adds up the gradients of half-precision parameters in float32.

    Raises:
        TypeError, ValueError: for another n, module or dtype.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(1))
        >>> step = train_step(torch.optim.SGD([weight]), accumulate(4))

    Source: https://github.com/huggingface/transformers/issues/34242
    """
    length: Any = n
    if not callable(n) or isinstance(n, nn.Module):
        length = check_length(n)
    else:
        try:
            inspect.signature(n).bind(0)
        except TypeError:
            fault = f"got {getattr(n, '__name__', n)!r}: `@accumulate(4)`"
            raise TypeError(f"n is a number, or a function of the updates, {fault}") from None
        except ValueError:  # a function that is not written in Python may have no signature
            pass
    fits = dtype is None or dtype == torch.float32
    check(fits, ValueError, f"sums are float32 or None, got {dtype!r}: `dtype=torch.float32`")
    fits = reduction in ("mean", "sum")
    check(fits, ValueError, f"no reduction {reduction!r}: `accumulate(4, reduction='sum')`")
    plan = Plan(lengths=(length,), is_sum=reduction == "sum", **options_of(module))
    if dtype is not None:
        from trainkit.wide import WideWindow

        plan += Plan(window=WideWindow)
    return Part(plan)


class Autocast(Part):
    """``amp()`` without an optimizer: a part, and by itself autocast for an evaluation."""

    _contexts: tuple[torch.autocast, ...] = ()

    @between_graphs
    def __enter__(self) -> None:  # type: ignore[override]
        precision = self._plan.precision
        assert precision is not None
        kind, dtype = precision.resolve(current_device())
        is_on = dtype != torch.float32
        autocast = torch.autocast(kind, dtype if is_on else None, enabled=is_on)
        autocast.__enter__()  # type: ignore[no-untyped-call]
        self._contexts += (autocast,)  # no call, which a signal could follow

    @between_graphs
    def __exit__(self, *exception: Any) -> None:
        autocast, self._contexts = self._contexts[-1], self._contexts[:-1]
        autocast.__exit__(*exception)


@_explained()
def amp(
    *optimizers: OptimizerLike,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    max_skips: float | None = None,
    init_scale: float = 65536.0,
    growth_interval: int = 2000,
) -> Part:
    """Run forward in mixed precision, with a loss scale in float16, and clip the true gradients.

    ``amp(optimizer, max_norm=m)`` is ``train_step(optimizer, amp(), max_norm=m)``, equivalent to::

        with torch.autocast(device, dtype):
            loss = f(*batch)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        clip_grad_norm_(parameters, m)
        scaler.step(optimizer)
        scaler.update()

    ``amp()`` is a part, and ``with amp():`` is autocast alone. An update whose gradients are not
    finite is skipped, in every dtype.

    Args:
        dtype: torch.bfloat16, float16 or float32. None picks bfloat16 where the device computes it
            natively, which a T4 does not, else float16.
        device: the type of device that forward runs on; None is the device of the first parameter.
        max_norm, norm_type, max_skips: see ``train_step``.
        init_scale, growth_interval: see ``torch.amp.GradScaler``.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(1))
        >>> step = amp(torch.optim.SGD([weight]), max_norm=1.0)(lambda x: (weight * x).sum())

    Source: Micikevicius et al. 2018, https://arxiv.org/abs/1710.03740
    """
    known = any(dtype is one for one in (None, torch.bfloat16, torch.float16, torch.float32))
    check(known, ValueError, f"no autocast in {dtype!r}: `amp(dtype=torch.float16)`")
    fits = type(init_scale) in (int, float) and 0 < init_scale <= torch.finfo(torch.float32).max
    fault = f"init_scale must be a float32 above 0, got {init_scale!r}"
    check(fits, ValueError, f"{fault}: `init_scale=65536.0`")
    fits = type(growth_interval) is int and 1 <= growth_interval < 2**31
    fault = f"growth_interval counts updates, an int32, got {growth_interval!r}"
    check(fits, ValueError, f"{fault}: `growth_interval=2000`")
    try:
        kind = None if device is None else torch.device(device).type
        has_autocast = kind is None or torch.amp.is_autocast_available(kind)
    except (RuntimeError, TypeError):
        has_autocast = False
    fault = f"device must be a type of device that has autocast, got {device!r}"
    check(has_autocast, ValueError, f"{fault}: `amp(device='cuda')`")
    precision = Precision(dtype, kind, float(init_scale), growth_interval)
    options = options_of(None, max_norm, norm_type, max_skips)
    part = Autocast(Plan(precision=precision, **options))
    return train_step(optimizers, part) if optimizers else part


def _plan_of(part: Any) -> Plan:
    if isinstance(part, Part):
        return part._plan
    if isinstance(part, Surrounding) and not isinstance(part, type):
        return Plan(surroundings=(part,))
    raise TypeError(
        f"{shown(part)} is not a part: give parts one by one, `accumulate(4), amp()`, optimizers "
        "in one list, `[a, b]`, and the rest by name, `module=model, after=scheduler.step`"
    )
