"""The plan of a step: everything its parts ask for, as one immutable value. Plans add up, in any order."""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import nn
from torch.optim import Optimizer


@runtime_checkable
class Surrounding(Protocol):
    """A part that is a context around every micro-batch: its forward, its backward and the update it may bring."""

    def around_step(self) -> AbstractContextManager[Any]:
        """A new context manager for one micro-batch."""


@dataclass(frozen=True)
class Precision:
    """What ``amp`` asks for; see there."""

    dtype: torch.dtype | None
    device: str | None
    init_scale: float
    growth_interval: int

    def resolve(self, device: torch.device) -> tuple[str, torch.dtype]:
        """The device type and the dtype of autocast, for a model on ``device``."""
        device_type = self.device or device.type
        return device_type, self.dtype or native_dtype(device_type)


@dataclass(frozen=True)
class Plan:
    """What is to be done, without any state. ``a + b`` is ``b + a``; what can be given only once raises ValueError in both."""

    optimizers: tuple[Optimizer, ...] = ()
    modules: tuple[nn.Module, ...] = ()
    lengths: tuple[int | Callable[[int], int], ...] = ()
    sum_dtype: torch.dtype | None = None
    precision: Precision | None = None
    max_norm: float | None = None
    norm_type: float = 2.0
    max_skips: float | None = None
    after: tuple[Callable[[], Any], ...] = ()
    surroundings: tuple[Surrounding, ...] = ()
    chunk: int | Literal["auto"] | None = None
    step_type: type | None = None  # the class of the step, where it is not Step itself

    def __add__(self, other: Plan) -> Plan:
        if self.optimizers and other.optimizers:
            raise ValueError(
                "optimizers were given twice; give them together: `train_step([optimizer_a, optimizer_b], ...)`"
            )
        if self.precision and other.precision:
            raise ValueError(
                "amp was given twice, and a step runs in one precision: leave out one of the two"
            )
        if self.max_norm is not None and other.max_norm is not None:
            raise ValueError(
                f"max_norm was given twice, {self.max_norm} and {other.max_norm}: leave out one of the two"
            )
        if self.chunk and other.chunk:
            raise ValueError(
                f"microbatch was given twice, {self.chunk!r} and {other.chunk!r}: leave out one of the two"
            )
        if self.max_skips is not None and other.max_skips is not None:
            raise ValueError(
                f"max_skips was given twice, {self.max_skips} and {other.max_skips}: leave out one of the two"
            )
        norm_types = {self.norm_type, other.norm_type} - {2.0}
        if len(norm_types) == 2:
            raise ValueError(
                f"norm_type was given twice, {self.norm_type} and {other.norm_type}: leave out one of the two"
            )
        return Plan(
            optimizers=self.optimizers or other.optimizers,
            modules=self.modules + tuple(m for m in other.modules if m not in self.modules),
            lengths=self.lengths + other.lengths,
            sum_dtype=self.sum_dtype or other.sum_dtype,
            precision=self.precision or other.precision,
            max_norm=self.max_norm if self.max_norm is not None else other.max_norm,
            norm_type=norm_types.pop() if norm_types else 2.0,
            max_skips=self.max_skips if self.max_skips is not None else other.max_skips,
            after=self.after + other.after,
            surroundings=self.surroundings + other.surroundings,
            chunk=self.chunk or other.chunk,
            step_type=self.step_type or other.step_type,
        )

    def length(self, updates: Callable[[], int]) -> int:
        """The number of micro-batches in the next window. ``updates`` is asked only where it matters."""
        length = 1
        for n in self.lengths:
            length *= (
                n if isinstance(n, int) else check_length(n(updates()), f"{_name(n)} returned")
            )
        return length

    def parameters_by_optimizer(self) -> list[list[nn.Parameter]]:
        """The parameters of each optimizer; or those of the modules, where there is no optimizer."""
        if self.optimizers:
            return [
                [p for group in optimizer.param_groups for p in group["params"]]
                for optimizer in self.optimizers
            ]
        return [list(module.parameters()) for module in self.modules]

    def parameters(self) -> list[nn.Parameter]:
        """The parameters whose gradients make the update, each once."""
        found = self.parameters_by_optimizer()
        if len(found) == 1:
            return found[0]
        return list({id(p): p for parameters in found for p in parameters}.values())


def current_device() -> torch.device:
    """The accelerator of this machine, if there is one that works; else the CPU."""
    # Asked first: without it torch names the accelerator that it was built for.
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return found or torch.device("cpu")


def native_dtype(device_type: str) -> torch.dtype:
    """The half precision that a device computes natively: bfloat16 where it can, else float16."""
    if device_type == "cuda":
        # Without the argument torch answers True on a T4, where bfloat16 is emulated and slower than float32.
        return (
            torch.bfloat16
            if torch.cuda.is_bf16_supported(including_emulation=False)
            else torch.float16
        )
    return torch.float16 if device_type == "mps" else torch.bfloat16


def check_length(n: Any, received: str) -> int:
    """n, if it is a number of micro-batches; else TypeError or ValueError. ``received`` says where it came from."""
    if isinstance(n, bool) or not isinstance(n, int):
        raise TypeError(
            f"{received} {n!r}; n counts the micro-batches of a window, an int: `accumulate(4)`"
        )
    if n < 1:
        raise ValueError(
            f"{received} {n}; a window has at least one micro-batch: `accumulate(1)` changes nothing"
        )
    if n > sys.maxsize:
        raise ValueError(
            f"{received} a number of {n.bit_length()} bits; a window that ends only with its loader is `accumulate(sys.maxsize)`"
        )
    return n


def check_optimizers(optimizers: Any) -> tuple[Optimizer, ...]:
    """One or several optimizers as a tuple; TypeError or ValueError for anything else."""
    found = tuple(optimizers) if isinstance(optimizers, (list, tuple)) else (optimizers,)
    for optimizer in found:
        if isinstance(optimizer, Optimizer):
            step = getattr(type(optimizer), "step", None)  # which a mock of an optimizer has not
            closure = None if step is None else inspect.signature(step).parameters.get("closure")
            if closure is not None and closure.default is inspect.Parameter.empty:
                raise TypeError(
                    f"{_name(optimizer)}.step needs a closure that evaluates the loss again, and a step function is called once: "
                    "call `optimizer.step(closure)` yourself"
                )
            continue
        remedy = "`train_step(optimizer, ...)` or `amp(optimizer, ...)`, with `optimizer = torch.optim.AdamW(model.parameters())`"
        if isinstance(optimizer, nn.Module):
            raise TypeError(
                f"got a module, of type {_name(optimizer)}, where an optimizer belongs: {remedy}"
            )
        if isinstance(optimizer, torch.dtype):
            remedy = f"for the dtype of autocast, `amp(dtype={optimizer})`"
        raise TypeError(f"got {optimizer!r} where an optimizer belongs: {remedy}")
    if not found:
        raise ValueError(
            "got no optimizer: `train_step(optimizer)`, or several as `train_step([optimizer_a, optimizer_b])`"
        )
    if len({id(optimizer) for optimizer in found}) < len(found):
        raise ValueError(
            "the same optimizer was given twice, and would step twice: give each once, `train_step([optimizer_a, optimizer_b])`"
        )
    return found


def check_module(module: Any) -> tuple[nn.Module, ...]:
    """A module as a tuple, empty for None; TypeError for anything else."""
    if module is None:
        return ()
    if not isinstance(module, nn.Module) or not hasattr(module, "_modules"):
        hint = (
            "optimizers go to `train_step(optimizer, ...)`"
            if isinstance(module, Optimizer)
            else "`module=model`"
        )
        raise TypeError(
            f"module must be the torch.nn.Module to be trained, got an object of type {type(module).__name__}: {hint}"
        )
    return (module,)


def check_clipping(max_norm: Any, norm_type: Any) -> tuple[float | None, float]:
    """max_norm and norm_type as floats; TypeError or ValueError for what is none."""
    for name, value in (("max_norm", max_norm), ("norm_type", norm_type)):
        if isinstance(value, bool) or not (
            isinstance(value, (int, float)) or (value is None and name == "max_norm")
        ):
            raise TypeError(
                f"{name} must be a number, got {value!r}: `{name}={2.0 if name == 'norm_type' else 1.0}`"
            )
    float32 = torch.finfo(torch.float32)
    if max_norm is not None and not (
        float32.tiny <= max_norm <= float32.max or max_norm == math.inf
    ):
        raise ValueError(
            f"max_norm must be above 0 and in the range of float32, got {max_norm}: `max_norm=1.0` clips, `math.inf` only "
            "checks for finite gradients"
        )
    if norm_type not in (1, 2, math.inf):
        raise ValueError(
            f"norm_type must be 1, 2 or math.inf, got {norm_type}: `norm_type=2.0`; 0 would miss a nan, and large ones overflow"
        )
    return (None if max_norm is None else float(max_norm)), float(norm_type)


def check_max_skips(max_skips: Any) -> float | None:
    """max_skips, if it is a number of updates or inf; else TypeError or ValueError."""
    if max_skips is None or (isinstance(max_skips, float) and max_skips == math.inf):
        return max_skips
    if isinstance(max_skips, bool) or not isinstance(max_skips, int):
        raise TypeError(
            f"max_skips counts updates, an int or math.inf, got {max_skips!r}: `max_skips=25`"
        )
    if max_skips < 1:
        raise ValueError(
            f"max_skips must be at least 1, got {max_skips}: `max_skips=25`, or `math.inf` to go on for ever"
        )
    return max_skips


def _name(thing: Any) -> str:
    return getattr(thing, "__name__", type(thing).__name__)
