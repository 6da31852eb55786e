"""``microbatch``: steps that take the batch of a call in chunks of its rows."""

from __future__ import annotations

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
from trainkit.core.window import Weight, Window, weighted_mean

P = ParamSpec("P")


def microbatch(size: int | Literal["auto"]) -> Part:
    """Take the batch of a call in chunks of ``size`` rows; "auto" takes as many as memory allows.

    Equivalent to one backward of ``f(*batch)``, with memory for the activations of one chunk::

        for start in range(0, rows, size):
            chunk = [tensor[start : start + size] for tensor in batch]
            (f(*chunk) * len(chunk[0]) / rows).backward()

    A loss that comes with a weight counts by its weight. Tensors are cut along their first
    dimension, in tuples, lists and mappings at any depth; every chunk gets everything else whole.

    Args:
        size: rows of a chunk, an int of at least 1, or "auto".

    Raises:
        TypeError, ValueError: for another size, and at a call for tensors of different lengths.
        torch.OutOfMemoryError: with "auto", if a single row does not fit.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(3))
        >>> step = train_step(torch.optim.SGD([weight]), microbatch(4))(lambda x: (x @ weight).mean())
        >>> step(torch.ones(10, 3)).updated  # chunks of 4, 4 and 2 rows
        True

    Source: Huang et al. 2019, https://arxiv.org/abs/1811.06965
    """
    is_int = isinstance(size, int) and not isinstance(size, bool)
    wanted = f"a chunk has an int of at least 1 rows, or 'auto', got {size!r:.60}: `microbatch(8)`"
    check(size == "auto" or is_int, TypeError, wanted)
    check(size == "auto" or size >= 1, ValueError, wanted)
    return Part(Plan(step=functools.partial(ChunkedStep, None if size == "auto" else size)))


class ChunkedStep(Step[P]):
    """A step whose calls take batches, each of them as several micro-batches.

    ``chunk_sizes``: with "auto", the rows of a chunk by the numbers in a row, wherever more rows ran
    out of memory. It may be changed and cleared between two calls.
    """

    def __init__(self, rows: int | None, plan: Plan, function: Callable[P, Any]) -> None:
        super().__init__(plan, function)
        self.chunk_sizes: dict[int, int] = {}
        self._rows = rows  # None with "auto"
        self._news = (0, 0)  # the latest entry of ``chunk_sizes`` that other ranks do not know
        self._chunk: MicroBatch | None = None  # about to begin
        self._is_last_chunk = True

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> StepResult:
        if self._running is not None:
            return super().__call__(*args, **kwargs)  # which raises
        batch = Batch(args, kwargs)
        if self._updater is None:
            self._prepare()
        if self._window is None:
            self._window = self._new_window()
        fillers, start = self._count_fillers(batch), 0
        losses: list[Any] = []
        weights: list[Weight] = []
        try:
            while not losses or start < batch.rows:
                stop = min(start + self._rows_for(batch), batch.rows)
                self._size = Fraction(stop - start or 1, batch.rows or 1)
                self._is_last_chunk = stop == batch.rows and not fillers
                chunk = self._try(batch, start, stop)
                if chunk is not None:
                    result, start = chunk.result, stop
                    losses.append(result.loss)
                    weights.append(float(self._size) if chunk.weight is None else chunk.weight)
            for left in reversed(range(fillers)):
                self._size, self._is_last_chunk = 0, not left
                latest, more = batch.chunk(max(0, stop - self._rows_for(batch)), stop)
                result = super().__call__(*latest, **more)
        except BaseException:
            if losses:  # a part of the batch is in
                self.discard()
            raise
        finally:
            self._size, self._is_last_chunk, self._chunk = 1, True, None
        if fillers and self._rows is None:
            self._exchange_sizes()
        result.loss = losses[0] if len(losses) == 1 else weighted_mean(losses, weights)
        return result

    def state_dict(self) -> dict[str, Any]:
        """Return the state of a step, and ``chunk_sizes``; RuntimeError inside a batch."""
        if self._window is not None:
            inside = "step.state_dict() was called inside a batch, between two of its chunks"
            is_whole = self._window.size.denominator == 1
            check(is_whole, RuntimeError, f"{inside}: call it after `step(batch)`")
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
        """Return the rows of the next chunk. What is too much for a row is so for a longer one."""
        if self._rows is not None:
            return self._rows
        known = (rows for size, rows in self.chunk_sizes.items() if size <= batch.size_of_row)
        return max(1, min(known, default=batch.rows))

    def _try(self, batch: Batch, start: int, stop: int) -> MicroBatch | None:
        """Run a chunk. Return None if memory ran out: then only ``chunk_sizes`` is different."""
        if self._owed is not None and self._owed.known():
            self.settle()  # here, because memory that runs out in ``after`` is not of the chunk
        rows, outer = stop - start, sys.exc_info()[1]
        chunk = MicroBatch(self) if self._rows else RevocableMicroBatch(self)
        self._chunk, (args, kwargs) = chunk, batch.chunk(start, stop)
        try:
            super().__call__(*args, **kwargs)
            return chunk
        except Exception as error:
            can_retry = isinstance(chunk, RevocableMicroBatch) and not chunk.is_final
            if not (can_retry and is_out_of_memory(error)):
                raise
            chunk.revoke()
            if rows <= 1:
                error.args = (f"{error}\n{_ADVICE}",)
                raise
            _clear_frames(error, outer)
        del chunk
        gc.collect()  # after the error is gone, only cycles of the user's hold activations
        device = self._plan.parameters()[0].device
        getattr(torch.get_device_module(device), "empty_cache", bool)()
        if not self.chunk_sizes:
            warn(
                f"memory ran out with {rows} rows of {batch.size_of_row} numbers: microbatch('auto') "
                f"continues with {rows // 2}; `step.chunk_sizes` has all sizes that it finds"
            )
        self.chunk_sizes[batch.size_of_row] = rows // 2
        self._news = (batch.size_of_row, rows // 2)
        return None

    def _count_fillers(self, batch: Batch) -> int:
        """Return how many chunks of size 0 follow the batch because other ranks wait for them.

        With "auto" gradients are reduced in one of its own: a rank that ran out of memory while
        others wait for its gradients could not try again.
        """
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return 0
        from trainkit.ranks.collectives import all_gather_ints, world_size
        from trainkit.ranks.join import group_of, needs_all_ranks

        together = needs_all_ranks(self._plan)
        if self._rows is None:
            waiting = "a rank that runs out of memory and tries again would leave others waiting"
            where = "under FSDP, with a static graph or with SyncBatchNorm"
            refused = f"got microbatch('auto') {where}, where {waiting}: `microbatch(8)`"
            check(not together, ValueError, refused)
            return int(world_size() > 1 and self._closes())
        count = -(-batch.rows // self._rows) or 1
        if not together or world_size() == 1:
            return 0
        return int(all_gather_ints(group_of(self._plan), count).max()) - count

    def _exchange_sizes(self) -> None:
        """Tell other ranks the latest size that this one found, and learn theirs."""
        from trainkit.ranks.collectives import all_gather_ints
        from trainkit.ranks.join import group_of

        news, self._news = self._news, (0, 0)
        for size, rows in all_gather_ints(group_of(self._plan), *news).tolist():
            if rows:
                self.chunk_sizes[size] = min(rows, self.chunk_sizes.get(size, rows))


class RevocableMicroBatch(MicroBatch):
    """A micro-batch that can be revoked until its update, whatever it ran out of memory in.

    Its backward finds the window without sums. They are added to its gradients once it has
    succeeded, so nothing of a micro-batch that fails is in them.
    """

    aside: tuple[Window, list[Tensor | None]] | None = None  # the window, and its sums
    is_final = False

    def backward(self, loss: Tensor, weight: Any) -> None:
        """Run backward of a loss without the sums of the window."""
        window = self.step._window
        if self.aside is None and window is not None:
            self.aside = window, window.sums
            window.sums, window.lent = [], []
        super().backward(loss, weight)

    def finish(self) -> None:
        """Add the sums of the window to the gradients, and count the micro-batch."""
        if self.left:
            self.check_untouched()
        if self.aside is not None and self.aside[0] is self.lent:  # else the function discarded it
            self.lent.take()
            _add_sums(self.lent, self.aside[1])
        self.aside, self.is_final = None, True
        super().finish()

    def leave(self) -> None:
        """Leave the micro-batch. A window that is still open has its sums again."""
        super().leave()
        if self.aside is not None and self.aside[0] is self.step._window:
            self.revoke()

    def revoke(self) -> None:
        """Give the step its window as it was before the micro-batch."""
        if self.aside is not None:
            (window, window.sums), self.aside = self.aside, None
            window.lent = [False] * len(window.sums)
            self.step._window = window


def _add_sums(window: Window, sums: list[Tensor | None]) -> None:
    """Add sums to those of a window in place. They themselves do not change."""
    pairs = []
    for i, total in enumerate(sums):
        gradient = window.sums[i]
        if gradient is None:
            window.sums[i] = total
        elif total is not None and gradient.is_sparse:
            window.sums[i] = total + gradient  # in the order of autograd
        elif total is not None:
            pairs.append((gradient, total))
    if pairs:
        gradients, totals = zip(*pairs, strict=True)
        torch._foreach_add_(gradients, totals)


_ADVICE = (
    "A single row does not fit into memory. Shorter rows need less, and so do `amp()`, "
    "`recompute(model, layers)` and `freeze(model, layers)`"
)


def _clear_frames(error: BaseException | None, outer: BaseException | None) -> None:
    """Have the frames of an error and of its causes forget their variables, up to ``outer``."""
    while error is not None and error is not outer:
        traceback.clear_frames(error.__traceback__)
        context, error.__context__ = error.__context__, None  # chains may be cyclic
        error = context


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether the memory of a device has run out."""
    # torch has no type for the errors of a CPU, of Apple's GPUs and of the libraries of CUDA.
    is_said = isinstance(error, RuntimeError) and any(text in str(error) for text in _OUT_OF_MEMORY)
    return is_said or isinstance(error, torch.OutOfMemoryError)


_OUT_OF_MEMORY = (
    "DefaultCPUAllocator: ",
    "MPS backend out of memory",
    "out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)
