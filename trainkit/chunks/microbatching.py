"""``microbatch``: a step that cuts the batch of a call into chunks of rows."""

from __future__ import annotations

import copy
import functools
import gc
import sys
import traceback
from collections.abc import Callable
from fractions import Fraction
from typing import Any, Literal, ParamSpec

import torch
from torch import Tensor

from trainkit.chunks.batches import Batch
from trainkit.core.parts import Part
from trainkit.core.plan import Plan, check
from trainkit.core.result import StepResult
from trainkit.core.step import MicroBatch, Step
from trainkit.core.warning import warn
from trainkit.core.window import Window, weighted_mean

P = ParamSpec("P")


def microbatch(size: int | Literal["auto"], dim: int = 0) -> Part:
    """Cut the batch of a call into chunks of ``size`` rows; "auto" finds a size that fits.

    Equivalent to one backward of ``f(*batch)``, with the activations of one chunk in memory::

        for start in range(0, rows, size):
            chunk = [tensor[start : start + size] for tensor in batch]
            (f(*chunk) * len(chunk[0]) / rows).backward()

    A loss with a weight counts by its weight. Tensors are cut at any depth of tuples, lists and
    mappings. Lists and tuples without tensors are cut if they are as long as the batch. Every chunk
    gets everything else whole. Source: Huang et al. 2019, https://arxiv.org/abs/1811.06965

    Args:
        size: the number of rows in a chunk, an int of at least 1, or "auto".
        dim: the dimension of the rows, for example 1 for tensors of (time, batch, features).

    Raises:
        TypeError, ValueError: for another size or dim, and for tensors of different lengths.
        torch.OutOfMemoryError: with "auto", if a single row does not fit.

    Example:
        >>> from trainkit import train_step
        >>> optimizer = torch.optim.SGD([weight := torch.nn.Parameter(torch.zeros(3))])
        >>> step = train_step(optimizer, microbatch(4))(lambda x: (x @ weight).mean())
        >>> step(torch.ones(10, 3)).updated  # chunks of 4, 4 and 2 rows
        True
    """
    wanted = f"size counts rows, an int of at least 1 or 'auto', got {size!r:.60}: `microbatch(8)`"
    check(size == "auto" or type(size) is int, TypeError, wanted)
    check(size == "auto" or size >= 1, ValueError, wanted)
    wanted = f"dim is an int, the dimension to cut, got {dim!r:.60}: `microbatch(8, dim=1)`"
    check(type(dim) is int, TypeError, wanted)
    return Part(Plan(step=functools.partial(ChunkedStep, None if size == "auto" else size, dim)))


class ChunkedStep(Step[P]):
    """A step that runs the batch of a call as several chunks, which count as one micro-batch.

    ``chunk_sizes`` maps the number of values in a row to the rows of a chunk that "auto" found. It
    may be changed or cleared between two calls.
    """

    def __init__(self, rows: int | None, dim: int, plan: Plan, function: Callable[P, Any]) -> None:
        super().__init__(plan, function)
        self.chunk_sizes: dict[int, int] = {}
        self._rows, self._dim = rows, dim  # rows is None for "auto"
        self._chunk: Chunk | None = None  # the chunk that is about to begin
        self._is_last_chunk = True

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> StepResult:
        if self._running is not None:
            return super().__call__(*args, **kwargs)  # which raises
        batch = Batch(args, kwargs, self._dim)
        if self._updater is None:
            self._prepare()
        fillers, start = self._count_fillers(batch), 0
        parts: list[Any] = []  # the loss, weight and output of each chunk
        try:
            while not parts or start < batch.rows:
                stop = min(start + self._rows_for(batch), batch.rows)
                self._size = Fraction(stop - start or 1, batch.rows or 1)
                self._is_last_chunk = stop == batch.rows and not fillers
                if (chunk := self._try(batch, start, stop)) is not None:
                    result, latest, start = chunk.result, start, stop
                    weight = float(self._size) if chunk.weight is None else chunk.weight
                    parts.append((result.loss, weight, result.output))
            for left in reversed(range(fillers)):
                self._size, self._is_last_chunk = 0, not left
                args, kwargs = batch.chunk(latest, batch.rows)
                result = super().__call__(*args, **kwargs)
        except BaseException:
            if parts:  # the window has only some rows of the batch
                self.discard()
            raise
        finally:
            self._size, self._is_last_chunk, self._chunk = 1, True, None
        losses, weights, result.output = map(list, zip(*parts, strict=True))
        result.loss = losses[0] if len(parts) == 1 else weighted_mean(losses, weights)
        return result

    def state_dict(self) -> dict[str, Any]:
        """Return the state of a step, and ``chunk_sizes``; RuntimeError inside a batch."""
        if self._window is not None:
            inside = "step.state_dict() was called inside a batch: call it after `step(batch)`"
            check(self._window.size.denominator == 1, RuntimeError, inside)
            self._window.size = int(self._window.size)
        return super().state_dict() | {"chunk_sizes": dict(self.chunk_sizes)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the state of a step, and ``chunk_sizes``."""
        super().load_state_dict(state)
        self.chunk_sizes = dict(state.get("chunk_sizes", {}))

    def _closes(self) -> bool:
        return self._is_last_chunk and super()._closes()

    def _micro_batch(self) -> MicroBatch:
        chunk, self._chunk = self._chunk, None
        return chunk or super()._micro_batch()

    def _rows_for(self, batch: Batch) -> int:
        """Return the rows of the next chunk. Longer rows never get larger chunks."""
        if self._rows is not None:
            return self._rows
        known = (rows for size, rows in self.chunk_sizes.items() if size <= batch.size_of_row)
        return max(1, min(known, default=batch.rows))

    def _try(self, batch: Batch, start: int, stop: int) -> Chunk | None:
        """Run a chunk. Return None if memory ran out: then only ``chunk_sizes`` has changed."""
        rows, outer = stop - start, sys.exc_info()[1]
        args, kwargs = batch.chunk(start, stop)
        self._chunk = chunk = Chunk(self, is_revocable=self._rows is None)
        try:
            super().__call__(*args, **kwargs)
            return chunk
        except Exception as error:
            has_begun = self._chunk is None  # if not, ``after`` failed: a smaller chunk is no help
            if not (has_begun and chunk.is_revocable and is_out_of_memory(error)):
                raise
            chunk.revoke()
            if rows <= 1:
                error.args = (f"{error}\n{_ADVICE}",)
                raise
            _clear_frames(error, outer)
        gc.collect()  # the error is gone, but cycles in the user's code may hold activations
        getattr(torch.get_device_module(self._updater.zero.device), "empty_cache", bool)()
        size, rows = batch.size_of_row, rows // 2
        if not self.chunk_sizes:
            fault = f"memory ran out with {stop - start} rows of {size} numbers"
            warn(f"{fault}: microbatch('auto') continues with {rows}, see `step.chunk_sizes`")
        self.chunk_sizes[size] = rows
        return None

    def _count_fillers(self, batch: Batch) -> int:
        """Return the number of chunks to run after the batch, for other ranks. They count nothing.

        With "auto" a filler closes the window, and ranks exchange their chunk sizes before it. A
        rank that runs out of memory while others wait for its gradients could not try again.
        """
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return 0
        from trainkit.ranks.collectives import all_gather_ints, world_size
        from trainkit.ranks.join import group_of

        group, needs_all = group_of(self._plan)
        if self._rows is not None:
            count = -(-batch.rows // self._rows) or 1
            return int(all_gather_ints(group, count).max()) - count if needs_all else 0
        alone = "got 'auto' where no rank can retry alone, for example under FSDP: `microbatch(8)`"
        check(not needs_all, ValueError, alone)
        if world_size() == 1 or not self._closes():
            return 0
        latest = next(reversed(self.chunk_sizes.items()), (0, 0))
        for size, rows in all_gather_ints(group, *latest).tolist():
            if rows:
                self.chunk_sizes[size] = min(rows, self.chunk_sizes.get(size, rows))
        return 1


class Chunk(MicroBatch):
    """A micro-batch that can be revoked until its update, wherever memory runs out.

    Its backward finds ``.grad`` empty. The sums of the window are added once it has succeeded, so a
    chunk that fails leaves nothing in them.
    """

    def __init__(self, step: Step[Any], is_revocable: bool) -> None:
        super().__init__(step)
        self.is_revocable = is_revocable
        self.aside: tuple[Window, Window] | None = None  # the window, and a copy with its sums

    def backward(self, loss: Tensor, weight: Any, options: dict[str, Any] | None = None) -> None:
        """Run backward of a loss, without the sums of the window."""
        window = self.step._window
        if self.is_revocable and self.aside is None and window is not None:
            self.aside = window, copy.copy(window)
            window.parameters, window.sums, window.lent = [], [], []
        super().backward(loss, weight, options)

    def finish(self) -> None:
        """Add the sums of the window to the gradients, and count the chunk."""
        # The function may have discarded the window, and begun another.
        if self.aside is not None and self.aside[0] is self.lent:
            window, kept = self.aside
            window.take()
            kept.arrange(window.parameters)
            window.sums = [*map(_added, window.sums, kept.sums)]
        self.aside, self.is_revocable = None, False
        super().finish()

    def leave(self) -> None:
        """Leave the chunk. A window that is still open receives its sums again."""
        super().leave()
        if self.aside is not None and self.aside[0] is self.step._window:
            self.revoke()

    def revoke(self) -> None:
        """Give the window its sums again. It keeps a reference on which ranks have agreed."""
        if self.aside is not None:
            window, kept = self.aside
            window.parameters, window.sums, window.lent = kept.parameters, kept.sums, kept.lent
            self.step._window, self.aside = window, None


def _added(gradient: Tensor | None, total: Tensor | None) -> Tensor | None:
    """Return gradient + total, in the memory of the gradient. The total does not change."""
    if gradient is None or total is None:
        return total if gradient is None else gradient
    return total + gradient if gradient.is_sparse else gradient.add_(total)  # as autograd adds


_ADVICE = "A single row does not fit into memory: `amp()`, `recompute(model, layers)` need less."


def _clear_frames(error: BaseException | None, outer: BaseException | None) -> None:
    """Clear the variables in the frames of an error and its causes, up to ``outer``."""
    while error is not None and error is not outer:
        traceback.clear_frames(error.__traceback__)
        context, error.__context__ = error.__context__, None  # chains may be cyclic
        error = context


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that a device ran out of memory."""
    # CPUs, Apple's GPUs and CUDA's libraries raise a plain RuntimeError.
    is_said = isinstance(error, RuntimeError) and any(text in str(error) for text in _OUT_OF_MEMORY)
    return is_said or isinstance(error, torch.OutOfMemoryError)


_OUT_OF_MEMORY = ("DefaultCPUAllocator: ", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
