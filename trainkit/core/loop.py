"""``step.over(loader)``: a loop over a loader whose last batch closes the last window."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from trainkit.core.warning import warn


class Delivery(NamedTuple):
    """A batch on its way to a step. ``number`` counts the batches of this pass before it."""

    batch: Any
    is_last: bool
    number: int = 0


def over(loader: Iterable[Any], steps: tuple[Any, ...]) -> Iterator[Any]:
    """Iterate over the batches, and tell the steps which is the last. See ``Step.over``."""
    found = [step._delivery for step in steps]
    try:
        for step in steps:
            if step._updater is None:
                step._prepare()
        for delivery in steps[0]._deliver(loader):
            for step in steps:
                step._delivery, step._ended_early = delivery, False
            yield delivery.batch
    finally:
        for step, delivery in zip(steps, found, strict=True):
            step._delivery = delivery
            for watcher in step._watchers:
                watcher.flush()
    for step in steps:
        step.settle()
        if step._window is not None and (count := len(step._window.losses)):
            left = f"the last batch reached no step, and its window keeps {count} micro-batch(es)"
            warn(f"{left}: `step.discard()` drops them")


def mark_last(loader: Iterable[Any]) -> Iterator[Delivery]:
    """Yield every batch, and whether it is the last. A loader with a length is not read ahead."""
    size, number = length_of(loader), 0
    iterator = iter(loader)
    for number, batch in enumerate(itertools.islice(iterator, size), 1):
        yield Delivery(batch, number == size, number - 1)
    for batch in iterator:  # past its length, or without one, only the batch after it tells
        for following in iterator:
            yield Delivery(batch, False, number)
            batch, number = following, number + 1
        yield Delivery(batch, True, number)


def length_of(loader: Iterable[Any]) -> int:
    """Return the length of a loader, or 0 if it has none."""
    try:
        return len(loader)  # type: ignore[arg-type]
    except (TypeError, NotImplementedError, OverflowError):  # the last for more than sys.maxsize
        return 0
