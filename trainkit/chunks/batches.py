"""A batch: the arguments of a call, and how they are cut along the rows of their tensors."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any

from torch import Tensor

from trainkit.core.plan import check


class Batch:
    """The arguments of a call, which can be taken in chunks of their rows.

    Tensors are cut along their first dimension, in tuples, lists and mappings at any depth. Every
    chunk gets everything else whole, and tensors without a dimension too.
    """

    def __init__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self._arguments = (args, dict(kwargs))
        found = list(tensors(self._arguments))
        names = [type(value).__name__ for value in (*args, *kwargs.values())]
        none = f"microbatch cuts tensors along their first dimension, got only {names}"
        check(bool(found), ValueError, f"{none}: `step(inputs, targets)`")
        shapes = [tuple(tensor.shape) for tensor in found]
        differ = f"microbatch cuts tensors along their first dimension, and these differ: {shapes}"
        remedy = "`functools.partial(function, table=table)` binds what is not of the batch"
        check(len({shape[0] for shape in shapes}) == 1, ValueError, f"{differ}; {remedy}")
        self.rows = len(found[0])
        # What a row needs in memory is roughly proportional to this.
        self.size_of_row = sum(tensor.numel() for tensor in found) // max(self.rows, 1)

    def chunk(self, start: int, stop: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments of the call for some of the rows, as views."""
        arguments: tuple[tuple[Any, ...], dict[str, Any]]
        arguments = mapped(self._arguments, lambda t: t[start:stop] if t.dim() else t)
        return arguments


def tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in a batch that have rows."""
    if isinstance(value, Tensor):
        if value.dim():
            yield value
    elif isinstance(value, (tuple, list, Mapping)):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from tensors(item)


def mapped(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Return a batch with ``function(tensor)`` in place of each of its tensors."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, (tuple, list)):
        items = [mapped(item, function) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, Mapping):
        # A copy keeps what else a mapping has, for example the BatchEncoding of a tokenizer.
        found = copy.copy(value) if isinstance(value, MutableMapping) else dict(value)
        for name, item in value.items():
            found[name] = mapped(item, function)
        return found
    return value
