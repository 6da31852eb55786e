"""What ``frozen`` and ``recompute`` have in common: a block, a decorator, and a part of a step."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, ParamSpec, TypeVar

# A compiled graph has no modes and flags. torch.compiler.disable imports the compiler: seconds.
from torch._compile import _disable_dynamo
from torch import nn

P = ParamSpec("P")
R = TypeVar("R")

_LATE = types.GeneratorType, types.CoroutineType, types.AsyncGeneratorType


class Block:
    """Base of a context manager that a step enters around each micro-batch."""

    def __init__(self) -> None:
        self._entered: list[AbstractContextManager[list[str]]] = []

    def around_step(self) -> AbstractContextManager[list[str]]:
        """Return a new context, which a step enters around each micro-batch."""
        raise NotImplementedError

    @_disable_dynamo
    def __enter__(self) -> list[str]:
        context = self.around_step()
        names = context.__enter__()
        self._entered += [context]  # not a call, after which Ctrl-C could come
        return names

    @_disable_dynamo
    def __exit__(self, *exception: Any) -> None:
        self._entered.pop().__exit__(*exception)

    def __call__(self, function: Callable[P, R]) -> Callable[P, R]:
        """Decorate a function, or join the plan of a training step."""
        name = type(self).__name__
        add_part = getattr(function, "_add_part", None)
        if add_part is not None:
            return add_part(self)  # type: ignore[no-any-return]
        if not callable(function) or isinstance(function, (nn.Module, Block)):
            raise TypeError(
                f"{name} decorates functions, got {function!r:.60}: `with {name}(model, layers):`"
            )
        kinds = inspect.isgeneratorfunction, inspect.iscoroutinefunction, inspect.isasyncgenfunction
        too_late = (
            f"{function!r:.60} runs after its call, outside of the block: make {name} a part, "
            f"`train_step(optimizer, {name}(model, layers))`"
        )
        if any(is_kind(function) for is_kind in kinds):
            raise TypeError(too_late)

        @functools.wraps(function)
        def inside_block(*args: P.args, **kwargs: P.kwargs) -> R:
            with self:
                value = function(*args, **kwargs)
            if isinstance(value, _LATE):
                getattr(value, "close", bool)()  # or Python warns of a coroutine never awaited
                raise TypeError(too_late)
            return value

        # A step made of this function enters the block around backward and update too.
        parts = (*getattr(function, "__trainkit_parts__", ()), self)
        inside_block.__trainkit_parts__ = parts  # type: ignore[attr-defined]
        return inside_block
