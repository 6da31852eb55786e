"""``step.over(loader)``: a loop over a loader whose last batch closes the last window."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Generator, Iterable, Iterator
from typing import Any, NamedTuple, TypeVar

from trainkit.core.warning import warn

T = TypeVar("T")


class Delivery(NamedTuple):
    """A batch for a step. ``number`` counts the batches before it in this pass."""

    batch: Any
    is_last: bool
    number: int = 0
    present: float = 1.0  # the share of ranks that have a batch at this place
    is_filler: bool = False  # whether this rank has none, and repeats its last one for the others


OUTSIDE = Delivery(None, False)  # of any loop


class Batches(Iterator[T]):
    """What ``step.over`` returns: an iterator that has the length of its loader."""

    def __init__(self, batches: Generator[T], length: int) -> None:
        self._batches, self._length = batches, length

    def __iter__(self) -> Iterator[T]:
        return self._batches

    def __next__(self) -> T:
        return next(self._batches)

    def __len__(self) -> int:
        if not self._length:
            raise TypeError("this loader has no length: `for batch in step.over(loader)`")
        return self._length

    def close(self) -> None:
        """End the loop here, as ``break`` does."""
        self._batches.close()


class Again(Iterable[T]):
    """A loader that is iterated over again and again, until its loop ends.

    Its length is the largest possible one, so that nothing reads it ahead to find its end.
    """

    has_ended = False  # whether the latest pass over the loader gave nothing

    def __init__(self, loader: Iterable[T], begun: int) -> None:
        self.loader = loader
        self.begun = begun  # windows that the step had closed before the loop

    def __len__(self) -> int:
        return sys.maxsize

    def __iter__(self) -> Iterator[T]:
        while not self.has_ended:
            self.has_ended = True
            for batch in self.loader:
                self.has_ended = False
                yield batch


def over(loader: Iterable[Any], steps: tuple[Any, ...], updates: int | None) -> Generator[Any]:
    """Iterate over the batches, and tell the steps which is the last. See ``Step.over``."""
    found = [step._delivery for step in steps]
    try:
        for step in steps:
            step._warned.add("end")
            if step._updater is None:
                step._prepare()
            if step._delivery is OUTSIDE:
                _warn_of_open_window(step, "at the start of a loop")
        again = None if updates is None else Again(loader, steps[0]._closed)
        for delivery in steps[0]._deliver(again or loader):
            for step in steps:
                step._delivery, step._ended_early = delivery, False
            yield delivery.batch
            if updates and again and steps[0]._closed - again.begun >= updates:
                break
        else:
            if again is not None and again.has_ended:
                closed = steps[0]._closed - again.begun
                fault = f"the loader ended after {closed} of {updates} windows"
                raise ValueError(f"{fault}: give a list, `step.over(list(loader), updates=N)`")
    finally:
        for step, delivery in zip(steps, found, strict=True):
            step._delivery, step._ended_early = delivery, False
            for watcher in step._watchers:
                watcher.flush()
    for step in steps:
        step.settle()
        _warn_of_open_window(step, "after the last batch of a loop")


def _warn_of_open_window(step: Any, where: str) -> None:
    window = step._window
    if window is None or not window.losses or window.may_be_open or "open" in step._warned:
        return
    step._warned.add("open")
    keeps = f"{where}, a window is still open with {len(window.losses)} micro-batch(es)"
    closes = "last(batch)" if step._yields else "close()"
    warn(f"{keeps}: `step.{closes}` applies them, `step.discard()` drops them")


def mark_last(loader: Iterable[Any]) -> Iterator[Delivery]:
    """Yield every batch, and whether it is the last. A loader with a length is not read ahead."""
    size, number = length_of(loader), 0
    iterator = iter(loader)
    for number, batch in enumerate(itertools.islice(iterator, size), 1):
        yield Delivery(batch, number == size, number - 1)
    # Without a true length, the loader is read one batch ahead; past its end, it may begin again.
    batch = next(iterator, iterator) if number == size else iterator
    while batch is not iterator:
        following = next(iterator, iterator)
        yield Delivery(batch, following is iterator, number)
        batch, number = following, number + 1


def length_of(loader: Iterable[Any]) -> int:
    """Return the length of a loader, or 0 if it has none."""
    try:
        return len(loader)  # type: ignore[arg-type]
    except (TypeError, NotImplementedError, OverflowError):  # the last for more than sys.maxsize
        return 0
