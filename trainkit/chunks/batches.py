"""A batch: the arguments of a call, and how they are cut along the rows of their tensors."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, MutableMapping
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
        found: list[Tensor] = []
        mapped(self._arguments, lambda t: found.append(t) if t.dim() else None)
        cuts = "microbatch cuts tensors along their first dimension"
        check(bool(found), ValueError, f"{cuts}, got none in {args!r:.60}: `step(inputs, targets)`")
        shapes = [tuple(tensor.shape) for tensor in found]
        remedy = "bind what is not of the batch, `functools.partial(function, table=table)`"
        is_even = len({shape[0] for shape in shapes}) == 1
        check(is_even, ValueError, f"{cuts}, got lengths that differ in {shapes}: {remedy}")
        self.rows = len(found[0])
        # The memory for a row is roughly proportional to this.
        self.size_of_row = sum(tensor.numel() for tensor in found) // max(self.rows, 1)

    def chunk(self, start: int, stop: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments of the call for some of the rows, as views."""
        return mapped(self._arguments, lambda t: t[start:stop] if t.dim() else t)  # type: ignore[no-any-return]


def mapped(value: Any, function: Callable[[Tensor], Any]) -> Any:
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
