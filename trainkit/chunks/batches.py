"""A batch: the arguments of a call, which can be cut into chunks of rows."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from trainkit.core.plan import check


class Batch:
    """The arguments of a call, which can be cut into chunks of rows.

    Tensors are cut along ``dim``, and tensors with fewer dimensions along their last one. NumPy
    arrays, and lists and tuples without tensors, are cut if they have as many rows. Every chunk
    gets everything else whole, 0-d tensors too.
    """

    def __init__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], dim: int = 0) -> None:
        self._arguments, self._dim = (_Positional(args), dict(kwargs)), dim
        tensors = _cut_tensors(self._arguments)
        is_packed = any(isinstance(value, PackedSequence) for value in _walk(self._arguments))
        is_dense = all(t.layout is torch.strided and not t.is_nested for t in tensors)
        check(is_dense and not is_packed, ValueError, _DENSE)
        shapes = [tuple(tensor.shape) for tensor in tensors]
        whole = [shape for shape in shapes if -len(shape) <= dim < len(shape)]
        cuts, came = f"microbatch cuts tensors along dimension {dim}, got", shapes or args
        check(bool(whole), ValueError, f"{cuts} none in {came!r:.60}: `step(inputs, targets)`")
        self.rows: int = whole[0][dim]
        odd = [tuple(tensor.shape) for tensor in tensors if self._dim_of(tensor) is None]
        differ = f"{cuts} lengths that differ in {[whole[0], *odd]!r:.60}"
        check(not odd, ValueError, f"{differ}: {_REMEDY}")
        # The memory that a row needs is roughly proportional to this.
        self.size_of_row = sum(tensor.numel() for tensor in tensors) // max(self.rows, 1)

    def chunk(self, start: int, stop: int) -> Any:
        """Return the arguments with the rows from ``start`` to ``stop``, as views."""
        rows = slice(start, stop)
        return self.cut(lambda value, dim: value[(*[slice(None)] * dim, rows) if dim else rows])

    def cut(self, function: Callable[[Any, Any], Any]) -> Any:
        """Return the arguments with ``function(value, dim)`` in place of every cut value."""

        def is_cut(value: Any) -> bool:
            return self._dim_of(value) is not None

        return mapped(self._arguments, lambda value: function(value, self._dim_of(value)), is_cut)

    def _dim_of(self, value: Any) -> int | None:
        """Return the dimension along which a value is cut; None if it is not cut."""
        # A named tuple and a torch.Size are not lists of rows.
        is_list = isinstance(value, list) or type(value) is tuple
        if is_list and len(value) == self.rows and not _cut_tensors(value):
            return 0
        is_array = torch.is_tensor(value) or hasattr(type(value), "__array_interface__")  # NumPy
        shape: Sequence[int] = getattr(value, "shape", ()) if is_array else ()
        dim = self._dim if -len(shape) <= self._dim < len(shape) else -1
        return dim % len(shape) if shape and shape[dim] == self.rows else None


_DENSE = "microbatch cuts dense tensors: in the step `pack_padded_sequence(x, n)`, `x.to_sparse()`"
_REMEDY = "pad images, cut another dim, bind a table: `functools.partial(function, table=table)`"


class _Positional(tuple[Any, ...]):
    """The positional arguments. They are not a list of rows, whatever their number."""


def _walk(value: Any) -> Iterator[Any]:
    """Yield a value and everything in it."""
    yield value
    if isinstance(value, (tuple, list, Mapping)):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _walk(item)


def _cut_tensors(value: Any) -> list[Tensor]:
    """Return the tensors in a value that have a dimension to cut."""
    return [item for item in _walk(value) if isinstance(item, Tensor) and item.dim()]


def mapped(value: Any, function: Callable[[Any], Any], is_leaf: Any = torch.is_tensor) -> Any:
    """Return a batch with ``function(leaf)`` in place of every leaf, by default every tensor."""
    if is_leaf(value):
        return function(value)
    if isinstance(value, (tuple, list)):
        items = [mapped(item, function, is_leaf) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, Mapping):
        # A copy keeps the type and the attributes, for example of a tokenizer's BatchEncoding.
        found = copy.copy(value) if isinstance(value, MutableMapping) else dict(value)
        for name, item in value.items():
            found[name] = mapped(item, function, is_leaf)
        return found
    return value
