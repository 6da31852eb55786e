"""Running over a loader, so that its last batch is known as the last."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def mark_last(loader: Iterable[T]) -> Iterator[tuple[T, bool]]:
    """Every batch, and whether it is the last."""
    try:
        size = len(loader)  # type: ignore[arg-type]
    except (TypeError, NotImplementedError):
        size = 0
    iterator = iter(loader)
    for seen, batch in enumerate(itertools.islice(iterator, size), 1):
        yield batch, seen == size
    # Without a length, or past the one it gave: only the batch after tells.
    for batch in iterator:
        for following in iterator:
            yield batch, False
            batch = following
        yield batch, True
