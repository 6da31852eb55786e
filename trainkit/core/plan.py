"""The plan of a step: what its parts ask for, as one value. Plans add up in any order."""

from __future__ import annotations

import inspect
import math
import numbers
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from trainkit.core.precision import Precision


@runtime_checkable
class Surrounding(Protocol):
    """A part that is a context around every micro-batch: forward, backward and the update."""

    def around_step(self) -> AbstractContextManager[Any]:
        """Return a new context manager for one micro-batch."""


class OptimizerLike(Protocol):
    """What a step needs of an optimizer, whether it is a ``torch.optim.Optimizer`` or not."""

    param_groups: Any

    def step(self) -> Any:
        """Update the parameters by their gradients."""

    def zero_grad(self) -> Any:
        """Forget the gradients."""

    def state_dict(self) -> Any:
        """Return the state."""


ABILITIES = "param_groups", "step", "zero_grad", "state_dict"


@dataclass(frozen=True)
class Plan:
    """What the parts of a step ask for, without any state. ``a + b`` is ``b + a``."""

    # Plans add these up.
    modules: tuple[nn.Module, ...] = ()
    lengths: tuple[float | Callable[[int], int | None], ...] = ()
    after: tuple[Callable[[], Any], ...] = ()
    surroundings: tuple[Surrounding, ...] = ()
    # Each of these is given once.
    optimizers: tuple[OptimizerLike, ...] = ()
    is_sum: bool = False  # whether the losses of a window are added up
    precision: Precision | None = None
    max_norm: float | None = None
    norm_type: float = 2.0
    max_skips: float | None = None
    window: Callable[..., Any] | None = None  # the kind of window, if it is not Window
    step: Callable[..., Any] | None = None  # the kind of step, if it is not Step

    def __add__(self, other: Plan) -> Plan:
        """Return both plans in one; ValueError if both have what is given once."""
        both = {}
        for field in fields(Plan):
            name, unset = field.name, field.default
            a, b = getattr(self, name), getattr(other, name)
            if name in ("modules", "lengths", "after", "surroundings"):
                both[name] = a + b
            elif unset in (a, b) or (name in ("window", "is_sum") and a is b):
                both[name] = b if a == unset else a
            else:
                twice = f"two parts give {_NAMES.get(name, name)}, {shown(a)} and {shown(b)}"
                raise ValueError(f"{twice}: keep one of them")
        return Plan(**both)

    def optimized(self) -> list[list[nn.Parameter]]:
        """Return the parameters of each optimizer, or without optimizers of each module."""
        if self.optimizers:
            return [parameters_of(optimizer) for optimizer in self.optimizers]
        return [list(module.parameters()) for module in self.modules]

    def parameters(self) -> list[nn.Parameter]:
        """Return the parameters whose gradients make the update, each once."""
        if len(self.optimizers) == 1 and len(groups := self.optimizers[0].param_groups) == 1:
            found: list[nn.Parameter] = groups[0]["params"]
            return found
        return list({id(p): p for parameters in self.optimized() for p in parameters}.values())


def parameters_of(optimizer: OptimizerLike) -> list[nn.Parameter]:
    """Return the parameters in the groups of an optimizer."""
    return [p for group in optimizer.param_groups for p in group["params"]]


_NAMES = {"precision": "amp()", "step": "microbatch()", "window": "accumulate(dtype=...)"}


def shown(value: Any) -> str:
    """Return the beginning of a repr in one line, for a message."""
    if isinstance(value, torch.Tensor) and not nn.parameter.is_lazy(value):
        shape = "nested" if value.is_nested else f"of shape {tuple(value.shape)}"
        return f"a {value.dtype} tensor {shape} on {value.device}"
    return " ".join(repr(value).split())[:60]


def check(ok: bool, kind: type[Exception], message: str) -> None:
    """Raise ``kind(message)`` unless ``ok``."""
    if not ok:
        raise kind(message)


def check_plan(plan: Plan) -> torch.device:
    """Raise ValueError for a plan that cannot train; return the device of its first parameter."""
    parameters = plan.parameters()
    none = "a step has no parameters to train: `train_step(optimizer)`, or `accumulate(4, model)`"
    check(bool(parameters), ValueError, none)
    once = "a parameter is in the optimizer twice: `AdamW(dict.fromkeys(parameters))`"
    check(len({*map(id, parameters)}) == len(parameters), ValueError, once)
    hooked = any(getattr(p, "_post_accumulate_grad_hooks", None) for p in parameters)
    check(not hooked, ValueError, "hooks after accumulation see partial sums: `handle.remove()`")
    looks = plan.precision is not None or plan.max_norm is not None or plan.max_skips is None
    check(looks, ValueError, "max_skips needs a finite check: add `amp()` or `max_norm=math.inf`")
    return parameters[0].device


def check_length(n: Any) -> float:
    """Return n if it is a number of micro-batches, inf for None; else TypeError or ValueError."""
    if n is None:
        return math.inf
    check_count(n, f"n counts micro-batches, an int of at least 1, got {shown(n)}: `accumulate(4)`")
    return int(n)


def check_count(n: Any, wanted: str) -> None:
    """Raise TypeError or ValueError unless n is an integer of at least 1."""
    check(isinstance(n, numbers.Integral) and not isinstance(n, bool), TypeError, wanted)
    check(1 <= n <= sys.maxsize, ValueError, wanted)


def optimizers_of(given: Any) -> tuple[OptimizerLike, ...]:
    """Return one or several optimizers as a tuple; TypeError or ValueError for anything else."""
    found = tuple(given) if isinstance(given, (list, tuple)) else (given,)
    for one in found:
        if isinstance(one, type) or not all(hasattr(one, name) for name in ABILITIES):
            from trainkit.advice import not_an_optimizer

            raise not_an_optimizer(one)
    remedy = "`train_step([optimizer_a, optimizer_b])`"
    check(bool(found), ValueError, f"got no optimizer: {remedy}")
    is_once = len({id(one) for one in found}) == len(found)
    check(is_once, ValueError, f"an optimizer was given twice, and would step twice: {remedy}")
    return found


def check_stepping(plan: Plan) -> None:
    """Raise ValueError or TypeError if a step cannot step the optimizers itself."""
    remedy = "`train_step(optimizer)`, or `yield loss`"
    check(bool(plan.optimizers), ValueError, f"no optimizer was given: {remedy}")
    for one in plan.optimizers:
        try:
            closure = inspect.signature(one.step).parameters.get("closure")
        except (TypeError, ValueError):  # it may be written in C, or a mock
            closure = None
        needs_one = hasattr(one, "first_step") or (closure and closure.default is closure.empty)
        fault = f"{type(one).__name__}.step runs the loss again, and needs a closure"
        check(not needs_one, TypeError, f"{fault}: `yield loss`, and step the optimizer below it")


def options_of(
    module: Any = None, max_norm: Any = None, norm_type: Any = 2.0, max_skips: Any = None
) -> dict[str, Any]:
    """Return these as entries of a plan; TypeError or ValueError if one does not fit."""
    fits = module is None or (isinstance(module, nn.Module) and hasattr(module, "_modules"))
    fault = f"got {type(module).__name__}: `module=model`"
    check(fits, TypeError, f"module must be the torch.nn.Module to train, {fault}")
    given = {"max_norm": max_norm, "norm_type": norm_type, "max_skips": max_skips}
    for name, value in given.items():
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        fits = is_number or (value is None and name != "norm_type")
        check(fits, TypeError, f"{name} must be a number, got {value!r}: `{name}=2`")
    float32 = torch.finfo(torch.float32)
    fits = max_norm is None or float32.tiny <= max_norm <= float32.max or max_norm == math.inf
    wanted = f"max_norm must be a float32 above 0 or math.inf, got {max_norm}: `max_norm=1.0`"
    check(fits, ValueError, wanted)
    fits = norm_type in (1, 2, math.inf)  # 0 would miss a nan, and large ones overflow
    check(fits, ValueError, f"norm_type must be 1, 2 or math.inf, got {norm_type}: `norm_type=2`")
    wanted = f"max_skips counts updates, an int or math.inf, got {max_skips!r}: `max_skips=25`"
    if max_skips not in (None, math.inf):
        check_count(max_skips, wanted)
    return given | {"modules": () if module is None else (module,)}
