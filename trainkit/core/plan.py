"""The plan of a step: what its parts ask for, as one value. Plans add up in any order."""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn
from torch.optim import Optimizer

from trainkit.core.precision import Precision


@runtime_checkable
class Surrounding(Protocol):
    """A part that is a context around every micro-batch: forward, backward and the update."""

    def around_step(self) -> AbstractContextManager[Any]:
        """Return a new context manager for one micro-batch."""


@dataclass(frozen=True)
class Plan:
    """What a step is to do, without any state. ``a + b`` is ``b + a``."""

    # Plans add these up.
    modules: tuple[nn.Module, ...] = ()
    lengths: tuple[int | Callable[[int], int], ...] = ()
    after: tuple[Callable[[], Any], ...] = ()
    surroundings: tuple[Surrounding, ...] = ()
    # One plan has each of these.
    optimizers: tuple[Optimizer, ...] = ()
    precision: Precision | None = None
    max_norm: float | None = None
    norm_type: float = 2.0
    max_skips: float | None = None
    window: Callable[..., Any] | None = None  # the kind of window, if it is not Window
    step: Callable[..., Any] | None = None  # the kind of step, if it is not Step

    def __add__(self, other: Plan) -> Plan:
        """Return both plans in one; ValueError for what both have and one plan can have."""
        both = {}
        for field in fields(Plan):
            a, b = getattr(self, field.name), getattr(other, field.name)
            if field.name in ("modules", "lengths", "after", "surroundings"):
                both[field.name] = a + b
            elif a == field.default or b == field.default:
                both[field.name] = b if a == field.default else a
            else:
                what, shown = _GIVEN.get(field.name, (f"{field.name} was", f", {a} and {b}"))
                raise ValueError(f"{what} given twice{shown}: give it to one of the parts")
        return Plan(**both)

    def optimized(self) -> list[list[nn.Parameter]]:
        """Return the parameters of each optimizer, or without optimizers of each module."""
        if self.optimizers:
            return [[p for g in o.param_groups for p in g["params"]] for o in self.optimizers]
        return [list(module.parameters()) for module in self.modules]

    def parameters(self) -> list[nn.Parameter]:
        """Return the parameters whose gradients make the update, each once."""
        if len(self.optimizers) == 1 and len(groups := self.optimizers[0].param_groups) == 1:
            found: list[nn.Parameter] = groups[0]["params"]
            return found
        return list({id(p): p for parameters in self.optimized() for p in parameters}.values())

    def check_trainable(self) -> nn.Parameter:
        """Raise ValueError for a plan that cannot train; return its first parameter."""
        parameters = self.parameters()
        check(
            bool(parameters),
            ValueError,
            "nothing in this plan has parameters: give an optimizer, `train_step(optimizer, ...)`, "
            "or the module, `accumulate(4, module=model)`",
        )
        hooked = any(getattr(p, "_post_accumulate_grad_hooks", None) for p in parameters)
        check(
            not hooked,
            ValueError,
            "post-accumulate-gradient hooks, for example of an optimizer that steps in backward, "
            "would see scaled, incomplete gradients: `handle.remove()`, or `parameter.register_hook`",
        )
        looks = self.precision is not None or self.max_norm is not None
        check(
            looks or self.max_skips is None,
            ValueError,
            "max_skips needs a check for finite gradients: add `amp()` or `max_norm=math.inf`",
        )
        return parameters[0]


_GIVEN = {
    "optimizers": ("an optimizer was", ""),
    "precision": ("amp was", ""),
    "window": ("the dtype of the sums was", ""),
    "step": ("the kind of step was", ""),
}


def check(ok: bool, kind: type[Exception], message: str) -> None:
    """Raise ``kind(message)`` unless ``ok``."""
    if not ok:
        raise kind(message)


def check_length(n: Any) -> int:
    """Return n if it is a number of micro-batches, else raise TypeError or ValueError."""
    remedy = "n counts the micro-batches of a window, an int of at least 1: `accumulate(4)`"
    is_int = isinstance(n, int) and not isinstance(n, bool)
    check(is_int, TypeError, f"accumulate got {n!r:.60}; {remedy}")
    check(1 <= n <= sys.maxsize, ValueError, f"accumulate got {n!r:.60}; {remedy}")
    return int(n)


def check_optimizers(given: Any) -> tuple[Optimizer, ...]:
    """Return one or several optimizers as a tuple."""
    found = tuple(given) if isinstance(given, (list, tuple)) else (given,)
    for one in found:
        example = "`train_step(torch.optim.AdamW(model.parameters()))`"
        if isinstance(one, torch.dtype):
            example = f"`amp(dtype={one})`"
        came = f"{type(one).__name__} {one!r:.40}"
        check(isinstance(one, Optimizer), TypeError, f"{came} is not an optimizer: {example}")
        step = getattr(type(one), "step", None)  # a mock of an optimizer has none
        closure = None if step is None else inspect.signature(step).parameters.get("closure")
        check(
            closure is None or closure.default is not inspect.Parameter.empty,
            TypeError,
            f"{type(one).__name__}.step needs a closure that computes the loss again, and a step "
            "function is called once: call `optimizer.step(closure)` yourself",
        )
    remedy = "`train_step([optimizer_a, optimizer_b])`"
    check(bool(found), ValueError, f"got no optimizer: {remedy}")
    is_once = len({id(one) for one in found}) == len(found)
    check(
        is_once, ValueError, f"the same optimizer was given twice, and would step twice: {remedy}"
    )
    return found


def check_module(module: Any) -> tuple[nn.Module, ...]:
    """Return a module as a tuple, empty for None."""
    is_module = isinstance(module, nn.Module) and hasattr(module, "_modules")
    came = type(module).__name__
    check(
        module is None or is_module,
        TypeError,
        f"module must be the torch.nn.Module to be trained, got {came}: `module=model`",
    )
    return () if module is None else (module,)


def check_numbers(max_norm: Any, norm_type: Any, max_skips: Any) -> dict[str, Any]:
    """Return these as entries of a plan."""
    given = {"max_norm": max_norm, "norm_type": norm_type, "max_skips": max_skips}
    for name, value in given.items():
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        fits = is_number or (value is None and name != "norm_type")
        check(fits, TypeError, f"{name} must be a number, got {value!r}: `{name}=2`")
    float32 = torch.finfo(torch.float32)
    fits = max_norm is None or float32.tiny <= max_norm <= float32.max or max_norm == math.inf
    check(
        fits,
        ValueError,
        f"max_norm must be above 0 and in the range of float32, got {max_norm}: `max_norm=1.0` "
        "clips, `math.inf` only checks for finite gradients",
    )
    fits = norm_type in (1, 2, math.inf)  # 0 would miss a nan, and large ones overflow
    check(fits, ValueError, f"norm_type must be 1, 2 or math.inf, got {norm_type}: `norm_type=2`")
    fits = max_skips in (None, math.inf) or (isinstance(max_skips, int) and max_skips >= 1)
    check(
        fits,
        TypeError if isinstance(max_skips, float) and max_skips != -math.inf else ValueError,
        f"max_skips counts updates, an int of at least 1, got {max_skips}: `max_skips=25`, or "
        "`math.inf` for no limit",
    )
    given = {name: None if value is None else float(value) for name, value in given.items()}
    return given | {"max_skips": max_skips}
