"""What a step function hands over: a loss, perhaps a weight, and whatever is beside them."""

from __future__ import annotations

import copy
import math
import numbers
import types
from collections.abc import Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn

from trainkit.core.plan import shown


def read_loss(output: Any) -> tuple[Tensor, Any]:
    """Return the loss, and its weight or None; TypeError or ValueError for any other output."""
    weight: Any = None
    kind: type = numbers.Integral
    if isinstance(output, tuple) and len(output) == 2 and not hasattr(output, "loss"):
        output, weight = output
    if not isinstance(output, Tensor):
        found = output
        if not isinstance(output, Mapping):
            found = {name: getattr(output, name, None) for name in ("loss", "weight")}
        if weight is None:
            weight, kind = found.get("weight"), numbers.Real
        output = output if found.get("loss") is None else found["loss"]
    is_scalar = isinstance(output, Tensor) and output.is_floating_point() and not output.dim()
    if not is_scalar or not output.requires_grad:
        from trainkit.advice import no_loss

        raise no_loss(output)
    if weight is not None:
        _check_weight(weight, kind)
    return output, weight


def detached(value: Any, memo: dict[int, Any] | None = None) -> Any:
    """Return a value with every tensor in it detached, at any depth, and all else as it was."""
    if isinstance(value, Tensor):
        return value.detach()
    memo = {} if memo is None else memo
    if isinstance(value, _WHOLE) or id(value) in memo:
        return memo.get(id(value), value)
    found = memo[id(value)] = value  # where a cycle ends
    if isinstance(value, (tuple, list, set, frozenset)):
        items = []
        for item in value:
            if isinstance(item, Tensor):  # without a call
                item = item.detach()
            elif not isinstance(item, _WHOLE):
                item = detached(item, memo)
            items.append(item)
        found = type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    elif isinstance(value, Mapping):
        found = copy.copy(value) if isinstance(value, MutableMapping) else dict(value)
        for name, item in value.items():
            found[name] = detached(item, memo)
    elif hasattr(value, "__dict__"):
        own = {name: detached(item, memo) for name, item in vars(value).items()}
        if any(own[name] is not item for name, item in vars(value).items()):
            found = copy.copy(value)
            vars(found).update(own)
    memo[id(value)] = found
    return found


_WHOLE = (int, float, str, bytes, type(None), type, nn.Module, types.FunctionType, types.ModuleType)


def _check_weight(weight: Any, kind: type) -> None:
    """Accept integers; real numbers too where they were given under the name ``weight``."""
    sample = weight
    if isinstance(weight, Tensor) and not (weight.dim() or weight.is_meta or weight.is_complex()):
        sample = 0.5 if weight.is_floating_point() else weight.dtype == torch.bool or 1
    if isinstance(sample, bool) or not isinstance(sample, kind):
        raise TypeError(
            f"the weight of a loss is an int or a 0-d integer tensor, got {shown(weight)}: "
            "`return loss, mask.sum()`, or all by name, `{'loss': loss, 'logits': logits}`"
        )
    most = 2**1023 if isinstance(weight, int) else math.inf
    if not isinstance(weight, Tensor) and not 0 <= weight < most:
        raise ValueError(f"a weight must be finite and at least 0, got {weight}: `len(batch)`")
