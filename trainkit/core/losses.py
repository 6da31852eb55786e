"""What a step function returns or yields: a loss, perhaps a weight, and other values."""

from __future__ import annotations

import collections
import copy
import gc
import math
import numbers
import types
from collections.abc import Mapping
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


def detached(value: Any) -> Any:
    """Return a copy of a value with every tensor in it detached, at any depth.

    Objects with no tensor in them are not copied. None for a value that cannot be copied.
    """
    if isinstance(value, _SINGLE):
        return value.detach() if isinstance(value, Tensor) else value
    if type(value) is tuple and len(value) == 2:  # a loss with its weight, without a search
        loss, weight = value
        if isinstance(loss, Tensor) and isinstance(weight, (Tensor, int)):
            return loss.detach(), weight.detach() if isinstance(weight, Tensor) else weight
    inside, holders = [value], collections.defaultdict[int, list[int]](list)
    memo, tensors = {id(value): value}, {}
    for holder in inside:  # which grows
        for item in gc.get_referents(holder):
            if type(item) in _ATOMS:
                continue
            if isinstance(item, Tensor):
                tensors[id(item)] = item
            elif id(item) not in memo:
                memo[id(item)] = item
                if not isinstance(item, _SINGLE):
                    inside.append(item)
            holders[id(item)].append(id(holder))
    lead_to_tensors = list(tensors)
    for key in lead_to_tensors:
        for holder_key in holders.pop(key, ()):
            memo.pop(holder_key, None)
            lead_to_tensors.append(holder_key)
    try:
        return copy.deepcopy(value, memo | {key: x.detach() for key, x in tensors.items()})
    except Exception:  # for example a mappingproxy; the step has its loss all the same
        return None


_ATOMS: frozenset[type] = frozenset({int, float, bool, str, bytes, type(None)})
_SINGLE: tuple[type, ...] = (  # what is not searched
    *(Tensor, *_ATOMS, type, nn.Module, torch.optim.Optimizer),
    *(types.FunctionType, types.BuiltinFunctionType, types.ModuleType, types.CodeType),
    *(types.FrameType, types.GeneratorType),
)


def _check_weight(weight: Any, kind: type) -> None:
    """Accept integers; real numbers too where they were given under the name ``weight``."""
    sample = weight
    if isinstance(weight, Tensor) and not (weight.dim() or weight.is_meta or weight.is_complex()):
        sample = 0.5 if weight.is_floating_point() else weight.dtype == torch.bool or 1
    if isinstance(sample, bool) or not isinstance(sample, kind):
        raise TypeError(
            f"the weight of a loss is an int or a 0-d integer tensor, got {shown(weight)}: "
            "`return loss, mask.sum()`, or by name, `{'loss': loss, 'weight': weight, ...}`"
        )
    most = 2**1023 if isinstance(weight, int) else math.inf
    if not isinstance(weight, Tensor) and not 0 <= weight < most:
        raise ValueError(f"a weight must be finite and at least 0, got {weight}: `len(batch)`")
