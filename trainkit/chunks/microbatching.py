"""``microbatch``: steps that take the batch of a call in chunks of its rows."""

from __future__ import annotations

import functools
from collections.abc import Callable
from fractions import Fraction
from typing import Any, Literal, ParamSpec

from torch import Tensor

from trainkit.chunks.batches import Batch
from trainkit.core.parts import Part
from trainkit.core.plan import Plan, check
from trainkit.core.step import Step, StepResult
from trainkit.core.window import Weight, Window, weighted_mean

P = ParamSpec("P")


def microbatch(size: int | Literal["auto"]) -> Part:
    """Take the batch of a call in chunks of ``size`` rows; "auto" takes as many as memory allows.

    Equivalent to ``f(*batch)``, with memory for the activations of one chunk::

        for start in range(0, rows, size):
            chunk = [tensor[start : start + size] for tensor in batch]
            (f(*chunk) * len(chunk) / rows).backward()

    A loss that comes with a weight counts by it. Tensors are cut along their first dimension, in
    tuples, lists and mappings at any depth; everything else goes whole to every chunk.

    Args:
        size: rows of a chunk, an int of at least 1, or "auto".

    Raises:
        TypeError, ValueError: for another size, and at a call for tensors of different lengths.
        torch.OutOfMemoryError: with "auto", if a single row does not fit.

    Example:
        >>> import torch
        >>> from trainkit import microbatch, train_step
        >>> model = torch.nn.Linear(3, 1)
        >>> step = train_step(torch.optim.SGD(model.parameters()), microbatch(4))(
        ...     lambda x, y: torch.nn.functional.mse_loss(model(x), y)
        ... )
        >>> step(torch.ones(10, 3), torch.ones(10, 1)).updated  # chunks of 4, 4 and 2 rows
        True

    Source: Huang et al. 2019, https://arxiv.org/abs/1811.06965
    """
    is_int = isinstance(size, int) and not isinstance(size, bool)
    remedy = "a chunk has a number of rows, an int of at least 1, or 'auto': `microbatch(8)`"
    check(size == "auto" or is_int, TypeError, f"got {size!r:.60}; {remedy}")
    check(size == "auto" or size >= 1, ValueError, f"got {size!r:.60}; {remedy}")
    return Part(Plan(step=functools.partial(ChunkedStep, None if size == "auto" else size)))


class ChunkedStep(Step[P]):
    """A step whose calls take batches, each of them as several micro-batches.

    ``chunk_sizes``: with "auto", the rows to take of a batch, by the numbers in a row, where more
    rows ran out of memory. Longer rows need more. May be changed and cleared between two calls.
    """

    def __init__(self, size: int | None, plan: Plan, function: Callable[P, Any]) -> None:
        super().__init__(plan, function)
        self.chunk_sizes: dict[int, int] = {}
        self._rows = size  # None with "auto"
        self._is_last_chunk = True
        self._aside: Window | None = None  # with "auto", the window without the chunk under way

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> StepResult:
        if self._result is not None:
            return super().__call__(*args, **kwargs)  # which raises
        batch = Batch(args, kwargs)
        if self._updater is None:
            self._prepare()
        if self._owed is not None and self._owed.known():
            self.settle()  # here, where running out of memory is not that of a chunk
        losses: list[Tensor] = []
        weights: list[Weight] = []
        result, start, is_begun = None, 0, False
        try:
            for _ in iter(lambda: result is None or start < batch.rows, False):
                stop = min(start + self._rows_for(batch), batch.rows)
                self._size = Fraction(stop - start, batch.rows or 1) if batch.rows else 1
                self._is_last_chunk = stop == batch.rows
                result = self._try(batch, start, stop)
                if result is not None and result.loss is not None:
                    losses.append(result.loss)
                    weights.append(float(self._size) if self._weight is None else self._weight)
                    start, is_begun = stop, True
        except BaseException:
            if is_begun:  # a part of the batch is in
                self.discard()
            raise
        finally:
            self._size, self._is_last_chunk = 1, True
        if len(losses) > 1:
            result.loss = weighted_mean(losses, weights)
        return result
