"""Running over a loader, so that its last batch is known as the last; by one rank, and by several in step."""

from __future__ import annotations

import copy
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from typing import Any, NamedTuple

from torch import Tensor


class Delivery(NamedTuple):
    """A batch on its way to a step.

    ``present``: the share of ranks that have a batch at this place. ``is_filler``: whether this rank has none, and goes along
    with the one before, so that no other waits for it.
    """

    batch: Any
    is_last: bool
    present: float = 1
    is_filler: bool = False


def mark_last(loader: Iterable[Any]) -> Iterator[Delivery]:
    """Every batch, and whether it is the last."""
    size = length_of(loader)
    iterator = iter(loader)
    for seen, batch in enumerate(itertools.islice(iterator, size), 1):
        yield Delivery(batch, seen == size)
    # Without a length, or past the one it gave: only the batch after tells.
    for batch in iterator:
        for following in iterator:
            yield Delivery(batch, False)
            batch = following
        yield Delivery(batch, True)


def in_step(
    loader: Iterable[Any], window: Callable[[], int], tell_all: Callable[..., Tensor]
) -> Iterator[Delivery]:
    """The same on several ranks, and on each of them as many: who has run out goes along, and counts nothing.

    Before every ``window()`` micro-batches the ranks tell each other how many they have, in one collective of two numbers. A
    loader is read ahead by a window and one batch; one with a length only at its end, where reading tells whether it holds.

    Raises:
        ValueError: on every rank, where one has no batch at all.
        RuntimeError: where a loader ends a window or more before its length.
    """
    size, seen = length_of(loader), 0
    iterator, ahead = iter(loader), deque[Any]()
    batch: Any = None
    more = True
    while more:
        n = window()
        here = size - seen
        if here <= n:
            ahead.extend(itertools.islice(iterator, n + 1 - len(ahead)))
            here = len(ahead)
        everyone = tell_all(min(here, n), here > n)
        counts, longest, more = (
            everyone[:, 0],
            int(everyone[:, 0].max()),
            bool(everyone[:, 1].any()),
        )
        if batch is None and longest and not counts.all():
            raise ValueError(
                f"the loaders of ranks {(counts == 0).nonzero().flatten().tolist()} have no batch, and a rank without one cannot "
                "go along with the others: give every rank at least one, as a DistributedSampler does"
            )
        for i in range(longest):
            is_filler = i >= min(here, n)
            if not is_filler:
                batch = ahead.popleft() if ahead else next(iterator, _END)
                seen += 1
                if batch is _END:
                    raise RuntimeError(
                        f"a loader of length {size} ended before batch {seen}, and other ranks count on it"
                    )
            # The loop may take things out of its batch, which is needed whole again where it was the last.
            given = copy.copy(batch) if isinstance(batch, (MutableMapping, list)) else batch
            yield Delivery(
                given, i + 1 == longest and not more, (counts > i).double().mean().item(), is_filler
            )


_END = object()


def length_of(loader: Iterable[Any]) -> int:
    """The length of a loader; 0 where it has none."""
    try:
        return len(loader)  # type: ignore[arg-type]
    except (
        TypeError,
        NotImplementedError,
        OverflowError,
    ):  # the last where it is larger than any sys.maxsize
        return 0
