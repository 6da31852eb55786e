"""The progress bar of ``step.over(loader, progress=True)``."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from torch import Tensor, distributed

from trainkit.core.loop import Batches, length_of
from trainkit.core.plan import check
from trainkit.watch.optional import optional
from trainkit.watch.readings import Readings, Smoothed

T = TypeVar("T")
_CALL = "`step.over(loader, progress=True)` or `step.over(loader, progress={'desc': 'epoch 3'})`"
_COLUMNS = {"loss": "loss", "norm": "grad_norm", "lr": "lr", "scale": "loss_scale"}


def with_progress(batches: Batches[T], steps: Sequence[Any], progress: Any) -> Iterator[T]:
    """Iterate over ``batches``, and show a bar of tqdm on rank 0. See ``Step.over``."""
    is_known = progress is True or isinstance(progress, Mapping)
    check(is_known, TypeError, f"progress is a bool or a mapping, got {progress!r}: {_CALL}")
    tqdm = optional("tqdm.auto", "progress").tqdm
    if distributed.is_available() and distributed.is_initialized() and distributed.get_rank() > 0:
        return batches
    length = length_of(batches)
    options = {"total": length or None} | ({} if progress is True else dict(progress))
    return Batches(_with_bar(batches, functools.partial(tqdm, **options), steps), length)


def _with_bar(
    batches: Batches[T], make_bar: Callable[[], Any], steps: Sequence[Any]
) -> Generator[T]:
    try:
        bar = make_bar()
    except KeyError as error:
        raise TypeError(f"progress has an argument that tqdm refuses, {error}: {_CALL}") from error
    if bar.disable:
        yield from batches
        return
    shown = [_StepNumbers(step) for step in steps]
    seen = rows = 0
    try:
        for batch in batches:
            if seen == 0 and (index := steps[0]._delivery.number):
                # A resumed run skips the batches that it trained before. They took no time now.
                bar.initial = bar.n = bar.last_print_n = bar.initial + index
                bar.unpause()
            seen, rows = seen + 1, rows + _rows_of(batch)
            yield batch
            if time.time() - bar.last_print_t >= bar.mininterval:  # the bar is about to be drawn
                for numbers in shown:
                    numbers.readings.ask()
                bar.set_postfix_str(", ".join(_texts(bar, shown, seen, rows)), refresh=False)
            bar.update()
    finally:
        try:
            batches.close()  # which flushes the readings
        finally:
            for numbers in shown:
                numbers.readings.close()
            bar.set_postfix_str(", ".join(_texts(bar, shown, seen, rows)), refresh=False)
            if seen == 0:  # the run had finished this pass before it was resumed
                bar.leave = False
            bar.close()


class _StepNumbers:
    """The numbers of one step in a bar: its latest known window, and sums over its windows."""

    def __init__(self, step: Any) -> None:
        self.readings = Readings(step, self._take, least=256)
        self.latest: dict[str, float] = {}
        self.skipped, self.weight = 0, 0.0
        self._loss = Smoothed(0.1)

    def _take(self, numbers: dict[str, float]) -> None:
        self.latest = numbers | {"loss": self._loss.add(numbers["loss"])}
        self.skipped += int(numbers["skipped"])
        self.weight += numbers.get("weight", 0.0)


def _texts(bar: Any, shown: Sequence[_StepNumbers], seen: int, rows: int) -> Iterator[str]:
    """Yield the texts after the counts of a bar, for ``seen`` batches with ``rows`` rows in all."""
    latest = [item for numbers in shown for item in numbers.latest.items()]
    for title, column in _COLUMNS.items():
        form = ".6g" if title == "scale" else ".4g"
        values = [format(x, form) for name, x in latest if name.partition("/")[0] == column]
        if values:
            yield f"{title} {'/'.join(values)}"
    if any(numbers.skipped for numbers in shown):
        yield f"skipped {'/'.join(str(numbers.skipped) for numbers in shown)}"
    state = bar.format_dict
    batches_per_second = state["rate"] or (bar.n - bar.initial) / (state["elapsed"] or math.inf)
    # Weights may count rows, or tokens if they exceed the rows. They arrive after their batches.
    tokens = shown[0].weight
    amount, unit = (tokens, "tokens") if tokens > rows else (rows, "rows")
    if batches_per_second and amount:
        yield f"{bar.format_sizeof(amount / seen * batches_per_second)} {unit}/s"


def _rows_of(batch: Any) -> int:
    """Return the length of the first tensor in a batch; 0 without one."""
    if isinstance(batch, Tensor):
        return len(batch) if batch.dim() else 0
    if isinstance(batch, Mapping):
        batch = list(batch.values())
    return next(filter(None, map(_rows_of, batch)), 0) if isinstance(batch, (tuple, list)) else 0
