"""A batch as the arguments of a call, whatever tensors are in it, and how it is cut along its rows."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any

from torch import Tensor


class Batch:
    """The arguments of a call, which can be taken in chunks.

    Tensors are cut along their first dimension, in tuples, lists and mappings at any depth. What is no tensor, or has no
    dimension, goes to every chunk as it is.
    """

    def __init__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self._arguments = (args, dict(kwargs))
        found = list(tensors(self._arguments))
        lengths = {len(tensor) for tensor in found}
        if not found:
            raise ValueError(
                f"microbatch found no tensor to cut in {[type(value).__name__ for value in (*args, *kwargs.values())]}; it cuts "
                "tensors along their first dimension, also in tuples, lists and mappings: `step(inputs, targets)`"
            )
        if len(lengths) > 1:
            raise ValueError(
                "microbatch cuts tensors along their first dimension, and these differ in it: "
                f"{[tuple(tensor.shape) for tensor in found]}; bind what is no part of the batch beforehand, "
                "`functools.partial(function, table=table)`"
            )
        (self.rows,) = lengths
        # By this, more or less, the memory that a row needs is known before it is needed.
        self.size_of_row = sum(tensor.numel() for tensor in found) // max(self.rows, 1)

    def chunk(self, start: int, stop: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of the call for some of the rows: views, no copies."""
        arguments: tuple[tuple[Any, ...], dict[str, Any]]
        arguments = mapped(
            self._arguments, lambda tensor: tensor[start:stop] if tensor.dim() else tensor
        )
        return arguments


def tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in a batch that have rows."""
    if isinstance(value, Tensor):
        if value.dim():
            yield value
    elif isinstance(value, (tuple, list, Mapping)):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from tensors(item)


def mapped(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """A batch with something else in place of each of its tensors; the same where there are none."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, (tuple, list)):
        items = [mapped(item, function) for item in value]
        return (
            type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
        )  # a named tuple takes them one by one
    if isinstance(value, Mapping):
        # A copy keeps what else a mapping has, as the BatchEncoding of a tokenizer does.
        found = copy.copy(value) if isinstance(value, MutableMapping) else dict(value)
        for name, item in value.items():
            found[name] = mapped(item, function)
        return found
    return value
