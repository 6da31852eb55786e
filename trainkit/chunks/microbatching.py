"""``microbatch``: steps that take the batch of a call in chunks of its rows, and find out how many of them memory allows."""

from __future__ import annotations

import gc
import sys
import traceback
from collections.abc import Callable
from typing import Any, Literal, ParamSpec

import torch
from torch import Tensor, nn

from trainkit.chunks.batches import Batch
from trainkit.core.compose import Part
from trainkit.core.plan import Plan
from trainkit.core.result import StepResult
from trainkit.core.step import Step
from trainkit.core.warning import warn
from trainkit.core.window import Chunk, Weight, weighted_mean
from trainkit.ranks.parallel import tell_all

P = ParamSpec("P")


def microbatch(size: int | Literal["auto"]) -> Part:
    """Takes the batch of a call in chunks of so many rows, exactly as one batch; with "auto", of as many as memory allows.

    Equivalent to calling the function once, ``f(*batch)``, with memory for the activations of a chunk alone::

        for start in range(0, rows, size):
            chunk = [tensor[start : start + size] for tensor in batch]
            (f(*chunk) * len(chunk) / rows).backward()

    A loss that comes with a weight (of tokens, say) counts by that, and is then what it is for the batch as a whole. Dropout and
    the statistics of a BatchNorm are those of chunks. With ``accumulate(n)`` a window is n batches, and on several ranks
    gradients are reduced once per window. A generator function is run for every chunk, and its update code once.

    Tensors are cut along their first dimension, in tuples, lists and mappings at any depth, as the BatchEncoding of a tokenizer;
    what is no tensor, or has no dimension, goes to every chunk as it is.

    With "auto", a chunk for which memory runs out, in forward or backward, is run again as two, and so on: nothing is lost,
    and nothing counts twice but in the statistics of a BatchNorm that it got to. How many rows fit is remembered in
    ``step.chunk_sizes``, by the numbers in a row, since rows that are longer need more; ``step.chunk_sizes.clear()`` has
    larger chunks tried again. Until a chunk that ran out of memory has been made good, at most the gradients are there twice.
    On several ranks they tell each other what they found once per window, and its gradients are reduced in a pass of their
    own over the last chunk, which counts nothing, and costs what that chunk does: a rank that ran out of memory while others
    wait for its gradients could not start again.

    Args:
        size: rows of a chunk, an int >= 1; or "auto".

    Returns:
        A part: a decorator for step functions, or an argument of ``train_step``.

    Raises:
        TypeError, ValueError: for another size; at a call, if there is no tensor in the arguments or their lengths differ; at
            the first call, for "auto" where every forward or backward needs all ranks, as under FSDP.
        torch.OutOfMemoryError: with "auto", where a single row does not fit; it says what would help. And where memory runs out
            in a way that cannot be taken back: after or in a ``step.backward`` that the function calls itself, in reentrant
            activation checkpointing, and in an update.

    Warns:
        UserWarning: when "auto" has found that a batch does not fit, once.

    Example:
        >>> import torch
        >>> from trainkit import microbatch, train_step
        >>> model = torch.nn.Linear(3, 1)
        >>> @train_step(torch.optim.SGD(model.parameters(), lr=0.1), microbatch(4))
        ... def step(x, y):
        ...     return torch.nn.functional.mse_loss(model(x), y)
        >>> step(torch.ones(10, 3), torch.ones(10, 1)).updated  # chunks of 4, 4 and 2 rows
        True

    Source: Huang et al. 2019, https://arxiv.org/abs/1811.06965, who call the chunks micro-batches
    """
    if size != "auto" and (isinstance(size, bool) or not isinstance(size, int)):
        raise TypeError(
            f"size counts the rows of a chunk, an int, or is 'auto'; got {size!r}: `microbatch(8)`"
        )
    if size != "auto" and size < 1:
        raise ValueError(f"a chunk has at least one row, got {size}: `microbatch(8)`")
    return Part(Plan(chunk=size, step_type=ChunkedStep), f"microbatch({size!r})")


class ChunkedStep(Step[P]):
    """A step whose calls take batches, each of them as several micro-batches.

    ``chunk_sizes``: with ``microbatch("auto")``, how many rows to take where more have run out of memory; by how many numbers
    a row has, as rows of longer text need more. Can be read, changed and cleared between two calls.
    """

    def __init__(self, plan: Plan, function: Callable[P, Any] | None = None) -> None:
        super().__init__(plan, function)
        self.chunk_sizes: dict[int, int] = {}
        self._is_auto = plan.chunk == "auto"
        self._untold: list[int] = []  # sizes of rows whose entry other ranks do not know
        # The gradients before the backward under way, where it can be taken back.
        self._before: list[Any] = []
        self._task = -1
        self._by_hand = False  # whether backward was called in the function
        # By the row up to which they are: gradients that are complete, although the chunk ran out of memory before all were.
        self._complete: list[tuple[int, dict[nn.Parameter, Tensor]]] = []

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> StepResult:
        if self._result is not None:
            self.__enter__()  # which is refused
        batch = Batch(args, kwargs)
        if not self._device_type:
            self._prepare()
        if self._is_auto and (
            self._wrappers.go_together
            or any(hasattr(p, "full_tensor") for p in self._plan.parameters())
        ):
            raise ValueError(
                "microbatch('auto') where every forward or backward needs all ranks, as under FSDP, with a static graph or with "
                "SyncBatchNorm: one that runs out of memory and tries again leaves the others waiting. Give a number, "
                "`microbatch(8)`"
            )
        if self._owed is not None and self._owed.known():
            self.settle()  # and not within a chunk, where running out of memory would be taken for that of the chunk
        if self._window is None:
            self._window = self._new_window()
        for_others = self._count_for_others(batch)
        losses: list[Tensor] = []
        weights: list[Weight] = []
        result, start, last = None, 0, 0
        try:
            while result is None or start < batch.rows:
                end = self._complete[-1][0] if self._complete else batch.rows
                stop = min(start + self._rows_for(batch), end)
                fraction = (stop - start) / batch.rows if batch.rows else 1
                result = self._try(
                    batch, start, Chunk(fraction, stop == batch.rows and not for_others, stop)
                )
                if result is not None and result.loss is not None:
                    losses.append(result.loss)
                    weights.append(fraction if self._weight is None else self._weight)
                    last, start = start, stop
            for left in reversed(range(for_others)):
                result = self._try(batch, last, Chunk(0, not left, batch.rows)) or result
        except BaseException:
            if losses or self._complete:  # a part of the batch is in
                self._gradients.drop()
                self.discard()
            raise
        finally:
            self._chunk = Chunk()
            self._complete.clear()
        if len(losses) > 1:
            result.loss = weighted_mean(losses, weights)
        return result

    def _count_for_others(self, batch: Batch) -> int:
        """How many chunks are run only for the sake of other ranks, which wait for them."""
        if self._ranks == 1:
            return 0
        if (
            self._is_auto
        ):  # where the backward that gradients are reduced in must not run out of memory
            assert self._window is not None
            return self._will_close(self._window)
        if not self._wrappers.go_together:
            return 0
        count = -(-batch.rows // self._rows_for(batch)) or 1
        return int(tell_all(self._wrappers.group, count).max()) - count

    def _rows_for(self, batch: Batch) -> int:
        """How many rows to take of this batch, as far as is known: what is too much for a row is so for a larger one."""
        if isinstance(self._plan.chunk, int):
            return self._plan.chunk
        known = (rows for size, rows in self.chunk_sizes.items() if size <= batch.size_of_row)
        return max(1, min(known, default=batch.rows))

    def _try(self, batch: Batch, start: int, chunk: Chunk) -> StepResult | None:
        """Runs a chunk. None where memory ran out: then all is as before but for ``chunk_sizes`` and ``_complete``."""
        window, rows = self._window, chunk.stop - start
        assert window is not None
        mark, outer = window.mark(), sys.exc_info()[1]
        self._chunk, self._by_hand = chunk, False
        args, kwargs = batch.chunk(start, chunk.stop)
        try:
            return super().__call__(*args, **kwargs)
        except Exception as error:
            is_lost = (
                self._window is not window
            )  # more was in than can be taken out again, or the update was under way
            if not self._is_auto or is_lost or not chunk.fraction or not is_out_of_memory(error):
                raise
            if rows <= 1:
                error.args = (f"{error}\n{_ADVICE}",)
                raise
            window.rewind(mark)
            _let_go(error, outer)
        # Only here, where the error is gone, nothing holds the activations but cycles of the user's.
        gc.collect()
        getattr(torch.get_device_module(self._device_type), "empty_cache", bool)()
        if not self.chunk_sizes:
            warn(
                f"memory ran out with {rows} rows of {batch.size_of_row} numbers, and microbatch('auto') goes on with "
                f"{rows // 2}; what it finds is in `step.chunk_sizes`, and is said only once"
            )
        self.chunk_sizes[batch.size_of_row] = rows // 2
        self._untold.append(batch.size_of_row)
        return None

    def _begin_backward(self, loss: Tensor, weight: Weight | None) -> None:
        super()._begin_backward(loss, weight)
        if self._is_auto and self._chunk.stop and not self._by_hand:
            self._before = self._gradients.versions()
            loss.register_hook(self._note_task)  # type: ignore[no-untyped-call]

    def _run_backward(self, loss: Tensor, weight: Weight | None) -> None:
        try:
            super()._run_backward(loss, weight)
        finally:
            self._before = []

    def backward(self, loss: Any, weight: Weight | None = None) -> None:
        self._by_hand = True  # of several losses, what a parameter has of which could not be told
        super().backward(loss, weight)

    def _note_task(self, _: Tensor) -> None:
        self._task = _graph_task()

    def _nested(self) -> bool:
        """Whether another backward ran within the last one, as reentrant checkpointing does: a parameter that is used in two of
        them gets its gradient in parts."""
        before, probe = self._task, torch.zeros((), requires_grad=True)
        handle = probe.register_hook(self._note_task)  # type: ignore[no-untyped-call]
        (probe * 1).backward()  # type: ignore[no-untyped-call]
        handle.remove()
        return self._task != before + 1

    def _take_back(self, error: BaseException) -> bool:
        """Where memory ran out: the gradient of a parameter has got all of the chunk, or nothing.

        Those that have all of it are kept as they are, and put back when the others have it too, from smaller chunks.
        """
        if (
            not (self._before and self._chunk.fraction and is_out_of_memory(error))
            or self._nested()
        ):
            return False
        ignored = {id(parameter) for _, complete in self._complete for parameter in complete}
        changed = self._gradients.take(self._before)
        self._complete.append(
            (
                self._chunk.stop,
                {p: gradient for p, gradient in changed.items() if id(p) not in ignored},
            )
        )
        if changed and self._window is not None:
            self._window.first_of_all = False  # what is kept has come in by this reference
        self._began_backward = False
        return True

    def _finish(self) -> None:
        while self._complete and self._complete[-1][0] == self._chunk.stop:
            for parameter, gradient in self._complete.pop()[1].items():
                parameter.grad = gradient
        super()._finish()
        if self._is_auto and self._ranks > 1 and self._window is None:
            self._tell_sizes()

    def _tell_sizes(self) -> None:
        """The latest that this rank and the others have found, once per window."""
        latest = self._untold.pop(0) if self._untold else 0
        for size, rows in tell_all(
            self._wrappers.group, latest, self.chunk_sizes.get(latest, 0)
        ).tolist():
            if rows:
                self.chunk_sizes[size] = min(rows, self.chunk_sizes.get(size, rows))

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "chunk_sizes": dict(self.chunk_sizes)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.chunk_sizes = dict(state.get("chunk_sizes", {}))


# Private in torch, so guarded: without it, every backward may have had others within it.
_graph_task = getattr(torch._C, "_current_graph_task_id", lambda: -1)

_ADVICE = (
    "A single row does not fit into memory. What makes it smaller: shorter rows; activation checkpointing; freezing the lower "
    "layers, `freeze(model, layers)`; half precision, `amp()`"
)


def _let_go(error: BaseException | None, outer: BaseException | None) -> None:
    """Has the frames of an error, and of those that it came from up to ``outer``, forget their variables."""
    seen: list[BaseException] = []
    while error is not None and error is not outer and error not in seen:
        seen.append(error)
        traceback.clear_frames(error.__traceback__)
        error = error.__context__


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory has run out, of whatever device."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    # torch has no type for those of a CPU, of Apple's GPUs and of the libraries of CUDA.
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _OUT_OF_MEMORY)


_OUT_OF_MEMORY = (
    "DefaultCPUAllocator: ",
    "MPS backend out of memory",
    "out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)
