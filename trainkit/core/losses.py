"""What a step function hands over: a loss, and perhaps a weight."""

from __future__ import annotations

import numbers
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from trainkit.core.window import Weight


def read_loss(output: Any) -> tuple[Tensor, Weight | None]:
    """The loss and the weight in what a step function handed over; TypeError or ValueError for anything else."""
    weight: Any = None
    given: Any = None
    if not isinstance(output, Tensor):
        if isinstance(output, tuple) and not hasattr(output, "loss"):
            if len(output) != 2:
                raise TypeError(_WANTED.format(f"a tuple of {len(output)}"))
            output, weight = output
            if (
                not isinstance(output, Tensor)
                and isinstance(weight, Tensor)
                and weight.requires_grad
            ):
                raise TypeError(
                    "the loss is the first of two values, and this one came second: `return loss, weight`"
                )
            check_weight(weight)
        if isinstance(output, Mapping) and "loss" in output:
            output, given = output["loss"], output.get("weight")
        elif not isinstance(output, Tensor) and hasattr(output, "loss"):
            output, given = output.loss, getattr(output, "weight", None)
        if weight is None and given is not None:
            weight = given
            check_weight(weight, real=True)
    check_loss(output)
    return output, weight


_WANTED = (
    "a step function hands over the loss of one micro-batch, and not {}: return (or yield) `loss`, `loss, weight`, "
    "`{{'loss': loss, 'weight': weight}}`, or a model's output that has a loss"
)


def check_loss(loss: Any) -> None:
    """Raises TypeError or ValueError unless this is a 0-d floating tensor with a graph."""
    if not isinstance(loss, Tensor):
        hint = " (a model's output has a loss only when labels were given)" if loss is None else ""
        raise TypeError(_WANTED.format(f"{_shown(loss)}") + hint)
    if loss.dim() != 0:
        raise ValueError(
            f"the loss must be a single number, but has shape {_shape(loss)}: `loss.mean()` over the micro-batch is what is "
            "averaged over the window"
        )
    if not loss.is_floating_point():
        raise TypeError(
            f"the loss must be a floating-point tensor, but is {loss.dtype}: the first of two values is the loss"
        )
    if not loss.requires_grad:
        raise ValueError(
            "the loss has no graph, so nothing would be learned: return it without `.item()`, `.detach()` or "
            "`torch.no_grad()`, and check that not every parameter it depends on is frozen (a tied head is, with its "
            "embedding); under frozen layers, activation checkpointing needs `use_reentrant=False`"
        )


def check_weight(weight: Any, real: bool = False) -> None:
    """Raises TypeError or ValueError unless this is a count: an int, or a 0-d integer tensor; any number where ``real``."""
    if isinstance(weight, Tensor):
        if weight.dim() != 0:
            raise TypeError(_NOT_A_COUNT.format(f"a tensor of shape {_shape(weight)}"))
        integral = (
            not weight.is_floating_point()
            and not weight.is_complex()
            and weight.dtype != torch.bool
        )
        if weight.is_meta or (not integral and not (real and weight.is_floating_point())):
            raise TypeError(_NOT_A_COUNT.format(f"a {weight.dtype} tensor on {weight.device}"))
        return
    number = numbers.Real if real else numbers.Integral
    if isinstance(weight, bool) or not isinstance(weight, number):
        raise TypeError(_NOT_A_COUNT.format(_shown(weight)))
    if not 0 <= weight <= sys.float_info.max:  # type: ignore[operator]  # a nan compares false; an int may be too large
        raise ValueError(
            f"a weight says how many things the loss is the mean of; it must be finite and >= 0, got {weight}: `len(batch)`"
        )


_NOT_A_COUNT = (
    "the second of two values is the weight: how many things (rows, tokens) the loss is the mean of, an int or an integer 0-d "
    "tensor; got {}. Return `loss, mask.sum()`; or, if this is a metric or a prediction, the loss alone; or, for a real-valued "
    "weight, `{{'loss': loss, 'weight': weight}}`"
)


def _shape(tensor: Tensor) -> Any:
    return "of a nested tensor" if tensor.is_nested else tuple(tensor.shape)


def _shown(value: Any) -> str:
    text = " ".join(repr(value).split())
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({type(value).__name__})"
