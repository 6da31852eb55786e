"""What ``frozen`` and ``recompute`` have in common: a block, a decorator, and a part of a step."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, TypeVar

from torch import nn
from torch._compile import _disable_dynamo

F = TypeVar("F", bound=Callable[..., Any])
_RUNS_LATER = types.GeneratorType, types.CoroutineType, types.AsyncGeneratorType


class Block:
    """Base class of a ``with`` block that is a decorator and a part of a step as well."""

    around_step: Callable[[], AbstractContextManager[list[str]]]

    def __init__(self) -> None:
        self._entered: list[AbstractContextManager[list[str]]] = []

    # A compiled graph leaves out flags and modes. The public decorator imports the compiler.
    @_disable_dynamo
    def __enter__(self) -> list[str]:
        context = self.around_step()
        names = context.__enter__()
        self._entered += [context]  # no call: Ctrl-C may come after a call
        return names

    @_disable_dynamo
    def __exit__(self, *exception: Any) -> None:
        self._entered.pop().__exit__(*exception)

    def __call__(self, function: F) -> F:
        """Decorate a function, or join the plan of a training step."""
        name = type(self).__name__
        if hasattr(function, "_add_part"):
            return function._add_part(self)  # type: ignore[no-any-return]
        if not callable(function) or isinstance(function, (nn.Module, Block)):
            call = f"`with {name}(model, layers):`"
            raise TypeError(f"{name} decorates functions, got {function!r:.60}: {call}")

        @functools.wraps(function)
        def inside_block(*args: Any, **kwargs: Any) -> Any:
            with self:
                value = function(*args, **kwargs)
            if isinstance(value, _RUNS_LATER):
                getattr(value, "close", bool)()  # or Python warns of a coroutine that never ran
                call = f"`train_step(optimizer, {name}(model, layers))`"
                raise TypeError(f"{function!r:.60} runs later, outside of the block: {call}")
            return value

        # A step made of this function enters the block around backward and update too.
        parts = (*getattr(function, "__trainkit_parts__", ()), self)
        inside_block.__trainkit_parts__ = parts  # type: ignore[attr-defined]
        return inside_block  # type: ignore[return-value]
