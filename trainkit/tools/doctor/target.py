"""MODULE:FUNCTION: the user's function that makes the model, the batch and the loss function."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

_LOSS = "`return model, batch, loss_fn`, where `loss_fn(model, batch)` is the loss"


class WrongTarget(Exception):
    """Something on the command line cannot be tried; the message says what to type."""


class Target(NamedTuple):
    """What a trial is given."""

    model: nn.Module
    batch: Any
    loss_fn: Callable[[nn.Module, Any], Any]


def load(target: str) -> Target:
    """Call the function that MODULE:FUNCTION names; errors of the user's own pass through."""
    path, _, name = target.partition(":")
    module_name = path.removesuffix(".py").replace("/", ".").strip(".")
    if not module_name or not name:
        raise WrongTarget(f"{target!r} is not MODULE:FUNCTION: `doctor train:make_model`")
    function = getattr(importlib.import_module(module_name), name, None)
    if not callable(function):
        raise WrongTarget(f"{module_name} has no function {name!r}: `doctor {module_name}:NAME`")
    made = function()
    items = tuple(made) if isinstance(made, (tuple, list)) else (made,)
    model, batch, loss_fn = (*items, None, None)[:3]
    is_batch = isinstance(batch, (Tensor, tuple, list, Mapping))
    if not isinstance(model, nn.Module) or not is_batch or not callable(loss_fn or loss_of):
        types = ", ".join(type(item).__name__ for item in items)
        raise WrongTarget(f"{target} returned {types}: `return model, batch`, or {_LOSS}")
    return Target(model, batch, loss_fn or loss_of)


def loss_of(model: nn.Module, batch: Any) -> Any:
    """Call a model that returns its own loss."""
    if isinstance(batch, Mapping):
        output = model(**batch)
    else:
        output = model(*batch) if isinstance(batch, (tuple, list)) else model(batch)
    if isinstance(output, Tensor) and output.dim():
        shape = tuple(output.shape)
        raise WrongTarget(f"the model returns a tensor of shape {shape} and no loss: {_LOSS}")
    return output
