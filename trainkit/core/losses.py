"""What a step function hands over: a loss, and perhaps a weight."""

from __future__ import annotations

import numbers
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def read_loss(output: Any) -> tuple[Tensor, Any]:
    """Return the loss, and its weight or None; TypeError or ValueError for any other output."""
    weight, kind = None, numbers.Integral
    if isinstance(output, tuple) and not hasattr(output, "loss"):
        if len(output) != 2:
            raise TypeError(_WANTED.format(f"a tuple of {len(output)}"))
        output, weight = output
    if not isinstance(output, Tensor):
        found = output if isinstance(output, Mapping) else _Attributes(output)
        if weight is None:
            weight, kind = found.get("weight"), numbers.Real
        output = found.get("loss", output)
    _check_loss(output)
    if weight is not None:
        _check_weight(weight, kind)
    return output, weight


class _Attributes:
    """A model's output without the methods of a mapping."""

    def __init__(self, output: Any) -> None:
        self._output = output

    def get(self, name: str, default: Any = None) -> Any:
        has_loss = hasattr(self._output, "loss")  # an object without one may have a weight
        return getattr(self._output, name, default) if has_loss else default


_WANTED = (
    "a step function hands over the loss of one micro-batch, not {}: return (or yield) `loss`, "
    "`loss, weight`, `{{'loss': loss, 'weight': weight}}`, or a model's output that has a loss"
)


def _check_loss(loss: Any) -> None:
    if not isinstance(loss, Tensor):
        hint = " (a model's output has a loss only if it was given labels)" if loss is None else ""
        raise TypeError(_WANTED.format(_shown(loss)) + hint)
    if loss.dim() != 0:
        raise ValueError(
            f"the loss must be a single number, but is {_shown(loss)}: `loss.mean()` over the "
            "micro-batch"
        )
    if not loss.is_floating_point():
        raise TypeError(
            f"the loss must be a floating-point tensor, but is {_shown(loss)}: it comes first of "
            "two values, `return loss, weight`"
        )
    if not loss.requires_grad:
        raise ValueError(
            "the loss has no graph, so nothing would be learned: return it without `.item()`, "
            "`.detach()` or `torch.no_grad()`, and check that not everything below it is frozen"
        )


def _check_weight(weight: Any, kind: type) -> None:
    """Accept integers; real numbers too where they were given under the name ``weight``."""
    sample = weight
    if isinstance(weight, Tensor) and not (weight.dim() or weight.is_meta or weight.is_complex()):
        sample = 0.5 if weight.is_floating_point() else weight.dtype == torch.bool or 1
    if isinstance(sample, bool) or not isinstance(sample, kind):
        raise TypeError(
            "the second of two values is the weight, the number of things the loss is the mean of, "
            f"as an int or a 0-d integer tensor; got {_shown(weight)}: `return loss, mask.sum()`; "
            "a metric is not returned; for a real weight, `{'loss': loss, 'weight': weight}`"
        )
    if not isinstance(weight, Tensor) and not 0 <= weight <= sys.float_info.max:
        raise ValueError(f"a weight must be finite and at least 0, got {weight}: `len(batch)`")


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        shape = "nested" if value.is_nested else f"of shape {tuple(value.shape)}"
        return f"a {value.dtype} tensor {shape} on {value.device}"
    text = " ".join(repr(value).split())
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({type(value).__name__})"
