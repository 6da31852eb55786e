"""The parts of a step: ``accumulate`` and ``amp``. Each is a validated piece of plan and does nothing by itself."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, overload

import torch
from torch import nn
from torch.optim import Optimizer

from trainkit.core.compose import Part, UnboundStep, train_step
from trainkit.core.plan import (
    Plan,
    Precision,
    check_clipping,
    check_length,
    check_max_skips,
    check_module,
    current_device,
)

P = ParamSpec("P")
R = TypeVar("R")

_LARGEST_SCALE = torch.finfo(torch.float32).max


def accumulate(
    n: int | Callable[[int], int],
    module: nn.Module | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> Part:
    """Makes one update of every n micro-batches.

    The gradient of a window is that of the weighted mean over everything in it, ``sum(w_i * loss_i) / sum(w_i)``, however it
    is cut into micro-batches and however many there are: equivalent to the one big batch::

        loss_fn(model(torch.cat(xs)), torch.cat(ys)).backward()

    w_i is the weight that comes with a loss, or 1. A last window of k < n is divided by what is in it, not by n. Where nothing
    may be left to count, as when all tokens are masked, a mean is nan, and stays so times 0: give
    ``cross_entropy(..., reduction="sum") / count.clamp(min=1), count``.
    ``accumulate(1)`` changes nothing; ``accumulate(a)`` with ``accumulate(b)`` is ``accumulate(a * b)``.

    Args:
        n: micro-batches in a window, an int >= 1; or a callable from the number of updates so far to that.
        module: the module that is trained. Needed where nothing else in the plan knows the parameters, as on a generator
            function that is not also given an optimizer.
        dtype: torch.float32 sums the gradients of bfloat16 and float16 parameters in float32, and rounds the sum once, when the
            window is complete; in their own dtype a sum stands still once it is 256 times as large as what is added to it.
            Takes the memory of the sums. None sums in the dtype of the parameters.

    Returns:
        A part: a decorator for step functions, or an argument of ``train_step``.

    Raises:
        TypeError: if n is neither an int nor a callable, or module is not a torch.nn.Module.
        ValueError: n < 1, or another dtype. At the first call, a dtype on a torch whose tensors have no ``grad_dtype``, or
            under DistributedDataParallel or FSDP, which have ways of their own to add up gradients.

    Example:
        >>> import torch
        >>> from trainkit import accumulate
        >>> model = torch.nn.Linear(3, 2)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> @accumulate(4, model)
        ... def step(x, y):
        ...     yield torch.nn.functional.cross_entropy(model(x), y)
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        >>> for x, y in step.over([(torch.ones(5, 3), torch.ones(5).long())] * 6):
        ...     result = step(x, y)
        >>> step.updates, result.complete
        (2, True)

    Source: what dividing each loss by n does to unequal batches, https://github.com/huggingface/transformers/issues/34242
    """
    if not callable(n) or isinstance(n, nn.Module):
        check_length(n, "accumulate got")
    elif not _takes_one(n):
        raise TypeError(
            f"accumulate takes a number, or a function of the number of updates, got {getattr(n, '__name__', n)!r}, which takes "
            "something else: a step function is decorated by `@accumulate(4)`"
        )
    if dtype not in (None, torch.float32):
        raise ValueError(
            f"gradients are summed in torch.float32, or for None in their own dtype, got {dtype!r}: "
            "`accumulate(4, dtype=torch.float32)`"
        )
    name = getattr(n, "__name__", n)
    return Part(
        Plan(lengths=(n,), sum_dtype=dtype, modules=check_module(module)), f"accumulate({name})"
    )


def _takes_one(function: Callable[..., Any]) -> bool:
    try:
        inspect.signature(function).bind(0)
    except TypeError:
        return False
    except ValueError:  # what is not written in Python may not tell
        pass
    return True


def _between_graphs(function: Callable[P, R]) -> Callable[P, R]:
    """Within a compiled function, has torch.compile call this between two graphs: a graph has no modes and no flags."""
    # The public torch.compiler.disable imports the compiler, which takes seconds.
    disable = getattr(getattr(torch, "_compile", None), "_disable_dynamo", None)
    return disable(function) if disable else function


class Autocast(Part):
    """``amp()`` without an optimizer: a part, and by itself a context of plain autocast for evaluation."""

    def __init__(self, plan: Plan, text: str) -> None:
        super().__init__(plan, text)
        self._entered: list[torch.autocast] = []

    @_between_graphs
    def __enter__(self) -> None:
        precision = self.plan.precision
        assert precision is not None
        device_type, dtype = precision.resolve(current_device())
        autocast = torch.autocast(
            device_type, dtype if dtype != torch.float32 else None, enabled=dtype != torch.float32
        )
        autocast.__enter__()  # type: ignore[no-untyped-call]
        self._entered += [
            autocast
        ]  # not by a call, after which an interrupt may come; nor is it taken out by one

    @_between_graphs
    def __exit__(self, *exception: Any) -> None:
        autocast = self._entered[-1]
        del self._entered[-1]
        autocast.__exit__(*exception)


@overload
def amp(
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    max_skips: float | None = None,
    init_scale: float = 65536.0,
    growth_interval: int = 2000,
) -> Autocast: ...
@overload
def amp(
    first: Optimizer,
    /,
    *optimizers: Optimizer,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    max_skips: float | None = None,
    init_scale: float = 65536.0,
    growth_interval: int = 2000,
) -> UnboundStep: ...
def amp(
    *optimizers: Optimizer,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    max_skips: float | None = None,
    init_scale: float = 65536.0,
    growth_interval: int = 2000,
) -> Autocast | UnboundStep:
    """Runs forward in mixed precision, with a gradient scaler where float16 needs one, and clips the true gradients.

    ``amp(optimizer, max_norm=m)`` is ``train_step(optimizer, amp(), max_norm=m)``: a decorator, and a context around one
    micro-batch. It is equivalent to this loop, without its waits::

        with torch.autocast(device, dtype):
            loss = f(*batch)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        clip_grad_norm_(parameters, m)
        scaler.step(optimizer)
        scaler.update()

    ``amp()`` is the part for a plan that has its optimizer elsewhere; and ``with amp():`` is autocast alone, for evaluation.
    Updates whose gradients are not finite are skipped in every dtype; only float16 has a loss scale. ``amp(dtype=torch.float32)``
    changes nothing but that. A step function that moves weights in place between two of its forwards, other than along a
    gradient that it takes there, calls ``torch.clear_autocast_cache()`` after it.

    Args:
        optimizers: none, one or several.
        dtype: torch.bfloat16, torch.float16 or torch.float32. None picks at the first call: bfloat16 where the device computes
            it natively, which a T4 does not, else float16.
        device: the type of device that forward runs on, as "cuda"; None takes that of the first parameter.
        max_norm: clips the norm of the true gradients; ``math.inf`` only checks, as amp does anyway.
        norm_type: 1, 2 or ``math.inf``.
        max_skips: so many updates skipped in a row are a FloatingPointError; None is 25. See ``train_step``.
        init_scale: the first loss scale, for float16.
        growth_interval: updates without an overflow after which the loss scale doubles.

    Raises:
        TypeError, ValueError: if an argument has the wrong type or value; at the first call, if parameters are float16
            themselves where float16 has a loss scale.

    Example:
        >>> import torch
        >>> from trainkit import amp
        >>> model = torch.nn.Linear(3, 1)
        >>> step = amp(torch.optim.SGD(model.parameters(), lr=0.1), dtype=torch.bfloat16, max_norm=1.0)
        >>> with step as result:
        ...     step.backward(model(torch.ones(4, 3)).float().pow(2).mean())
        >>> result.updated
        True

    Source: https://docs.pytorch.org/docs/stable/notes/amp_examples.html; Micikevicius et al. 2018, https://arxiv.org/abs/1710.03740
    """
    if not any(dtype is known for known in (None, torch.bfloat16, torch.float16, torch.float32)):
        raise ValueError(
            f"dtype must be torch.bfloat16, torch.float16 or torch.float32, got {dtype!r}: `amp(dtype=torch.float16)`"
        )
    if (
        isinstance(init_scale, bool)
        or not isinstance(init_scale, (int, float))
        or not 0 < init_scale <= _LARGEST_SCALE
    ):
        raise ValueError(
            f"init_scale must be a finite float32 above 0, got {init_scale!r}: `amp(init_scale=65536.0)`"
        )
    if (
        isinstance(growth_interval, bool)
        or not isinstance(growth_interval, int)
        or not 1 <= growth_interval < 2**31
    ):
        raise ValueError(
            f"growth_interval counts updates, an int32 >= 1, got {growth_interval!r}: `amp(growth_interval=2000)`"
        )
    try:
        device_type = None if device is None else torch.device(device).type
        if device_type is not None and not torch.amp.is_autocast_available(device_type):
            raise ValueError(f"there is no autocast for {device_type}")
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"device must be a type of device that has autocast, got {device!r}: `amp(device='cuda')`"
        ) from error
    max_norm, norm_type = check_clipping(max_norm, norm_type)
    precision = Precision(dtype, device_type, float(init_scale), growth_interval)
    max_skips = check_max_skips(max_skips)
    plan = Plan(precision=precision, max_norm=max_norm, norm_type=norm_type, max_skips=max_skips)
    part = Autocast(plan, f"amp(dtype={dtype})")
    return train_step(optimizers, part) if optimizers else part
