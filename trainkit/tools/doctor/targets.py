"""What ``doctor MODULE:FUNCTION`` is given: the function, the model and the batch that it returns, and where they are to run."""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from trainkit.core.plan import current_device


class WrongTarget(Exception):
    """What was asked for on the command line cannot be tried; the message says what can."""


def find_function(target: str) -> Callable[[], Any]:
    """The function that MODULE:FUNCTION names; WrongTarget, with the corrected form, where there is none."""
    path, _, name = target.partition(":")
    module_name = path.removesuffix(".py").strip("./").replace("/", ".")
    if not module_name or path != module_name or not name.isidentifier():
        corrected = f"{module_name or 'train'}:{name if name.isidentifier() else 'make_model'}"
        raise WrongTarget(
            f"{target!r} is not MODULE:FUNCTION: `python -m trainkit doctor {corrected}`"
        )
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if not f"{module_name}.".startswith(f"{error.name}."):
            raise  # something that the module itself imports
        here = sorted(path.stem for path in Path().glob("*.py"))
        near = difflib.get_close_matches(module_name, here, 1) or ["train"]
        raise WrongTarget(
            f"there is no module {error.name!r} here: `python -m trainkit doctor {near[0]}:{name}`"
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        known = [
            key
            for key, value in vars(module).items()
            if inspect.isfunction(value) and value.__module__ == module_name
        ]
        near = difflib.get_close_matches(name, known, 1) or known[:1] or ["make_model"]
        what = (
            f"no function {name!r}"
            if function is None
            else f"for {name!r} an object of type {type(function).__name__}"
        )
        raise WrongTarget(
            f"{module_name} has {what}: `python -m trainkit doctor {module_name}:{near[0]}`"
        )
    with suppress(ValueError):  # what is not written in Python may not tell
        parameters = inspect.signature(function).parameters.values()
        needed = [
            p.name
            for p in parameters
            if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        ]
        if needed:
            raise WrongTarget(
                f"{name} is called without arguments, and needs {', '.join(needed)}: give them defaults"
            )
    return function  # type: ignore[no-any-return]


def make(
    target: str, function: Callable[[], Any]
) -> tuple[nn.Module, Any, Callable[..., Any] | None]:
    """What the function returns, the loss function None where there is none; WrongTarget for anything else."""
    made = function()
    items = tuple(made) if isinstance(made, (tuple, list)) else (made,)
    model, batch, loss_fn = (*items, None, None)[:3]
    is_batch = isinstance(batch, (Tensor, tuple, list, Mapping))
    if not (
        len(items) in (2, 3)
        and isinstance(model, nn.Module)
        and is_batch
        and (loss_fn is None or callable(loss_fn))
    ):
        came = ", ".join(type(item).__name__ for item in items)
        raise WrongTarget(
            f"{target} returned {came}: `return model, batch` or `return model, batch, loss_fn`, a module, a tensor, tuple or "
            "mapping, and a function of both"
        )
    parameters = list(model.parameters())
    if any(p.is_meta or is_lazy(p) for p in parameters) or not any(
        p.requires_grad for p in parameters
    ):
        raise WrongTarget(
            f"{target} returned a model whose parameters have no values yet, or none of which is trained: `model.to_empty(...)` "
            "or a first forward gives them values, `model.requires_grad_()` has them trained"
        )
    return model, batch, loss_fn


def place_of(device: str | None) -> torch.device:
    """The device of that name; for None the accelerator, or the CPU where there is none; WrongTarget if nothing runs there."""
    if device is None:
        return current_device()
    try:
        place = torch.ones(1, device=device)
        place.item()  # the meta device has no numbers
        return place.device
    except (RuntimeError, AssertionError) as error:  # torch has both for a device that is not there
        reason = str(error).partition("\n")[0]
        raise WrongTarget(
            f"nothing runs on --device {device}: {reason}; `--device cpu` runs everywhere"
        ) from error
